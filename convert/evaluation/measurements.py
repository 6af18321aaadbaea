"""What is measured of every model, in order: a name, what is asked, and how it is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from convert.evaluation.loss import measure_loss
from convert.evaluation.models import Loaded, Models, check_length, stamp
from convert.evaluation.options import EvaluationOptions, Subject
from convert.evaluation.store import Store
from convert.evaluation.text import first_rows


@dataclass(frozen=True)
class Measurement:
    """One of them.

    Attributes:
        name: of its file.
        asked: what decides the answer, besides the model.
        find: from the model and the teacher (None for the teacher itself), the answer.
    """

    name: str
    asked: dict[str, Any]
    find: Callable[[Loaded, Loaded | None], dict[str, Any]]


def measure_all(options: EvaluationOptions, store: Store, tell: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Every measurement of every model, by their names: those that ``store`` has not are made and stored.

    Raises:
        ConversionError: a model or a text that something cannot be measured of.
    """
    models = Models(options)
    results: dict[str, dict[str, Any]] = {}
    plan = list(_plan(options, models))
    subjects = options.subjects()
    for subject in subjects:
        identity = {"model": stamp(subject.path), "teacher": stamp(subjects[0].path), "dtype": str(models.dtype)}
        results[subject.name] = {}
        for measurement in plan:
            work = _work(measurement, subject, models, tell)
            results[subject.name][measurement.name] = store.measure(subject.name, measurement.name, identity | measurement.asked, work)
    return results


def machine(device: torch.device) -> dict[str, Any]:
    """What figures are taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": str(torch.__version__), "transformers": transformers.__version__}


def _work(measurement: Measurement, subject: Subject, models: Models, tell: Callable[[str], None]) -> Callable[[], dict[str, Any]]:
    def work() -> dict[str, Any]:
        tell(f"{subject.name}: {measurement.name}")
        teacher = None if models.is_teacher(subject) else models.teacher
        return measurement.find(models.opened(subject), teacher) | machine(models.device)

    return work


def _plan(options: EvaluationOptions, models: Models) -> Iterator[Measurement]:
    for length in options.lengths:
        yield from _losses(options, models, length)


def _losses(options: EvaluationOptions, models: Models, length: int) -> Iterator[Measurement]:
    count = max(options.rows * min(options.lengths) // length, 1)
    for number, path in enumerate(options.data):

        def find(loaded: Loaded, teacher: Loaded | None, path: Any = path) -> dict[str, Any]:
            check_length(loaded.model, length, "--length")
            rows = first_rows(path, loaded.tokenizer, length, count)
            return measure_loss(loaded.model, teacher and teacher.model, rows, max(models.batch_tokens // length, 1))

        yield Measurement(f"loss-{number}-{length}", {"data": stamp(str(path)), "rows": count, "length": length}, find)
