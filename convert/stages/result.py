"""What a stage leaves: the trained checkpoint, with its tokenizer, conversion.json with one stage more, and a card that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.card import without_evaluation
from convert.companions import copy_companions
from convert.errors import stage
from convert.report import versions
from recipes.common.files import staged_directory, write_json, write_text
from recipes.common.reading import read_json

REPORT = "conversion.json"
_NOT_LISTED = ("student", "output")
_TRAINED = "It has been trained since, against its teacher:"
_CONTROL = "This is the softmax model, fine-tuned by `hf_linattn` as a control: on the text alone, for as many tokens as a student."


@dataclass(frozen=True)
class Trained:
    """What a stage did.

    Attributes:
        stage: its command.
        options: as they were given.
        steps, tokens: over which the student learned.
        seconds: of training, without validations and checkpoints.
    """

    stage: str
    options: dict[str, Any]
    steps: int
    tokens: int
    seconds: int


def write_result(
    folder: Path,
    command: str,
    before: Path,
    student: Any,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    trained: Trained,
    validations: Sequence[dict[str, Any]],
) -> None:
    """Write the trained checkpoint `folder`, whole or not at all.

    Args:
        command: the stage's.
        before: folder of the checkpoint that was trained.
        student: the model, `weights` its state.
        dtype: what its weights are stored as; the numbers a head that attention starts from stay float32.
        validations: records of the run, the first before training.

    Raises:
        ConversionError: it cannot be written.
    """
    with (
        stage(f"writing {folder}", "free some space and start again with --resume"),
        staged_directory(folder, command) as place,
    ):
        copy_companions(before, place)
        student.config.use_cache = True
        student.save_pretrained(place, state_dict=_stored(student, weights, dtype))
        # What the model computes in stands there, and what its weights are stored as should.
        write_json(place / "config.json", read_json(place / "config.json") | {"dtype": str(dtype).removeprefix("torch.")})
        report = _report(before, trained, validations)
        write_json(place / REPORT, report)
        card = before / "README.md"
        write_text(place / "README.md", _card(card.read_text(encoding="utf-8") if card.is_file() else "# Model\n", report["stages"]))


def _stored(student: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters in `dtype`, all else as it is; weights that are tied stay one tensor."""
    learned = {name for name, _ in student.named_parameters(remove_duplicate=False)}
    made: dict[int, Tensor] = {}
    for name, value in weights.items():
        if name in learned and value.is_floating_point():
            made.setdefault(value.data_ptr(), value.to(dtype))
    return {name: made[value.data_ptr()] if name in learned and value.data_ptr() in made else value for name, value in weights.items()}


def _report(before: Path, trained: Trained, validations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    path = before / REPORT
    known = read_json(path) if path.is_file() else {}
    entry = asdict(trained)
    entry["options"] = {key: value for key, value in entry["options"].items() if key not in _NOT_LISTED}
    for end, record in zip(("before", "after"), (validations[0], validations[-1]), strict=True):
        entry[end] = {key: value for key, value in record.items() if key.startswith("valid_")}
    entry["versions"] = versions()
    report: dict[str, Any] = known if isinstance(known, dict) else {}
    return report | {"stages": [*report.get("stages", []), entry]}


def _card(text: str, stages: Sequence[dict[str, Any]]) -> str:
    """The card of the checkpoint that was trained, with what has been done to it in place of the paragraph that says nothing has."""
    paragraphs = [part for part in without_evaluation(text).split("\n\n") if not part.startswith("| stage |")]
    for number, part in enumerate(paragraphs):
        if "has not been trained since" in part:
            paragraphs[number] = f"{part.split('**has not been trained since**')[0].rstrip().removesuffix('and').rstrip()}. {_TRAINED}"
            break
        if _TRAINED in part or part == _CONTROL:
            break
    else:
        number = len(paragraphs)
        is_control = stages[-1]["options"].get("control")
        paragraphs.append(_CONTROL if is_control else f"This checkpoint was converted with `hf_linattn`. {_TRAINED}")
    paragraphs.insert(number + 1, _table(stages))
    return "\n\n".join(paragraphs).rstrip() + "\n"


def _table(stages: Sequence[dict[str, Any]]) -> str:
    lines = ["| stage | teacher | tokens | steps | on rows kept out, before | after |", "|---|---|---|---|---|---|"]
    for one in stages:
        ends = [_figures(one.get(end, {})) for end in ("before", "after")]
        teacher = Path(one["options"]["teacher"]).name if Path(one["options"]["teacher"]).exists() else one["options"]["teacher"]
        lines.append(f"| `{one['stage']}` | {teacher} | {one['tokens']:,} | {one['steps']:,} | {ends[0]} | {ends[1]} |")
    return "\n".join(lines)


def _figures(measured: dict[str, Any]) -> str:
    return ", ".join(f"{key.removeprefix('valid_')} {value:.4f}" for key, value in measured.items() if isinstance(value, float))
