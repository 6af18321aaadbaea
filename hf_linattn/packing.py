"""Where packed sequences begin, as positions and `cu_seq_lens` tell it, and what the operator is given."""

from __future__ import annotations

import torch
from torch import Tensor

from .values import remember


def sequence_starts(real: Tensor | None, position_ids: Tensor | None, cu_seq_lens: Tensor | None, length: int) -> Tensor | None:
    """Where a packed sequence begins behind another, bool (B or 1, length); None where nothing is packed.

    A position below that of the token before begins a sequence. One further up is a gap, and an equal one a group of tokens that
    share a position (but for a sequence of one token): neither ends a sequence. Padding is passed over.
    """
    if length == 1:
        return None
    if cu_seq_lens is not None:
        return remember(cu_seq_lens, "starts", (length,), lambda: _starts_from_bounds(cu_seq_lens, length), none_if_false=True)
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[-1] != length:
        return None
    return remember(position_ids, "starts", (real,), lambda: _starts_from_positions(position_ids, real), none_if_false=True)


def _starts_from_bounds(bounds: Tensor, length: int) -> Tensor:
    starts = torch.zeros(length + 1, dtype=torch.bool, device=bounds.device)
    starts = starts.index_fill(0, bounds.long(), True)
    return torch.cat([torch.zeros_like(starts[:1]), starts[1:length]])[None]


def _starts_from_positions(positions: Tensor, real: Tensor | None) -> Tensor:
    if real is None:
        before = torch.cat([positions[:, :1] - 1, positions[:, :-1]], -1)
    else:
        positions, real = torch.broadcast_tensors(positions, real)
        column = previous_token(real)
        before = torch.where(column < 0, positions - 1, positions.gather(-1, column.clamp(min=0)))
    # A 0 behind a 0 is a sequence of one token before the next; where positions above 0 repeat as well, they are groups.
    repeats = positions == before
    if real is not None:
        repeats = repeats & real
    are_groups = (repeats & (positions > 0)).any(-1, keepdim=True) | ~(positions > 0).any(-1, keepdim=True)
    starts = (positions < before) | (repeats & ~are_groups)
    return starts if real is None else starts & real


def previous_token(real: Tensor) -> Tensor:
    """The column of the last real token before each column, int64 (B, N); -1 where there is none. `real` is bool (B, N)."""
    columns = torch.arange(real.shape[-1], device=real.device).expand(real.shape)
    last = torch.where(real, columns, -1).cummax(-1).values
    return torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], -1)


def segment_ids(real: Tensor | None, starts: Tensor | None, batch: int) -> Tensor | None:
    """What `linear_attention` takes: None, the real tokens, or int32 (B, N), 0 at padding and n in the n-th sequence."""
    if starts is None:
        return None if real is None else real.expand(batch, -1)
    ids = (1 + starts.cumsum(-1, dtype=torch.int32)).expand(batch, -1)
    return ids if real is None else ids * real
