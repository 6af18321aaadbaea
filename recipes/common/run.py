"""A training run's folder: its config, its metrics, and checkpoints from which it goes on as if it had never stopped.

    config.yaml          the settings as resolved: a config file for a run like this one
    facts.json           what else must not change on resume, such as the number of processes
    metrics.jsonl        one JSON object a line, each with its "step"
    checkpoints/step-N   accelerate's save_state (weights, optimizer, schedule, random states), and progress.json
    tensorboard/

A checkpoint is written aside and renamed, so a kill at any moment leaves the last whole one. What `metrics.jsonl` holds beyond
that checkpoint is cut off on resume, because the run will write it again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from recipes.common.config import dump
from recipes.common.errors import RecipeError, sentence
from recipes.common.files import staged_directory, write_json, write_text

# It warns of tied weights at every checkpoint, which load again as they were.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


class Run:
    """The folder of one run; made by `Run.open`, the same call in every process."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder = folder
        self.accelerator = accelerator

    @classmethod
    def open(
        cls,
        folder: str | Path,
        config: dict[str, Any],
        accelerator: Accelerator,
        *,
        facts: dict[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Run:
        """Create the folder, or with `resume` go on in it if it is there.

        Args:
            config: the settings, plain values.
            facts: what else decides the run's numbers, such as a count of the data; the number of processes is added. A resume
                with another config or other facts is refused.

        Raises:
            RecipeError: the processes do not see one another, or the folder exists and neither `resume` nor `overwrite` is given, or
                is no run's folder, or belongs to another run.
        """
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != accelerator.num_processes:
            raise RecipeError(
                f"{started} processes were started and accelerate sees {accelerator.num_processes}, so each would train by itself; "
                "on CPUs start them with ACCELERATE_USE_CPU=true in the environment"
            )
        cls.check(folder, resume=resume, overwrite=overwrite)
        folder = Path(folder)
        facts = {**(facts or {}), "processes": accelerator.num_processes}
        going_on = resume and folder.exists()
        if going_on:
            _check_same(folder, {**config, **facts})
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not going_on:
            with staged_directory(folder, overwrite=True) as aside:
                write_text(aside / "config.yaml", dump(config))
                write_json(aside / "facts.json", facts)
        accelerator.wait_for_everyone()
        return cls(folder, accelerator)

    @staticmethod
    def check(folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        """What `open` refuses without knowing the config: call it before slow preparations."""
        folder = Path(folder)
        if not folder.exists() or resume:
            return
        if not overwrite:
            raise RecipeError(f"{folder} exists already; pass --resume to go on, --overwrite to start anew, or choose another output")
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.yaml").is_file()):
            raise RecipeError(f"{folder} holds no config.yaml, so it is not a run's folder and is not overwritten; choose another output")

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def log(self, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl, from the main process."""
        if self.accelerator.is_main_process:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut short by a kill is left out."""
        return read_records(self.metrics_file)

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))

    def save(self, step: int, progress: dict[str, Any] | None = None, keep: int = 1) -> None:
        """Checkpoint everything `accelerator.prepare` was given, and `progress` (plain values); keep the newest `keep`.

        Raises:
            RecipeError: it cannot be written; the checkpoints before it stay.
        """
        main = self.accelerator.is_main_process
        target = self.folder / "checkpoints" / f"step-{step:08d}"
        aside = target.with_name(f".partial-{target.name}")
        self.accelerator.wait_for_everyone()
        if main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(aside))
        except Exception as error:  # a full disk is an OSError, a RuntimeError of torch or an error of safetensors
            shutil.rmtree(aside, ignore_errors=True)
            raise RecipeError(
                f"{target} cannot be written ({sentence(error)}); the one before is whole: free some space and start with --resume"
            ) from None
        self.accelerator.wait_for_everyone()
        if main:
            write_json(aside / "progress.json", {"step": step, **(progress or {})})
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
            for old in self.checkpoints()[:-keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def restore(self) -> dict[str, Any]:
        """Load the newest checkpoint into what `accelerator.prepare` was given and return its progress; {"step": 0} if there is none."""
        newest = self.checkpoints()[-1:]
        progress: dict[str, Any] = {"step": 0}
        if newest:
            self.accelerator.load_state(str(newest[0]))
            progress = json.loads((newest[0] / "progress.json").read_text(encoding="utf-8"))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and self.metrics_file.exists():
            kept = [record for record in self.records() if record["step"] <= progress["step"]]
            write_text(self.metrics_file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
        self.accelerator.wait_for_everyone()
        return progress


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; lines that are not whole are left out."""
    path = Path(path)
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _check_same(folder: Path, new: dict[str, Any]) -> None:
    if not (folder / "config.yaml").is_file():
        raise RecipeError(f"{folder} holds no config.yaml, so there is no run to resume in it; name the folder of a run, or another output")
    try:
        old = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        old |= json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError, yaml.YAMLError):
        raise RecipeError(f"{folder}: config.yaml or facts.json is damaged, so the run cannot be resumed; start anew elsewhere") from None
    new = yaml.safe_load(dump(new))
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            raise RecipeError(
                f"{folder} belongs to another run: {key} was {old.get(key)!r} and is now {new.get(key)!r}; "
                "resume with the same settings, or choose another output"
            )
