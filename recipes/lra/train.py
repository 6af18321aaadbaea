"""Train and test the encoder on one task; `accelerate launch` runs it on any devices.

    accelerate launch -m recipes.lra.train --config recipes/lra/configs/TASK.yaml --set attn_implementation=linattn dropout=noise

Each seed's folder holds metrics.jsonl, best/ (the checkpoint of the best validation accuracy, for from_pretrained), checkpoints/, and
result.json with the accuracy of best/ on the test set. With --resume a run goes on from its last checkpoint, and finished seeds are left
as they are.
"""

from __future__ import annotations

import numpy as np

from recipes.common import cli
from recipes.common.config import load_config
from recipes.common.place import check_place

from .data import TASKS, load
from .settings import COMMAND, Settings


def main(
    config: cli.ConfigFile,
    set_values: cli.SetValues = None,
    more: cli.MoreValues = None,
    resume: cli.Resume = False,
    overwrite: cli.Overwrite = False,
) -> None:
    """Train on one task of the Long Range Arena, one seed after another."""
    settings = load_config(Settings, config, [*(set_values or []), *(more or [])])
    for seed in settings.seeds:
        check_place(settings.folder(seed), COMMAND, inputs=[config, settings.data], resume=resume, overwrite=overwrite)
    splits = load(TASKS[settings.task], settings.data)
    # Late, since importing torch takes seconds: what is wrong with the arguments has been said by now.
    import transformers

    from .training import Training

    transformers.utils.logging.disable_progress_bar()
    accuracies = []
    for seed in settings.seeds:
        training = Training(settings, seed, splits, resume, overwrite, inputs=[config])
        accuracies.append(training.run_all()["test_accuracy"])
        training.accelerator.free_memory()
    spread = f", deviation {np.std(accuracies, ddof=1):.2%}" if len(accuracies) > 1 else ""
    training.accelerator.print(f"{settings.task}: test accuracy {np.mean(accuracies):.2%} over {len(accuracies)} seed(s){spread}")


if __name__ == "__main__":
    cli.run(main)
