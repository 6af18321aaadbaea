"""The operators, given what a polynomial attends with: queries and keys are projected or mapped to features, values weighed by a gate,
and what comes out has its norm and its gate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops import linear_attention, reference
from ..ops.beside import quotient
from ..ops.functional import noisy
from ..ops.step import step_by
from ..ops.weights import Weights, weights_of
from . import feature_map, input_gate, output_map, projection
from .form import Call, Numbers
from .kept import once

PER_TOKEN = ("log_decay", input_gate.NAME)
"""Numbers that each token may have of its own."""


def per_token(numbers: Numbers) -> dict[str, Tensor]:
    """The numbers that each token has of its own, (B, Hk, N) each: what is kept of a token beside its key and value."""
    return {name: numbers[name] for name in PER_TOKEN if isinstance(numbers.get(name), Tensor) and numbers[name].dim() == 3}


def attention(call: Call, numbers: Numbers, late: int = 0, **options: Any) -> tuple[Tensor, Any]:
    """The output of `linear_attention`, (B, Hq, N, Dv), and the state where `options` ask for it, else None.

    With `late` it is that of a lag of so many tokens, but of those tokens alone that see something: (B, Hq, N - late, Dv).

    Raises:
        ValueError: as `linear_attention`; noise of the kind "moment" beside an input gate.
    """
    gated = input_gate.NAME in numbers
    if gated and call.noise and call.noise["dropout_kind"] != "paper":
        raise ValueError('linattn option dropout_kind="moment" knows of no input gate; give input_gate="none", or dropout_kind="paper".')
    given, rest = _given(call, numbers)
    if late:
        given, rest = _shifted(given, rest, min(late, call.query.shape[2]))
    noise = {} if gated else call.noise  # of the quotient, not of its two parts
    result: Any = linear_attention(
        given.query, given.key, given.value, causal=call.causal, segment_ids=call.segments, **rest, **noise, **options
    )
    out, state = result if options.get("return_state") else (result, None)
    if gated:
        out = quotient(out)
        out = noisy(out, call.noise["dropout_p"]) if call.noise else out
    return output_map.mapped(out, numbers), state


def attention_step(call: Call, numbers: Numbers, sums: Tensor) -> Tensor:
    """`linear_attention_step`: `sums` is moved on in place."""
    given, rest = _given(call, numbers)
    decay = rest.get("log_decay")
    own = decay if isinstance(decay, Tensor) and decay.dim() == 3 else None
    weights = once(call.made, ("weights", call.scaling, call.query.dtype), lambda: _weights(given, rest, own is None))
    out = step_by(weights, given.query, given.key, given.value, sums, own, call.segments)
    return output_map.mapped(quotient(out) if input_gate.NAME in numbers else out, numbers)


def attention_reference(call: Call, numbers: Numbers, **options: Any) -> Tensor:
    """`reference`, in the dtype of the call."""
    given, rest = _given(call, numbers)
    out = reference(given.query, given.key, given.value, causal=call.causal, segment_ids=call.segments, **rest, **options)
    return output_map.mapped(quotient(out) if input_gate.NAME in numbers else out, numbers)


def _weights(call: Call, numbers: Numbers, decays: bool) -> Weights:
    """Of all tokens, with the decay where it is the same for all."""
    f = {name: numbers[name] for name in ("a", "b", "c", "temperature", "normalize_qk")}
    return weights_of(call.query, call.key, **f, log_decay=numbers.get("log_decay") if decays else None)


def _given(call: Call, numbers: Numbers) -> tuple[Call, Numbers]:
    return input_gate.weighed(*feature_map.mapped(*projection.projected(call, output_map.without(numbers))))


def _shifted(call: Call, numbers: Numbers, late: int) -> tuple[Call, Numbers]:
    """Queries without the first `late` tokens and keys without the last; the decay between is a factor a row, which normalising cancels."""
    kept = call.query.shape[2] - late
    query, key, value = call.query[:, :, late:], call.key[:, :, :kept], call.value[:, :, :kept]
    own = {name: number[:, :, :kept] for name, number in per_token(numbers).items()}
    return call._replace(query=query, key=key, value=value), numbers | own
