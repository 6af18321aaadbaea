"""A training run's folder: its config, its metrics, and checkpoints from which it goes on as if it had never stopped.

    config.yaml          the settings as resolved: a config file for a run like this one
    facts.json           what else must not change on resume, such as the number of processes
    metrics.jsonl        one JSON object a line, each with its "step"
    checkpoints/step-N   accelerate's save_state (weights, optimizer, schedule, random states), and progress.json
    tensorboard/

A checkpoint is written aside and moved into its place, so a kill at any moment leaves the last whole one. What `metrics.jsonl` holds beyond
that checkpoint is cut off on resume, because the run will write it again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from recipes.common.config import dump
from recipes.common.errors import RecipeError, stage
from recipes.common.files import clear_up, discard, hold, output_path, staged_directory, write_json, write_text
from recipes.common.lock import Lock
from recipes.common.marks import read_mark, sign
from recipes.common.place import check_run
from recipes.common.reading import read_json, read_yaml
from recipes.common.state import checkpoints, read_progress, read_records

# It warns of tied weights at every checkpoint, which load again as they were.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


# What comes into the folder after it was made: files that are ours by name, and folders with marks of their own.
GROWS = ("metrics.jsonl", "loss.png", "result.json", "tensorboard/*events.out.tfevents.*")
ID = "run"
"""In facts.json, and in the progress of each checkpoint: what tells a run from others with the same settings."""
FOLDERS = ("model", "best", "checkpoints/step-*")


class Run:
    """The folder of one run, the same in every process; one run at a time writes in it.

    Args:
        folder: where it is, or will be.
        command: who writes it.
        inputs: what the run reads; none of it may be in the folder, nor the folder in it.
        resume, overwrite: what to do where the folder is there: go on in it, or start anew.
    """

    def __init__(
        self,
        folder: str | Path,
        command: str,
        accelerator: Accelerator,
        *,
        inputs: Sequence[str | Path] = (),
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.command, self.accelerator = output_path(folder), command, accelerator
        self.inputs, self.resume, self.overwrite = inputs, resume, overwrite
        self._held: Lock | None = None

    def check(self) -> None:
        """What `open` refuses without knowing the config: call it before slow preparations.

        Raises:
            RecipeError: the processes do not see one another; or the folder is there and neither `resume` nor `overwrite` is given, or is
                no run's of this command, or another process writes in it.
        """
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.accelerator.num_processes:
            raise RecipeError(
                f"{started} processes were started and accelerate sees {self.accelerator.num_processes}, so each would train by itself; "
                "on CPUs start them with ACCELERATE_USE_CPU=true in the environment"
            )
        _by_main(self.accelerator, self._check)

    def open(self, config: dict[str, Any], facts: dict[str, Any] | None = None) -> None:
        """Create the folder, or with `resume` go on in it if it is there, and hold it until `close`.

        Args:
            config: the settings, plain values.
            facts: what else decides the run's numbers, such as a count of the data; the number of processes is added. A resume
                with another config or other facts is refused.

        Raises:
            RecipeError: as in `check`, or the folder belongs to another run.
        """
        facts = {**(facts or {}), "processes": self.accelerator.num_processes}
        _by_main(self.accelerator, lambda: self._open(config, facts))

    def close(self) -> None:
        """Let go of the folder."""
        if self._held:
            self._held.release()

    def _check(self) -> None:
        check_run(self.folder, self.command, inputs=self.inputs, resume=self.resume, overwrite=self.overwrite)

    def _open(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        self._check()
        if not (self.resume and self.folder.exists()):
            with staged_directory(
                self.folder, self.command, overwrite=self.overwrite, inputs=self.inputs, grows=GROWS, folders=FOLDERS
            ) as aside:
                write_text(aside / "config.yaml", dump(config))
                write_json(aside / "facts.json", {**facts, ID: secrets.token_hex(8)})
        self._held = hold(self.folder)
        _check_same(self.folder, {**config, **facts})
        for folder in (self.folder, self.folder / "checkpoints"):
            clear_up(folder)
        if mark := read_mark(self.folder):
            sign(self.folder, mark)

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def log(self, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl, from the main process; numbers that are not finite as null."""
        if self.accelerator.is_main_process:
            finite = {key: _finite(value) for key, value in values.items()}
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **finite}, ensure_ascii=False) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut short by a kill is left out."""
        return list(read_records(self.metrics_file))

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return checkpoints(self.folder / "checkpoints")

    def save(self, step: int, progress: dict[str, Any] | None = None, keep: int = 1) -> None:
        """Checkpoint everything `accelerator.prepare` was given, and `progress` (plain values); keep the newest `keep`.

        Raises:
            RecipeError: it cannot be written; the checkpoints before it stay.
        """
        accelerator, target = self.accelerator, self.folder / "checkpoints" / f"step-{step:08d}"
        accelerator.wait_for_everyone()
        with (
            stage(f"writing the checkpoint {target}", "the one before is whole: free some space and start with --resume"),
            ExitStack() as stack,
        ):
            aside = [str(stack.enter_context(staged_directory(target, self.command))) if accelerator.is_main_process else ""]
            broadcast_object_list(aside)
            accelerator.save_state(aside[0])
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_json(Path(aside[0]) / "progress.json", {"step": step, ID: self._id(), **(progress or {})})
        if accelerator.is_main_process:
            for old in self.checkpoints()[:-keep]:
                discard(old)
        accelerator.wait_for_everyone()

    def restore(self, steps: int | None = None) -> dict[str, Any]:
        """Load the newest checkpoint into what `accelerator.prepare` was given and return its progress; {"step": 0} if there is none.

        Args:
            steps: how many the run has; None: not known.

        Raises:
            RecipeError: it is not whole, not this run's, or cannot be loaded. Nothing is changed then, and no older one taken in its place.
        """
        newest = self.checkpoints()[-1:]
        progress: dict[str, Any] = {"step": 0}
        if newest:
            _by_main(self.accelerator, lambda: progress.update(read_progress(newest[0], self._id(), steps)))
            with stage(f"loading the checkpoint {newest[0]}", "start anew, or go on in the environment that wrote it"):
                self.accelerator.load_state(str(newest[0]))
            progress = read_json(newest[0] / "progress.json")
        self.accelerator.wait_for_everyone()
        _by_main(self.accelerator, lambda: self._cut_metrics(progress["step"] if newest else -1))  # the beginning is measured anew
        return progress

    def _cut_metrics(self, step: int) -> None:
        if self.metrics_file.exists():
            kept = [record for record in self.records() if record["step"] <= step]
            write_text(self.metrics_file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))

    def _id(self) -> Any:
        return read_json(self.folder / "facts.json").get(ID)


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _by_main(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do `work` in the main process; a RecipeError there is raised in every process, so that none waits for the others."""
    problem: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            work()
        except RecipeError as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise RecipeError(problem[0])


def _check_same(folder: Path, new: dict[str, Any]) -> None:
    if not (folder / "config.yaml").is_file():
        raise RecipeError(f"{folder} holds no config.yaml, so there is no run to resume in it; name the folder of a run, or another output")
    old, facts = read_yaml(folder / "config.yaml"), read_json(folder / "facts.json")
    if not isinstance(old, dict) or not isinstance(facts, dict):
        raise RecipeError(f"{folder}: config.yaml or facts.json is damaged, so the run cannot be resumed; start anew elsewhere")
    old |= {key: value for key, value in facts.items() if key != ID}
    new = yaml.safe_load(dump(new))
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            raise RecipeError(
                f"{folder} belongs to another run: {key} was {old.get(key)!r:.200} and is now {new.get(key)!r:.200}; "
                "resume with the same settings, or choose another output"
            )
