"""What is tried on an architecture, and what came of it.

Each trial runs a call of the model under "linattn" and holds it against the quadratic form: first against what is right (every text alone,
without cache), then, where that differs, against the same call of the quadratic form, if the softmax form is no better there.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from sweep import reference
from sweep.inputs import LENGTH
from sweep.models import REASONS, Case, Family
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, PreTrainedModel

import hf_linattn

TOLERANCE = 1e-4
RIGHT, SOFTMAX, REFUSED, WRONG, ERROR, NONE = "right", "as its softmax form", "refused", "wrong", "error", "-"
PLUGIN = str(Path(hf_linattn.__file__).parent)
OPERATOR = str(Path(PLUGIN, "ops"))
PREFILL, NEW = 12, 6
LENGTHS = (LENGTH, 17, 9)  # of the texts of a padded batch
PACKED = (5, 11, 7)


@dataclass
class Outcome:
    """Of one trial: its status, and a sentence where there is something to say."""

    status: str
    note: str = ""


@dataclass
class Row:
    """Of one architecture: the class and an outcome a trial; the verdict is the worst of them."""

    model_type: str
    kind: str
    class_name: str = ""
    trials: dict[str, Outcome] = field(default_factory=dict)
    reason: str = ""
    """Why it could not be tried."""
    died: str = ""
    """How its process ended, if it did not end by itself."""

    @property
    def verdict(self) -> str:
        if self.reason:
            return NONE
        if self.died:
            return ERROR
        statuses = [outcome.status for outcome in self.trials.values()]
        if statuses and all(status in (REFUSED, NONE) for status in statuses):
            return REFUSED
        return next((s for s in (ERROR, WRONG, SOFTMAX) if s in statuses), RIGHT)

    def to_dict(self) -> dict[str, Any]:
        trials = {name: asdict(outcome) for name, outcome in self.trials.items()} or {"all": asdict(Outcome(ERROR, self.died))}
        return {
            "model_type": self.model_type, "kind": self.kind, "class_name": self.class_name, "verdict": self.verdict,
            "reason": self.reason, "trials": trials if not self.reason else {},
        }  # fmt: skip


class OwnSoftmax(TorchFunctionMode):
    """Counts softmax of a text with itself, which a model computes past the attention interface."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "softmax":
            self.count += args[0].dim() >= 3 and args[0].shape[-1] == args[0].shape[-2] > 4
        elif name == "scaled_dot_product_attention":
            self.count += args[0].shape[-2] == args[1].shape[-2] > 4
        return func(*args, **(kwargs or {}))


def try_case(case: Case) -> Row:
    """Every trial of an architecture."""
    row = Row(case.model_type, case.kind)
    try:
        family = Family(case)
        row.class_name = family.class_name
        if not family.has_attention:
            row.reason = "has no attention"
            return row
        refusal = attempt(lambda: family.model("linattn"))
        if isinstance(refusal, Outcome):
            row.trials = {"forward": refusal}
            return row
        inputs = family.inputs()
    except Exception as error:
        row.reason = reason_of(case, error)
        return row
    with torch.no_grad():
        row.trials = _tried(family, inputs)
    return row


def _tried(family: Family, inputs: dict[str, Tensor]) -> dict[str, Outcome]:
    trials = {"forward": _forward(family, inputs)}
    if trials["forward"].status != RIGHT or list(inputs) != ["input_ids"] or family.config.is_encoder_decoder:
        return trials
    tokens = inputs["input_ids"]
    for name, trial in TRIALS.items():
        if family.decodes or name in ENCODERS_TOO:
            trials[name] = trial(family, tokens)
    return trials


def _forward(family: Family, inputs: dict[str, Tensor]) -> Outcome:
    """One pass over plain inputs; also whether the attention is linear at all, and matters."""
    with OwnSoftmax() as own:
        got = attempt(lambda: everything(family, "linattn", **inputs))
    reference.calls = 0
    want = attempt(lambda: everything(family, reference.NAME, **inputs))
    calls = reference.calls
    if isinstance(got, Outcome):
        return got
    if calls == 0:
        return Outcome(WRONG, "softmax runs under the name linattn: the attention interface is never called")
    if isinstance(want, Outcome):
        return Outcome(WRONG, f"a number came, where the quadratic form says: {want.note}")
    if differs(got, want):
        return Outcome(WRONG, f"differs by {distance(got, want):.1e}")
    if own.count:
        return Outcome(WRONG, f"softmax in {own.count} places beside {calls} calls of the attention interface")
    felt = distance(everything(family, reference.UNIFORM, **inputs), want)
    if felt < 10 * distance(got, want):
        return Outcome(ERROR, f"the trial proves nothing: uniform weights differ by {felt:.1e} only")
    return Outcome(RIGHT)


