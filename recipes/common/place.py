"""Whether a run may have its folder: asked before torch is imported, and again by the run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from recipes.common.errors import RecipeError
from recipes.common.files import check_target, clear_up, hold, output_path, refuse_others
from recipes.common.marks import MARK, read_mark


def check_place(
    folder: str | Path, command: str, *, inputs: Sequence[str | Path] = (), resume: bool = False, overwrite: bool = False
) -> None:
    """`check_run` in a process that trains alone. Of several one asks for all, once they know one another: `Run.check`."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        check_run(output_path(folder), command, inputs=inputs, resume=resume, overwrite=overwrite)


def check_run(folder: Path, command: str, *, inputs: Sequence[str | Path] = (), resume: bool = False, overwrite: bool = False) -> None:
    """Clears up what killed runs left beside `folder`, and asks whether a run of `command` may write it.

    Args:
        inputs: what the run reads; none of it may be in the folder, nor the folder in it.
        resume, overwrite: what to do where the folder is there: go on in it, or start anew.

    Raises:
        RecipeError: the folder is there and neither `resume` nor `overwrite` is given, or is no run's of this command, or another process
            writes in it.
    """
    clear_up(folder.parent, folder.name)
    if folder.exists() and not (resume or overwrite):
        refuse_others(folder, command)
        raise RecipeError(f"{folder} exists already; pass --resume to go on, --overwrite to start anew, or choose another output")
    if not (resume and folder.exists()):
        check_target(folder, command, overwrite=overwrite, inputs=inputs)
        return
    mark = read_mark(folder)
    if mark is None or mark.command != command:
        raise RecipeError(
            f"{folder} holds no mark of {command} ({MARK}), so there is no run of this version to resume in it; choose another output"
        )
    hold(folder).release()
