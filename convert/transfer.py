"""Teaches each linear layer what the teacher's gives: ``accelerate launch -m convert.transfer STUDENT OUTPUT --teacher T --data FILE``.

The teacher runs once a batch. What enters each of its attention layers enters the student's, and what leaves the student's is brought
near to what leaves the teacher's: the mean squared error over the mean square of the teacher's. No layer feels another's error.
"""

from __future__ import annotations

from convert.commands import OVERWRITE, RESUME, command
from convert.stages.options import TransferOptions
from recipes.common import cli
from recipes.common.place import check_place

COMMAND = "convert.transfer"


def transfer(options: TransferOptions, resume: bool = False, overwrite: bool = False) -> None:
    """Bring the attention layers of the converted STUDENT near to its teacher's, one by one."""
    check_place(options.output, COMMAND, inputs=options.reads(), resume=resume, overwrite=overwrite)
    options.check_paths()
    # Late, since importing torch takes seconds: what is wrong with the arguments has been said by now.
    from convert.stages.transfer import Transfer

    Transfer(options, COMMAND, resume, overwrite).run_all()


main = command(TransferOptions, transfer, RESUME, OVERWRITE)


if __name__ == "__main__":
    cli.run(main)
