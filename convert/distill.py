"""Teaches a converted model its teacher's predictions: ``accelerate launch -m convert.distill STUDENT OUTPUT --teacher T --data FILE``."""

from __future__ import annotations

from convert.commands import OVERWRITE, RESUME, command
from convert.stages.options import DistillOptions
from recipes.common import cli
from recipes.common.place import check_place

COMMAND = "convert.distill"


def distill(options: DistillOptions, resume: bool = False, overwrite: bool = False) -> None:
    """Bring the predictions of the converted STUDENT near to its teacher's."""
    check_place(options.output, COMMAND, inputs=options.reads(), resume=resume, overwrite=overwrite)
    options.check_paths()
    # Late, since importing torch takes seconds: what is wrong with the arguments has been said by now.
    from convert.stages.distill import Distill

    Distill(options, COMMAND, resume, overwrite).run_all()


main = command(DistillOptions, distill, RESUME, OVERWRITE)


if __name__ == "__main__":
    cli.run(main)
