"""Starts the new numbers from the teacher's attention: ``accelerate launch -m convert.calibrate STUDENT OUTPUT --teacher T --data FILE``.

The teacher runs over some text once. What it attends to, how far, and along which directions of queries and keys, says where decays, gates
and projections start; temperatures are tried. No weight is trained, and `convert.transfer` goes on from the result.
"""

from __future__ import annotations

from convert.commands import OVERWRITE, RESUME, command
from convert.stages.options import CalibrateOptions
from recipes.common import cli
from recipes.common.place import check_place

COMMAND = "convert.calibrate"


def calibrate(options: CalibrateOptions, resume: bool = False, overwrite: bool = False) -> None:
    """Start the new numbers of the converted STUDENT from its teacher's attention."""
    check_place(options.output, COMMAND, inputs=options.reads(), resume=resume, overwrite=overwrite)
    options.check_paths()
    # Late, since importing torch takes seconds: what is wrong with the arguments has been said by now.
    from convert.stages.calibrate import Calibrate

    Calibrate(options, COMMAND, resume, overwrite).run_all()


main = command(CalibrateOptions, calibrate, RESUME, OVERWRITE)


if __name__ == "__main__":
    cli.run(main)