def _steps(family: Family, tokens: Tensor) -> Outcome:
    """A prefill, then one token at a time."""
    bounds = [0, PREFILL, *range(PREFILL + 1, LENGTH + 1)]
    return judged(
        family,
        lambda implementation: cached(family, implementation, tokens, bounds),
        lambda implementation: run(family, implementation, input_ids=tokens),
    )


def _chunks(family: Family, tokens: Tensor) -> Outcome:
    """A prefill in three parts."""
    return judged(
        family,
        lambda implementation: cached(family, implementation, tokens, [0, PREFILL, PREFILL + 4, LENGTH]),
        lambda implementation: run(family, implementation, input_ids=tokens),
    )


def _padded(left: bool) -> Callable[[Family, Tensor], Outcome]:
    """A padded batch: with the mask alone as the quadratic form, and with positions too, which then count from 0, as each text alone."""

    def trial(family: Family, tokens: Tensor) -> Outcome:
        if not family.takes("attention_mask"):
            return Outcome(NONE, "takes no mask")
        real = _real(left)
        masked = {"input_ids": torch.where(real, tokens, 0), "attention_mask": real.long()}
        placed = {"position_ids": (real.long().cumsum(-1) - 1).clamp_min(0)} if family.takes("position_ids") else {}

        def texts_alone(implementation: str) -> Tensor:
            return torch.cat([alone(family, implementation, tokens[i : i + 1, real[i]])[0] for i in range(len(real))])

        bare = judged(family, lambda implementation: run(family, implementation, **masked)[real], texts_alone)
        if bare.status not in (RIGHT, SOFTMAX):
            return bare
        return judged(family, lambda implementation: run(family, implementation, **masked, **placed)[real], texts_alone)

    return trial


def _real(left: bool) -> Tensor:
    index = torch.arange(LENGTH)
    lengths = torch.tensor(LENGTHS)[:, None]
    return index >= LENGTH - lengths if left else index < lengths


def _packing(family: Family, tokens: Tensor) -> Outcome:
    """Three texts in a row, told apart by positions that begin anew."""
    if not family.takes("position_ids"):
        return Outcome(NONE, "takes no positions")
    positions = torch.cat([torch.arange(n) for n in PACKED])[None].expand(len(tokens), -1)
    parts = tokens.split(PACKED, dim=1)
    return judged(
        family,
        lambda implementation: run(family, implementation, input_ids=tokens, position_ids=positions),
        lambda implementation: torch.cat([alone(family, implementation, part) for part in parts], 1),
    )


def _generation(family: Family, tokens: Tensor) -> Outcome:
    """Greedy generation of a batch padded on the left: the logits of every new token."""
    if not family.takes("attention_mask") or not family.model("linattn").can_generate():
        return Outcome(NONE, "does not generate")
    real = _real(left=True)
    return judged(
        family,
        lambda implementation: generated(family, implementation, torch.where(real, tokens, 0), real.long()),
        lambda implementation: torch.cat([generated(family, implementation, tokens[i : i + 1, real[i]], None) for i in range(len(real))]),
    )


TRIALS = {
    "steps": _steps,
    "chunks": _chunks,
    "left padding": _padded(left=True),
    "right padding": _padded(left=False),
    "packing": _packing,
    "generation": _generation,
}
ENCODERS_TOO = ("left padding", "right padding", "packing")


