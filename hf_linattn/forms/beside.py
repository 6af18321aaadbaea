"""A polynomial's numbers as the step of a window takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.constants import constant
from ..ops.precision import exact
from ..ops.weights import weights_of
from ..ops.window_token import Beside
from . import feature_map, input_gate, output_map, projection
from .form import Call, Numbers
from .kept import once

OF_TOKENS = {"gate": "gate", "log_decay": "log_decay", "log_input_gate": input_gate.NAME, "output_gate": output_map.GATE}
"""What each token may have of its own: the name it has there, and its name among a layer's numbers."""


def beside_of(call: Call, numbers: Numbers, sums: Tensor) -> Beside:
    """What lies beside a window at one new token, `call`."""
    own = {name: numbers[given] for name, given in OF_TOKENS.items() if _is_own(numbers.get(given))}
    same = once(call.made, ("beside", call.scaling, call.query.dtype), lambda: _of_layer(call, numbers))
    return same._replace(state=sums, **own)


def _is_own(number: Any) -> bool:
    """Whether each token has one."""
    return isinstance(number, Tensor) and number.dim() == 3


def _of_layer(call: Call, numbers: Numbers) -> Beside:
    """All that is the same for all tokens."""
    given = {name: number for name, number in numbers.items() if not _is_own(number) or name not in OF_TOKENS.values()}
    of_query, of_key, center = _matrices(call.query.dtype, numbers)
    is_map = feature_map.QUERY in numbers
    f = given | (feature_map.WEIGHTS if is_map else {})
    named = {name: f[name] for name in ("a", "b", "c", "temperature", "normalize_qk")}
    weights = weights_of(call.query, call.key, **named, log_decay=given.get("log_decay"))
    return Beside(
        gate=_gate(given["gate"], call.query) if "gate" in given else None,
        coefficients=weights.coefficients, log_decay=weights.log_decay, log_input_gate=given.get(input_gate.NAME),
        query_matrix=of_query, key_matrix=of_key, key_center=center,
        output_power=given.get(output_map.POWER), output_log_scale=given.get(output_map.LOG_SCALE), output_gate=given.get(output_map.GATE),
        degree=weights.degree, normalize_qk=weights.normalize_qk, is_map=is_map,
    )  # fmt: skip


def _matrices(dtype: torch.dtype, numbers: Numbers) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of queries and of keys, and the centre of keys."""
    if feature_map.QUERY in numbers:
        return (*feature_map.matrices_in(dtype, numbers), None)
    return projection.matrices_in(dtype, numbers) if projection.QUERY in numbers else (None, None, None)


def _gate(share: float | Tensor, query: Tensor) -> Tensor:
    """The window's share of each query head, (Hq,)."""
    if isinstance(share, Tensor):
        return share
    dtype = exact(query.dtype)
    make = lambda: torch.full(query.shape[1:2], share, dtype=dtype, device=query.device)  # noqa: E731
    return make() if torch.compiler.is_compiling() else constant(("gate", share, query.shape[1], dtype, query.device), make)
