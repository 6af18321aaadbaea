"""How models came to be: validations out of the run folders of their stages, where these stand beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.evaluation.options import EvaluationOptions, named_model
from recipes.common.reading import user_path
from recipes.common.state import read_records

_KEYS = ("above_teacher", "kl", "error")


@dataclass
class Curves:
    """Of the runs that were found.

    Attributes:
        by_tokens: by run and measure (``above_teacher``, ``kl``, ``error``), pairs of tokens and value.
        by_layer: by run, the errors of its layers at the first and at the last validation.
    """

    by_tokens: dict[str, dict[str, list[tuple[int, float]]]] = field(default_factory=dict)
    by_layer: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)


def read_curves(options: EvaluationOptions) -> Curves:
    """The curves of every model whose folder is RUN/model of a run with a metrics.jsonl, and of the other runs that were named.

    Raises:
        RecipeError: such a file is damaged.
    """
    curves = Curves()
    for name, run in map(named_model, options.runs):
        _read(name or user_path(run).name, user_path(run) / "metrics.jsonl", curves)
    for subject in options.subjects():
        metrics = user_path(subject.path).parent / "metrics.jsonl"
        if subject.window is None and user_path(subject.path).is_dir() and metrics.is_file():
            _read(subject.name, metrics, curves)
    return curves


def _read(name: str, metrics: Path, curves: Curves) -> None:
    records = list(read_records(metrics))
    trained = [record for record in records if _is_number(record.get("tokens")) and record["step"] > 0]
    a_step = trained[-1]["tokens"] / trained[-1]["step"] if trained else 0
    points: dict[str, list[tuple[int, float]]] = {}
    for key in _KEYS:
        found = [record for record in records if _is_number(record.get(f"valid_{key}"))]
        if a_step and found:
            points[key] = [(round(record["step"] * a_step), float(record[f"valid_{key}"])) for record in found]
    layers = [record["valid_layer_errors"] for record in records if _are_numbers(record.get("valid_layer_errors"))]
    if points:
        curves.by_tokens[name] = points
    if layers:
        curves.by_layer[name] = layers[0], layers[-1]


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