def judged(family: Family, call: Callable[[str], Tensor], right: Callable[[str], Tensor]) -> Outcome:
    """`call` of the linear model against `right` of the quadratic form; both take the name of an implementation."""
    got = attempt(lambda: call("linattn"))
    truth = attempt(lambda: right(reference.NAME))
    if isinstance(got, Tensor) and isinstance(truth, Tensor) and not differs(got, truth):
        return Outcome(RIGHT)
    if isinstance(got, Outcome) and got.status == REFUSED:
        return got
    softmax = family.softmax().config._attn_implementation
    same, of_softmax, right_of_softmax = (
        attempt(lambda: call(reference.NAME)), attempt(lambda: call(softmax)), attempt(lambda: right(softmax))
    )  # fmt: skip
    if isinstance(of_softmax, Outcome):
        return Outcome(SOFTMAX, f"softmax: {of_softmax.note}")
    if isinstance(got, Outcome):
        return got
    no_better = isinstance(right_of_softmax, Outcome) or differs(of_softmax, right_of_softmax)
    if isinstance(same, Tensor) and not differs(got, same):
        apart = "cannot be told" if isinstance(right_of_softmax, Outcome) else f"{distance(of_softmax, right_of_softmax):.1e}"
        return Outcome(SOFTMAX, f"softmax differs from what is right by {apart}") if no_better else Outcome(RIGHT)
    gaps = " or ".join(f"{distance(got, x):.1e}" for x in (truth, same) if isinstance(x, Tensor))
    return Outcome(WRONG, f"differs by {gaps} ({'softmax is no better' if no_better else 'softmax is right'})")


def run(family: Family, implementation: str, **inputs: Any) -> Tensor:
    """The model's answer to one call, without cache."""
    with computing(family, implementation) as model:
        return output_of(model(**inputs, **family.without_cache))


def alone(family: Family, implementation: str, text: Tensor) -> Tensor:
    """The answer to a text (B, N) with nothing beside it, at positions from 0."""
    positions = {"position_ids": torch.arange(text.shape[1]).expand(text.shape)} if family.takes("position_ids") else {}
    return run(family, implementation, input_ids=text, **positions)


def everything(family: Family, implementation: str, **inputs: Any) -> Tensor:
    """All numbers of one call's answer in a row."""
    with computing(family, implementation) as model:
        out = model(**inputs, **family.without_cache)
    return torch.cat([x.flatten() for x in _tensors(out if isinstance(out, tuple) else out.to_tuple()) if x.is_floating_point()])


@contextmanager
def computing(family: Family, implementation: str) -> Iterator[PreTrainedModel]:
    """The model under an implementation; while it lasts, the quadratic form has no windows. What is drawn is drawn alike."""
    with reference.windows_dropped() if implementation in reference.NAMES else nullcontext():
        model = family.model(implementation)
        torch.manual_seed(3)
        yield model


def cached(family: Family, implementation: str, tokens: Tensor, bounds: list[int]) -> Tensor:
    """The answers to a text given in parts, over the cache that the model makes itself."""
    past, answers = None, []
    with computing(family, implementation) as model:
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            out = model(input_ids=tokens[:, begin:end], past_key_values=past, use_cache=True)
            past = out.past_key_values
            answers.append(output_of(out))
    return torch.cat(answers, 1)


def generated(family: Family, implementation: str, tokens: Tensor, mask: Tensor | None) -> Tensor:
    with computing(family, implementation) as model:
        out = model.generate(
            tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True,
            eos_token_id=None, pad_token_id=0, num_beams=1,
        )  # fmt: skip
    return torch.stack(out.logits, 1)


def output_of(out: Any) -> Tensor:
    for name in ("logits", "last_hidden_state", "prediction_logits"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    return next(x for x in _tensors(out if isinstance(out, tuple) else out.to_tuple()) if x.is_floating_point())


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def attempt(call: Callable[[], Tensor]) -> Tensor | Outcome:
    """The result, or what stopped it: a refusal of the plugin, or an error."""
    try:
        return call()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = isinstance(error, ValueError) and where[-1].filename.startswith(PLUGIN) and not where[-1].filename.startswith(OPERATOR)
        return Outcome(REFUSED if ours else ERROR, _first_line(error) if ours else f"{type(error).__name__}: {_first_line(error)}")


def reason_of(case: Case, error: Exception) -> str:
    """Why a model could not be made or fed, in words."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    package = re.search(r"requires the (\w+) library", " ".join(said))
    if package:
        return f"needs the package {package[1]}"
    if case.model_type in REASONS:
        return REASONS[case.model_type]
    if CONFIG_MAPPING[case.model_type].sub_configs:
        return "made of several parts, and wants more than a text; the parts have rows of their own"
    return f"not made tiny, or no input found for it: {said[-1]}"


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, over the largest value where that is above 1."""
    if a.shape != b.shape:
        return float("inf")
    scale = max(1.0, b.abs().max().item())
    gap = ((a - b).abs() / scale).max().item()
    return float("inf") if gap != gap else gap


def differs(a: Tensor, b: Tensor) -> bool:
    return distance(a, b) > TOLERANCE


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
