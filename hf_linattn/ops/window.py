"""Softmax over the last W tokens and the first S of a sequence, in time and memory linear in N.

W queries at a time meet the W keys before them, their own W and the S sinks, in one call of PyTorch's scaled_dot_product_attention: no mask
is larger than N (2 W + S). Query heads that share a key head are rows of one batch, so that keys are not repeated for them. On keys
kept from call to call see `ring`, on padding and packed sequences `frame`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import checks
from .frame import Frame
from .functional import _autocast
from .ring import Ring

# Without cuDNN: its gradients went wrong where the incoming gradient lies in memory otherwise than the output does (torch 2.11, H200).
TRUSTED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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
    query, key, value = _autocast(query, key, value)
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
    batch, heads, length, _ = query.shape
    size = min(frame.window, length)
    count = -(-length // size)
    rest = count * size - length
    groups = heads // frame.key.shape[1]
    mask = _visible(frame, size, count, rest)
    # one mask for all sequences: blocks are the batch, and sequences are heads; else blocks of sequences are the batch
    is_common = mask.shape[0] == 1
    place = (lambda x: x.movedim(2, 0)) if is_common else (lambda x: x.transpose(1, 2))  # of (B, heads, blocks, ...)
    rows = F.pad(query, (0, 0, 0, rest)).unflatten(2, (count, size)).unflatten(1, (-1, groups)).transpose(2, 3)
    columns = torch.arange(count, device=query.device) * size + max(frame.front - 1, 0)
    keys, values = (
        torch.cat([place(part) for part in (sink, *_blocks(F.pad(x, (0, 0, 0, rest)), 2, size, count))], 3)
        for sink, x in zip(frame.sinks_of(columns), (frame.key, frame.value), strict=True)
    )
    fold = (lambda x: x.flatten(1, 2)) if is_common else (lambda x: x.flatten(0, 1))
    mask = mask.repeat(1, 1, groups, 1).flatten(0, 1)[:, None]
    out = sdpa(fold(place(rows).flatten(3, 4)), fold(keys), fold(values), mask, scaling)
    out = out.unflatten(1, (batch, -1)).transpose(0, 1) if is_common else out.unflatten(0, (batch, -1))
    out = out.unflatten(3, (groups, size)).permute(0, 1, 4, 2, 3, 5)  # (B, blocks, W, Hk, r, Dv), as Transformers wants it in memory
    return out.reshape(batch, count * size, heads, -1)[:, :length].transpose(1, 2)


def _blocks(x: Tensor, dim: int, size: int, count: int) -> list[Tensor]:
    """Dimension `dim` as `count` blocks of `size`, and the block ahead of each in front; as it is where there is one."""
    if count == 1:
        return [x.unsqueeze(dim)]
    blocks = x.unflatten(dim, (count + 1, size))
    return [blocks.narrow(dim, 0, count), blocks.narrow(dim, 1, count)]


def step(query: Tensor, ring: Ring, scaling: float | None, real: Tensor | None = None) -> Tensor:
    """(B, Hq, 1, Dv) for the query (B, Hq, 1, D) of the token that the ring took in last; 0 where `real`, bool (B, 1), is False."""
    heads = ring.key.shape[1]
    rows = query.unflatten(1, (heads, -1)).flatten(2, 3)
    if real is not None:
        rows = rows.masked_fill(~real[:, :, None, None], 0)
    out = sdpa(rows, ring.key, ring.value, ring.visible()[:, None, None], scaling).reshape(*query.shape[:3], -1)
    return out if real is None else out.masked_fill(~real[:, :, None, None], 0)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """scaled_dot_product_attention by the kernels whose gradients are trusted."""
    with sdpa_kernel(TRUSTED) if query.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def _visible(frame: Frame, size: int, count: int, rest: int) -> Tensor:
    """Which of its S sinks and `front + size` keys each query sees, bool (1 or B, blocks, size, S + front + size); itself always."""
    front, window, device = frame.front, frame.window, frame.key.device
    first = (torch.arange(count, device=device) * size)[:, None, None]
    rows, columns = first + torch.arange(size, device=device)[:, None], first + torch.arange(front + size, device=device) - front
    near = (columns <= rows) & (columns > rows - window)
    sinks = torch.arange(frame.sinks, device=device)
    if frame.runs is None:
        return torch.cat([sinks <= rows - window, near & (columns >= 0)], -1)[None]
    runs = F.pad(frame.runs, (0, rest))
    row_runs = runs[:, front:].unflatten(1, (count, size))[..., None]
    is_token = row_runs > 0
    # where a query's sequence began before its window, it did so before its block: the last column before the block belongs to it
    lead = runs[:, first + max(front - 1, 0)]
    number = F.pad(frame.number[:, front:], (0, rest)).unflatten(1, (count, size))[..., None]
    far = (sinks <= number - window) & (row_runs == lead) & is_token
    same = (row_runs == torch.cat(_blocks(runs, 1, size, count), -1)[:, :, None]) & is_token
    return torch.cat([far, (near & same) | (columns == rows)], -1)
