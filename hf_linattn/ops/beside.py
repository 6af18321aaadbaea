"""What the linear attention beside a window does to vectors before and behind its sums, and so does linear attention that stands alone.

`forms` says what each is for: `projection`, `feature_map`, `input_gate`, `output_map`.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 2.0**-24
"""Of a feature: the least above 0 that float16 holds. Without it a query whose features lie where all keys have none would see nothing."""
SMALLEST = 1e-6
"""What the mean square of an output is taken to be more by, so that a token that sees nothing keeps its output of 0."""


def of_each_head(x: Tensor, matrices: Tensor) -> Tensor:
    """(B, H, N, D) by (H, D, r): all sequences of a head are rows of one product, where matmul would copy the matrices for each of them."""
    if x.shape[0] == 1:  # a token of one sequence needs none of these views
        return x @ matrices
    rows = x.transpose(0, 1)
    return (rows.flatten(1, 2) @ matrices).unflatten(1, rows.shape[1:3]).transpose(0, 1)


def softmax_features(x: Tensor, matrices: Tensor) -> Tensor:
    """softmax([x W, -x W]) of (B, H, N, D): (B, H, N, 2 D), in the dtype of `x` but from a softmax of at least float32."""
    y = of_each_head(x, matrices)
    exact = torch.float64 if y.dtype == torch.float64 else torch.float32
    return torch.cat([y, -y], -1).softmax(-1, dtype=exact).clamp(min=LEAST).to(x.dtype)


def weighed(value: Tensor, log_gate: Tensor) -> Tensor:
    """(e^u v, e^u), (B, Hk, N, Dv + 1), of u (Hk,) or (B, Hk, N)."""
    log_gate = log_gate.to(torch.float64 if value.dtype == torch.float64 else torch.float32)
    gate = (log_gate if log_gate.dim() == 3 else log_gate[:, None]).exp()[..., None].to(value.dtype)
    return torch.cat([value * gate, gate.expand(*value.shape[:3], 1)], -1)


def quotient(out: Tensor) -> Tensor:
    """(B, Hq, N, Dv) of what the operators give for such values, (B, Hq, N, Dv + 1): 0 for a token that sees nothing."""
    share = out[..., -1:]
    return out[..., :-1] / share.masked_fill(share == 0, 1)


def normed_and_gated(out: Tensor, power: Tensor | None, log_scale: Tensor | None, gate: Tensor | None) -> Tensor:
    """`out` (B, Hq, N, Dv) times exp(log_scale) / rms(out)^power, (Hq,) each, and times a gate, (Hq,) or (B, Hq, at least N), of which it
    has the last; computed in at least float32."""
    if power is None and gate is None:
        return out
    x = out if out.dtype == torch.float64 else out.float()
    if power is not None and log_scale is not None:
        power, log_scale = (number.to(x.dtype)[:, None, None] for number in (power, log_scale))
        x = x * torch.exp(log_scale - power / 2 * torch.log(x.square().mean(-1, keepdim=True) + SMALLEST))
    if gate is not None:
        share = gate.to(x.dtype)
        x = x * (share[:, None, None] if share.dim() == 1 else share[:, :, share.shape[2] - x.shape[2] :, None])
    return x.to(out.dtype)
