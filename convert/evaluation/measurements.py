"""What is measured of every model, in order: a name, what is asked, and how it is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers

from convert.evaluation.costs import STEPS, measure_costs
from convert.evaluation.describe import describe
from convert.evaluation.loss import measure_loss
from convert.evaluation.models import Loaded, Models, check_length, stamp
from convert.evaluation.options import EvaluationOptions, Subject, require_lm_eval
from convert.evaluation.prompts import Prompt, Prompts
from convert.evaluation.recall import measure_recall
from convert.evaluation.store import Store
from convert.evaluation.tasks import local_rows, measure_task
from convert.evaluation.text import Rows, first_rows
from recipes.common.threads import threads

_LIGHTER = 4
"""How many times the tokens of a batch of text fit where only the last logits of a row are wanted."""
_TOKENS_OF_A_REQUEST = 256


@dataclass(frozen=True)
class Measurement:
    """One of them.

    Attributes:
        name: of its file.
        asked: what decides the answer, besides the model.
        find: from the model and the teacher (None for the teacher itself), the answer.
        prepare: reads what is asked about, so that what is wrong with it is said before anything is measured.
        of_controls: whether the teacher under a window is asked too.
    """

    name: str
    asked: dict[str, Any]
    find: Callable[[Loaded, Loaded | None], dict[str, Any]]
    prepare: Callable[[], object] = lambda: None
    of_controls: bool = True

    def is_of(self, subject: Subject) -> bool:
        """Whether it is made of that model."""
        return self.of_controls or subject.window is None


def measure_all(options: EvaluationOptions, store: Store, tell: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Every measurement of every model, by their names: those that ``store`` has not are made and stored.

    Raises:
        ConversionError: a model or a text that something cannot be measured of.
    """
    models = Models(options)
    results: dict[str, dict[str, Any]] = {}
    plan = list(_plan(options, models))
    subjects = options.subjects()
    for measurement in plan:
        if not all(store.find(subject.name, measurement.name) for subject in subjects if measurement.is_of(subject)):
            measurement.prepare()
    for subject in subjects:
        identity = {"model": stamp(subject.path), "teacher": stamp(subjects[0].path), "dtype": str(models.dtype)}
        described = Measurement("model", {"sinks": options.sinks}, partial(_describe, subject, options.sinks))
        results[subject.name] = {}
        for measurement in [described, *plan]:
            if measurement.is_of(subject):
                work = _work(measurement, subject, models, tell)
                results[subject.name][measurement.name] = store.measure(subject.name, measurement.name, identity | measurement.asked, work)
    return results


def machine(device: torch.device) -> dict[str, Any]:
    """What figures are taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads()}"
    return {"device": name, "torch": str(torch.__version__), "transformers": transformers.__version__}


def _work(measurement: Measurement, subject: Subject, models: Models, tell: Callable[[str], None]) -> Callable[[], dict[str, Any]]:
    def work() -> dict[str, Any]:
        tell(f"{subject.name}: {measurement.name}")
        teacher = None if models.is_teacher(subject) else models.teacher
        return measurement.find(models.opened(subject), teacher) | machine(models.device) | {"dtype": str(models.dtype).split(".")[1]}

    return work


def _plan(options: EvaluationOptions, models: Models) -> Iterator[Measurement]:
    for length in options.lengths:
        yield from _losses(options, models, length)
    maker = cache(lambda: Prompts(options.hidden_in, models.teacher.tokenizer, options.recall_length, options.seed))
    for kind in options.recall:
        yield _recall(options, models, kind, maker)
    if options.decode:
        yield _costs(options, models)
    for task in options.tasks:
        yield _task(options, models, task)


def _losses(options: EvaluationOptions, models: Models, length: int) -> Iterator[Measurement]:
    count = max(options.rows * min(options.lengths) // length, 1)
    for number, path in enumerate(options.data):

        @cache
        def rows(path: Path = path) -> Rows:
            check_length(models.teacher.model, length, "--length")
            return first_rows(path, models.teacher.tokenizer, length, count)

        def find(loaded: Loaded, teacher: Loaded | None, rows: Callable[[], Rows] = rows) -> dict[str, Any]:
            return measure_loss(loaded.model, teacher and teacher.model, rows(), max(models.batch_tokens // length, 1))

        yield Measurement(f"loss-{number}-{length}", {"data": stamp(str(path)), "rows": count, "length": length}, find, rows)


def _recall(options: EvaluationOptions, models: Models, kind: str, maker: Callable[[], Prompts]) -> Measurement:
    asked = {"filler": stamp(str(options.hidden_in)), "distances": list(options.distances), "needles": options.needles}

    @cache
    def prompts() -> dict[int, list[Prompt]]:
        made = {distance: maker().make(kind, distance, options.needles) for distance in options.distances}
        check_length(models.teacher.model, max((len(alike[0].ids) for alike in made.values()), default=0), "--distances")
        return made

    def find(loaded: Loaded, teacher: Loaded | None) -> dict[str, Any]:
        found = {}
        for distance, made in prompts().items():
            batch = max(_LIGHTER * models.batch_tokens // len(made[0].ids), 1)
            found[str(distance)] = measure_recall(loaded.model, loaded.tokenizer, made, batch)
        return {"by_distance": found}

    return Measurement(f"recall-{kind}", asked | {"length": options.recall_length, "seed": options.seed}, find, prompts)


def _costs(options: EvaluationOptions, models: Models) -> Measurement:
    def prepare() -> None:
        check_length(models.teacher.model, max(options.decode) + STEPS, "--decode")

    def find(loaded: Loaded, teacher: Loaded | None) -> dict[str, Any]:
        return measure_costs(loaded.model, options.decode)

    # A control runs with the teacher's whole cache, so its costs would not be those of a window.
    return Measurement("costs", {"lengths": list(options.decode)}, find, prepare, of_controls=False)


def _task(options: EvaluationOptions, models: Models, task: str) -> Measurement:
    require_lm_eval()
    rows = local_rows(options.task_rows, task) if options.task_rows else None
    asked = {"rows": stamp(str(rows)) if rows else "hub", "limit": options.limit}
    batch = max(models.batch_tokens // _TOKENS_OF_A_REQUEST, 1)
    return Measurement(
        f"task-{task}", asked, lambda loaded, _: measure_task(loaded.model, loaded.tokenizer, task, rows, options.limit, batch)
    )


def _describe(subject: Subject, sinks: int, loaded: Loaded, teacher: Loaded | None) -> dict[str, Any]:
    return describe(loaded, subject, sinks)
