"""linear_attention_step: what a user calls for one new token a sequence."""

from __future__ import annotations

from torch import Tensor

from . import checks, operators
from .functional import canonical, cast_for_autocast
from .weights import Coefficient, Weights, weights_of


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    a: Coefficient = 1.0,
    b: Coefficient = 1.0,
    c: Coefficient = 0.0,
    *,
    normalize_qk: bool = True,
    temperature: Coefficient = 1.0,
    log_decay: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """One new token a sequence: `state` is updated in place, and what `linear_attention` would give at this token is returned.

    Args:
        query, key, value: (B, Hq, 1, D), (B, Hk, 1, D), (B, Hk, 1, Dv).
        state: float32 (B, Hs, F, Dv + 1), from `linear_attention(..., return_state=True)` or `empty_state`; changed in place.
        a, b, c, normalize_qk, temperature: as in `linear_attention`.
        log_decay: None, (H,) or (B, H, 1).
        segment_ids: (B, 1); where 0 or False the sequence has no new token: its state stays and its output is 0.

    Returns:
        (B, Hq, 1, Dv) in query's dtype. Not differentiable: train with `linear_attention`.

    Raises:
        ValueError, TypeError: as `linear_attention`, and ValueError where N is not 1.
    """
    query, key, value = cast_for_autocast(query, key, value)
    checks.check_tensors(query, key, value, 0, True, True)
    weights = weights_of(query, a, b, c, temperature, normalize_qk)
    return step_by(weights, query, key, value, state, log_decay, segment_ids)


def step_by(weights: Weights, query: Tensor, key: Tensor, value: Tensor, state: Tensor, log_decay: Tensor | None = None,
            segment_ids: Tensor | None = None) -> Tensor:  # fmt: skip
    """`linear_attention_step` by weights that were made before."""
    query, key, value = cast_for_autocast(query, key, value)
    checks.check_tensors(query, key, value, 0, True, True)
    if query.shape[2] != 1:
        raise ValueError(f"linear_attention_step takes one token a call, not {query.shape[2]}: use linear_attention for more.")
    call = canonical(query, key, value, weights.coefficients, log_decay, segment_ids, None, weights.degree, True, weights.normalize_qk)
    checks.check_state(state, call.state_shape, call.dtype)
    return operators.step(call, state)
