"""W queries at a time against the keys that they see: the window, block by block, in plain PyTorch.

Blocks of all sequences are one batch for PyTorch's scaled_dot_product_attention, and the query heads that share a key head are rows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .constants import constant
from .folds import columns_of_blocks, rows_of_blocks
from .frame import Frame

# Without cuDNN: a training went wrong with it where the incoming gradient lay in memory otherwise than the output (torch 2.11, H200); that
# was not looked into further.
TRUSTED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ALIGNED = 16
"""Numbers that a row of a bias must be a multiple of: SDPA's kernels would copy it into such rows in every call."""

_of_sizes: dict[Any, Tensor] = {}  # masks and indices, which the layers of a model share


@dataclass(frozen=True)
class Cut:
    """N queries in `count` blocks of `size`: W of them, or all N where there are no more."""

    size: int
    count: int
    length: int

    @classmethod
    def of(cls, frame: Frame) -> Cut:
        size = min(frame.window, frame.length)
        return cls(size, -(-frame.length // size), frame.length)

    @property
    def rest(self) -> int:
        """Queries that the last block is short of."""
        return self.count * self.size - self.length


def attend(query: Tensor, frame: Frame, scaling: float | None, keep: bool = True) -> Tensor:
    """(B, Hq, N, Dv) for queries (B, Hq, N, D) that lie as the frame's new tokens do; `keep` as in `attend_by_block`."""
    out = attend_by_block(query, frame, scaling, keep).permute(0, 1, 4, 2, 3, 5)  # as Transformers wants it in memory
    return out.flatten(3, 4).flatten(1, 2)[:, : frame.length].transpose(1, 2)


def attend_by_block(query: Tensor, frame: Frame, scaling: float | None, keep: bool = True) -> Tensor:
    """The same block by block, (B, count, Hk, groups, size, Dv), the last one filled up with queries that are not there.

    Args:
        keep: whether masks and indices that depend on sizes alone may be kept for later calls.
    """
    cut = Cut.of(frame)
    batch, heads = query.shape[:2]
    groups = heads // frame.key.shape[1]
    rows = rows_of_blocks(F.pad(query, (0, 0, 0, cut.rest)) if cut.rest else query, cut.size, groups)
    if frame.runs is None:
        make = lambda: _bias(_visible(frame, cut), batch, groups, query.dtype)  # noqa: E731
        signature = ("bias", cut, frame.window, frame.sinks, batch, groups, query.dtype, query.device)
        bias = _kept(signature, make) if keep else make()
        keys, values = _columns(frame, cut, keep)
    else:
        bias = _bias(_visible_in_runs(frame, cut), batch, groups, query.dtype)
        keys, values = _columns_in_runs(frame, cut, keep)
    return sdpa(rows, keys, values, bias, scaling).unflatten(2, (groups, cut.size)).unflatten(0, (batch, cut.count))


def _columns(frame: Frame, cut: Cut, keep: bool) -> tuple[Tensor, Tensor]:
    """The keys (B count, Hk, S + 2 W, D) that each block sees, and their values."""
    if cut.count == 1:
        return frame.key, frame.value
    sinks = _seen_sinks(frame, cut)
    index = _index(frame, cut, sinks, keep)
    keys, values = (columns_of_blocks(x, index, cut.size, sinks) for x in (frame.key, frame.value))
    return keys, values


def _columns_in_runs(frame: Frame, cut: Cut, keep: bool) -> tuple[Tensor, Tensor]:
    """The same where each row of the batch has sinks of its own for each block."""
    blocks = torch.arange(cut.count, device=frame.key.device) * cut.size
    near = [frame.key, frame.value]
    if cut.count > 1:
        index = _index(frame, cut, 0, keep)
        near = [columns_of_blocks(x, index, cut.size, 0) for x in near]
    sinks = frame.sinks_of((blocks + frame.front - 1).clamp(min=0))
    keys, values = (torch.cat([sink.transpose(1, 2).flatten(0, 1), x], 2) for sink, x in zip(sinks, near, strict=True))
    return keys, values


def _index(frame: Frame, cut: Cut, sinks: int, keep: bool) -> Tensor:
    """The columns of the frame that each block sees, (count (S + 2 W),): some that are there in place of those that are not."""
    device, columns = frame.key.device, frame.key.shape[2]

    def make() -> Tensor:
        near = torch.arange(cut.count, device=device)[:, None] * cut.size + torch.arange(-cut.size, cut.size, device=device) + frame.front
        first = torch.arange(sinks, device=device).expand(cut.count, -1)
        return torch.cat([first, near.clamp(0, columns - 1)], 1).flatten()

    return _kept(("index", cut, sinks, frame.front, columns, device), make) if keep else make()


def _kept(signature: Any, make: Callable[[], Tensor]) -> Tensor:
    """Of few models and lengths at a time, for long texts have large masks."""
    return constant(signature, make, _of_sizes, 8)


def _seen_sinks(frame: Frame, cut: Cut) -> int:
    """How many sinks any query sees: those that lie before the last one's window."""
    return min(frame.sinks, cut.length - cut.size)


def _bias(visible: Tensor, batch: int, groups: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, (B count, 1, groups size, columns), of bool (1 or B, count, size, columns)."""
    _, count, size, columns = visible.shape
    width = -(-columns // ALIGNED) * ALIGNED
    bias = torch.zeros(batch, count, groups, size, width, dtype=dtype, device=visible.device)
    bias[..., :columns].masked_fill_(~visible[:, :, None], -torch.inf)
    return bias.view(batch * count, 1, groups * size, width)[..., :columns]


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """scaled_dot_product_attention by the kernels whose gradients are trusted."""
    if torch.compiler.is_compiling():
        with sdpa_kernel(TRUSTED) if query.is_cuda else nullcontext():
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    was_enabled = query.is_cuda and torch.backends.cuda.cudnn_sdp_enabled()
    if was_enabled:  # by hand, for the context takes longer than all else here
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    finally:
        if was_enabled:
            torch.backends.cuda.enable_cudnn_sdp(True)


def _near(cut: Cut, window: int, front: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """By their number among the new tokens, the queries of each block (count, size, 1), and which columns lie in their windows."""
    first = (torch.arange(cut.count, device=device) * cut.size)[:, None, None]
    rows = first + torch.arange(cut.size, device=device)[:, None]
    ahead = front if cut.count == 1 else cut.size  # columns of a block that lie before its queries
    columns = first + torch.arange(-ahead, cut.size, device=device)
    return rows, (columns <= rows) & (columns > rows - window) & (columns >= -front)


def _visible(frame: Frame, cut: Cut) -> Tensor:
    """Which of its columns each query sees, bool (1, count, size, S + 2 W); itself always."""
    rows, near = _near(cut, frame.window, frame.front, frame.key.device)
    sinks = torch.arange(_seen_sinks(frame, cut), device=frame.key.device)
    return torch.cat([sinks <= rows - frame.window, near], -1)[None]


def _visible_in_runs(frame: Frame, cut: Cut) -> Tensor:
    """The same of columns that hold several sequences, or none: bool (B, count, size, S + columns)."""
    assert frame.runs is not None and frame.number is not None
    front, window, device = frame.front, frame.window, frame.key.device
    rows, near = _near(cut, window, front, device)
    runs = frame.runs
    cut_up = lambda x: F.pad(x[:, front:], (0, cut.rest)).unflatten(1, (cut.count, cut.size))[..., None]  # noqa: E731
    row_runs, number = cut_up(runs), cut_up(frame.number)
    is_token = row_runs > 0
    # where a query's sequence began before its window, it did so before its block: the last column before the block belongs to it
    lead = runs[:, (rows[:, 0] + front - 1).clamp(min=0)][..., None]
    sinks = torch.arange(frame.sinks, device=device)
    far = (sinks <= number - window) & (row_runs == lead) & is_token
    column_runs = runs[:, None] if cut.count == 1 else runs.index_select(1, _index(frame, cut, 0, False)).unflatten(1, (cut.count, -1))
    columns = near.shape[-1] - cut.size
    itself = torch.eye(cut.size, dtype=torch.bool, device=device)
    same = (row_runs == column_runs[:, :, None]) & is_token & near
    return torch.cat([far, same | F.pad(itself, (columns, 0))], -1)
