"""The whole of each attention in ten lines: quadratic, any dtype, any device. Every other form is held against it."""

import torch
from torch import Tensor

from .unit import unit


def reference(query: Tensor, key: Tensor, value: Tensor, a=1.0, b=1.0, c=0.0, *, causal=True, normalize_qk=True, temperature=1.0,
              log_decay: Tensor | None = None, lag: int = 0, segment_ids: Tensor | None = None) -> Tensor:  # fmt: skip
    """Normalised attention with weights f(s) = a + b s + c s^2, by the matrix of all pairs.

    Shapes: query (B, Hq, N, D), key (B, Hk, N, D), value (B, Hk, N, Dv), result (B, Hq, N, Dv); a, b, c and temperature
    a number or (Hq,); log_decay None, (H,) or (B, H, N) with H one of Hk, Hq; segment_ids (B, N), 0 for padding,
    which is neither seen nor counted by the decay.
    """
    heads, n = query.shape[1], query.shape[2]
    per_query_head = lambda x: x.repeat_interleave(heads // x.shape[-3], -3)  # noqa: E731
    column = lambda x: x.to(query)[:, None, None] if isinstance(x, Tensor) else x  # noqa: E731
    q, k, v = unit(query) if normalize_qk else query, per_query_head(unit(key) if normalize_qk else key), per_query_head(value)
    s = column(temperature) * (q @ k.mT)  # (B, Hq, N, N)
    weights = column(a) + column(b) * s + column(c) * s * s
    steps = torch.arange(n, device=query.device)
    visible = steps <= steps[:, None] - lag if causal else torch.ones(n, n, dtype=torch.bool, device=query.device)
    if segment_ids is not None:
        same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, :, None]
        visible = visible & same[:, None]
    if log_decay is not None:
        rate = log_decay[None, :, None].expand(len(query), -1, n) if log_decay.dim() == 1 else log_decay
        if segment_ids is not None:
            rate = rate.masked_fill((segment_ids == 0)[:, None], 0)  # padding takes no time
        total = per_query_head(rate.to(query).cumsum(-1)[..., None])  # G (B, Hq, N, 1)
        span = (total - total.mT).abs()
        if lag and n:  # normalising cancels what the nearest key that is seen lies back, by which all weights would round to 0
            span = (span - span.masked_fill(~visible, torch.inf).amin(-1, keepdim=True)).clamp(min=0)
        weights = weights * (-span).exp()
    weights = weights.masked_fill(~visible, 0)
    mass = weights.sum(-1, keepdim=True)  # g
    return weights @ v / mass.masked_fill(mass == 0, 1)


def window_reference(query: Tensor, key: Tensor, value: Tensor, *, window: int, sinks: int = 0, scaling: float | None = None,
                     segment_ids: Tensor | None = None) -> Tensor:  # fmt: skip
    """Softmax attention of each token over the last `window` tokens of its sequence and the first `sinks`, by the matrix of all pairs."""
    n, per_query_head = query.shape[2], lambda x: x.repeat_interleave(query.shape[1] // x.shape[1], 1)
    scores = (query.shape[-1] ** -0.5 if scaling is None else scaling) * (query @ per_query_head(key).mT)  # (B, Hq, N, N)
    ids = torch.ones(1, n, dtype=torch.int32, device=query.device) if segment_ids is None else segment_ids.int()
    same = ((ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, :, None]).tril()
    number = same.sum(-1) - 1  # the place of each token in its own sequence
    visible = same & ((number[:, None, :] > number[:, :, None] - window) | (number[:, None, :] < sinks))
    least = torch.finfo(scores.dtype).min  # not -inf: a row of padding sees nothing
    weights = scores.masked_fill(~visible[:, None], least).softmax(-1).masked_fill(~visible[:, None], 0)
    return weights @ per_query_head(value)
