"""Softmax over the last W tokens and the first S of a sequence, in time and memory linear in N.

W queries at a time meet the W keys before them, their own W and the S sinks (`blocks`), in one call of PyTorch's
scaled_dot_product_attention: no mask has more than 2 W + S numbers for a token and query head of a group. On keys kept from call to call
see `ring`, on padding and packed sequences `frame`, on what lies before the window `mixing`, on what torch.compile sees `window_operator`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import blocks, checks
from .frame import Frame
from .functional import cast_for_autocast
from .mixing import MixedBlocks, mixed
from .ring import Ring
from .window_operator import traced


def window_attention(query: Tensor, key: Tensor, value: Tensor, *, window: int, sinks: int = 0, scaling: float | None = None,
                     segment_ids: Tensor | None = None) -> Tensor:  # fmt: skip
    """Causal softmax attention in which token i of a sequence sees the tokens j <= i with j > i - window or j < sinks.

    Tokens are counted from the first of their own sequence, and padding is not counted: a padded or packed sequence gives what it gives
    alone. Gradients reach query, key and value.

    Args:
        query: (B, Hq, N, D), float64, float32, bfloat16 or float16. Any strides.
        key: (B, Hk, N, D) with Hq a multiple of Hk.
        value: (B, Hk, N, Dv).
        window: W >= 1, the query's own token included.
        sinks: S >= 0.
        scaling: of the scores; D^-0.5 where it is None.
        segment_ids: as in `linear_attention`. The output at padding is 0, and nothing at padding, NaN included, reaches another row.

    Returns:
        (B, Hq, N, Dv) in query's dtype.

    Raises:
        ValueError: shapes, devices or values that do not fit. Values of CUDA tensors are not read, and so not checked.
        TypeError: wrong types or dtypes.
    """
    query, key, value = cast_for_autocast(query, key, value)
    checks.check_tensors(query, key, value, 0, True, False)
    check_window(window, sinks)
    if query.shape[2] == 0:
        return query[..., :1].expand(*query.shape[:3], value.shape[-1])
    frame = Frame.of(key, value, window=window, sinks=sinks, segment_ids=segment_ids)
    return frame.open(attend(frame.close(query), frame, scaling))


def check_window(window: int, sinks: int) -> None:
    for name, x, least in (("window", window, 1), ("sinks", sinks, 0)):
        if isinstance(x, bool) or not isinstance(x, int):
            raise TypeError(f"{name} must be a whole number of tokens, not {x!r}.")
        if x < least:
            raise ValueError(f"{name} must be at least {least}, but is {x}.")


def attend(query: Tensor, frame: Frame, scaling: float | None) -> Tensor:
    """(B, Hq, N, Dv) for queries (B, Hq, N, D) that lie as the frame's new tokens do."""
    return traced(query, frame, scaling) if torch.compiler.is_compiling() else blocks.attend(query, frame, scaling)


def attend_beside(query: Tensor, frame: Frame, scaling: float | None, far: Tensor, gate: float | Tensor) -> Tensor:
    """`attend`, mixed by a gate with what another attention gives for all before the window.

    Args:
        far: (B, Hq, N, Dv), or where the frame has no runs (B, Hq, M, Dv) of the tokens that have something before their windows.
        gate: the window's share, a number or (B or 1, Hq, N or 1, 1).
    """
    if torch.compiler.is_compiling():
        return mixed(traced(query, frame, scaling), far, gate, frame.has_before())
    near, length = blocks.attend_by_block(query, frame, scaling), frame.length
    share = gate if isinstance(gate, Tensor) else torch.full((1, 1, 1, 1), gate, device=query.device)
    has_before = None if frame.runs is None else frame.has_before()
    if rest := near.shape[1] * near.shape[4] - length:
        far = F.pad(far, (0, 0, 0, rest))
        share = share if share.shape[2] == 1 else F.pad(share, (0, 0, 0, rest))
        has_before = None if has_before is None else F.pad(has_before, (0, 0, 0, rest))
    out: Tensor = MixedBlocks.apply(near, far, share, has_before)
    return out[:, :, :length] if rest else out


def step(query: Tensor, ring: Ring, scaling: float | None, real: Tensor | None = None) -> Tensor:
    """(B, Hq, 1, Dv) for the query (B, Hq, 1, D) of the token that the ring took in last; 0 where `real`, bool (B, 1), is False."""
    heads = ring.key.shape[1]
    rows = query.unflatten(1, (heads, -1)).flatten(2, 3)
    if real is not None:
        rows = rows.masked_fill(~real[:, :, None, None], 0)
    out = blocks.sdpa(rows, ring.key, ring.value, ring.visible()[:, None, None], scaling).reshape(*query.shape[:3], ring.value.shape[-1])
    return out if real is None else out.masked_fill(~real[:, :, None, None], 0)
