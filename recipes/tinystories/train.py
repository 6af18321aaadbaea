"""Fine-tune a causal language model on short stories, or train one from scratch; `accelerate launch` runs it on any devices.

    accelerate launch -m recipes.tinystories.train --config FILE [--set key=value ...] [--resume]

Killed at any moment and started again with --resume, it goes on from the last checkpoint to the same losses.
"""

from __future__ import annotations

from recipes.common import cli
from recipes.common.config import load_config
from recipes.common.place import check_place
from recipes.common.reading import refuse_missing_folder
from recipes.tinystories.settings import COMMAND, Settings


def main(
    config: cli.ConfigFile,
    set_values: cli.SetValues = None,
    more: cli.MoreValues = None,
    resume: cli.Resume = False,
    overwrite: cli.Overwrite = False,
) -> None:
    """Train a language model on short stories."""
    settings = load_config(Settings, config, [*(set_values or []), *(more or [])])
    check_place(settings.output, COMMAND, inputs=[config, *settings.reads()], resume=resume, overwrite=overwrite)
    for checkpoint in filter(None, (settings.model, settings.teacher)):
        refuse_missing_folder(checkpoint)
    # Late, since importing torch takes seconds: what is wrong with the arguments has been said by now.
    from recipes.tinystories.training import Training

    Training(settings, resume, overwrite, inputs=[config]).run_all()


if __name__ == "__main__":
    cli.run(main)
