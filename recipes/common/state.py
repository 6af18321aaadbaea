"""State that a run reads back is doubted: it goes on only from files that are as it wrote them, and its own.

A folder's mark (`recipes.common.marks`) has a digest of every file that belongs together there: weights, optimizer, schedule, random
states, progress. Weights of another model do not pass for these, whatever their shapes. Everything here raises RecipeError and changes
nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.common.errors import RecipeError
from recipes.common.marks import account, read_mark
from recipes.common.reading import open_file, parse_json, read_json

LONGEST_RECORD = 2**20
LARGEST = 10**18
"""More than any step, loss, count or time that a run could have written."""
_CHECKPOINT = re.compile(r"step-(\d{1,12})")


def checkpoints(folder: Path) -> list[Path]:
    """The folders step-N in `folder`, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def read_progress(checkpoint: Path, run: Any, steps: int | None = None) -> dict[str, Any]:
    """progress.json of a checkpoint that is whole and of this run.

    Args:
        checkpoint: a folder step-N.
        run: what the run's facts call it.
        steps: how many the run has; None: any number.

    Raises:
        RecipeError: a file is missing or not as it was written; the checkpoint is another run's; its step is none of this run's.
    """
    remedy = f"remove {checkpoint.name} to go on from an older checkpoint, if there is one, or start anew"
    check_written(checkpoint, remedy)
    path = checkpoint / "progress.json"
    progress = read_json(path)
    if not isinstance(progress, dict) or progress.get("run") != run:
        raise RecipeError(f"{path}: this checkpoint is another run's; {remedy}")
    step = progress.get("step")
    if not isinstance(step, int) or f"step-{step:08d}" != checkpoint.name or (steps is not None and step > steps):
        raise RecipeError(f"{path}: its step is {step!r:.50}, which is no step of this run; {remedy}")
    for key, value in progress.items():
        if key != "run" and not _is_number(value):
            raise RecipeError(f"{path}: {key} is {value!r:.50}, and a number was written; {remedy}")
    return progress


def check_written(folder: Path, remedy: str, compare: bool = True) -> None:
    """Refuses a folder of ours of which a file is missing or, with `compare`, not as it was written.

    Raises:
        RecipeError: one is, or the folder has no mark that tells.
    """
    mark = read_mark(folder)
    if mark is None or not mark.files:
        raise RecipeError(f"{folder} has no mark that says what was written there; {remedy}")
    ours = {path.relative_to(folder).as_posix() for path, is_ours in account(folder, mark, compare) if is_ours}
    if lost := sorted(set(mark.files) - ours):
        what = "is not as it was written" if (folder / lost[0]).exists() else "is missing"
        raise RecipeError(f"{folder / lost[0]} {what}; {remedy}")


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a metrics.jsonl, each with its "step"; a last line that a kill cut short is left out.

    Raises:
        RecipeError: another line is no such object; the message names it.
    """
    if not path.exists():
        return
    with open_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_RECORD), b""), 1):
            if not line.endswith(b"\n") and not file.read(1):
                return
            where = f"{path}, line {number}"
            record = parse_json(line.decode("utf-8", errors="replace"), where)
            step = record.get("step") if isinstance(record, dict) else None
            if not isinstance(step, int) or not _is_number(step) or step < 0:
                raise RecipeError(f"{where} holds no object with a step; take that line out")
            yield record


def number(record: dict[str, Any], key: str, where: str | Path) -> Any:
    """A number of a record that a program wrote.

    Raises:
        RecipeError: it is not there, or is none.
    """
    value = record.get(key)
    if not _is_number(value):
        raise RecipeError(f"{where}: {key} is {json.dumps(value)[:50]}, and a number was expected; give a file as the run wrote it")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST
