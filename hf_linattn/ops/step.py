"""linear_attention_step: what a user calls for a few new tokens a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, operators
from .call import Call
from .decay import canonical_decay, without_padding
from .functional import cast_for_autocast
from .segments import canonical_segments
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
    """1 to 16 new tokens a sequence: `state` is updated in place, and what `linear_attention` would give at these tokens is returned.

    Args:
        query, key, value: (B, Hq, N, D), (B, Hk, N, D), (B, Hk, N, Dv).
        state: float32 (B, Hs, F, Dv + 1), from `linear_attention(..., return_state=True)` or `empty_state`; changed in place.
        a, b, c, normalize_qk, temperature: as in `linear_attention`.
        log_decay: None, (H,) or (B, H, N).
        segment_ids: (B, N), as in `linear_attention`: where 0 or False there is no new token, the state stays and the output is 0.

    Returns:
        (B, Hq, N, Dv) in query's dtype. Not differentiable: train with `linear_attention`.

    Raises:
        ValueError, TypeError: as `linear_attention`, and ValueError where N is above 16.
    """
    query, key, value = cast_for_autocast(query, key, value)
    checks.check_tensors(query, key, value, 0, True, True)
    per_token = log_decay if isinstance(log_decay, Tensor) and log_decay.dim() == 3 else None
    weights = weights_of(query, key, a, b, c, temperature, normalize_qk, None if per_token is not None else log_decay)
    return step_by(weights, query, key, value, state, per_token, segment_ids)


def step_by(weights: Weights, query: Tensor, key: Tensor, value: Tensor, state: Tensor, log_decay: Tensor | None = None,
            segment_ids: Tensor | None = None) -> Tensor:  # fmt: skip
    """`linear_attention_step` by weights that were made before; `log_decay` (B, H, N) where each token has its own."""
    query, key, value = cast_for_autocast(query, key, value)
    decay = weights.log_decay if log_decay is None else canonical_decay(log_decay, query, key)
    segments = None
    if segment_ids is not None:
        is_mask = isinstance(segment_ids, Tensor) and segment_ids.dtype == torch.bool and segment_ids.shape == (query.shape[0], 1)
        segments = segment_ids.to(torch.int32) if is_mask else canonical_segments(segment_ids, query.shape[0], key.shape[2])
        checks.check_device("segment_ids", segments, query)
        if decay is not None and query.shape[2] > 1:
            decay = without_padding(decay, segments)
    f, degree, normalize_qk, _ = weights
    call = Call(query, key, value, f, decay, segments, segments, degree=degree, normalize_qk=normalize_qk)
    return operators.step(call, state)
