"""Packed sequences and padding, in the one form that every kernel reads, as the operator `linattn::runs`.

On a CUDA device that is one kernel (`runs_cuda`), anywhere else the dozen operators of PyTorch below, which a GPU is no sooner done with
than with a small call's attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import runs_cuda
from .checks import values_are_readable
from .operators import reach_kernels

_library = torch.library.Library("linattn", "FRAGMENT")
_library.define("runs(Tensor segment_ids) -> Tensor")


def canonical_segments(segment_ids: Tensor, batch: int, length: int) -> Tensor:
    """(B, N) int32 of runs: |id| >= 1 never falls along a row, positive for a token, negative for padding inside its run.

    Padding takes the run it lies in, and the run to come where a row begins with it, so that a state survives padding on either side.
    """
    check_segments(segment_ids, batch, length)
    return runs_of(segment_ids)


def runs_of(segment_ids: Tensor) -> Tensor:
    """`canonical_segments` of what was checked."""
    if not reach_kernels(segment_ids.device.type, (segment_ids,)):
        return torch.ops.linattn.runs(segment_ids)
    return _KERNELS[segment_ids.device.type](segment_ids)


def check_segments(segment_ids: Tensor, batch: int, length: int) -> None:
    """Raises ValueError or TypeError where these are no segments of so many tokens."""
    if not isinstance(segment_ids, Tensor) or tuple(segment_ids.shape) != (batch, length):
        shape = tuple(segment_ids.shape) if isinstance(segment_ids, Tensor) else type(segment_ids).__name__
        raise ValueError(f"segment_ids must be a tensor of shape ({batch}, {length}), one a token, not {shape}.")
    if segment_ids.is_floating_point() or segment_ids.is_complex():
        raise TypeError(f"segment_ids must be integers (0 for padding) or bool (False for padding), not {segment_ids.dtype}.")
    if values_are_readable(segment_ids):
        _check_values(segment_ids)


def _check_values(ids: Tensor) -> None:
    ids = ids.to(torch.int64)
    if bool((ids > torch.iinfo(torch.int32).max).any()):
        raise ValueError("segment_ids must be below 2**31: number the segments of a row from 1 on.")
    if bool(((ids > 0) & (ids < _highest(ids))).any() | (ids < 0).any()):
        raise ValueError("segment_ids must be 0 for padding and, apart from zeros, never fall along a row.")


def _highest(ids: Tensor) -> Tensor:
    """Of the tokens up to each one, 0 where there is none."""
    return ids.clamp(min=0).cummax(-1).values


def by_operators(segment_ids: Tensor) -> Tensor:
    """The same in PyTorch, on any device."""
    if segment_ids.dtype == torch.bool or segment_ids.shape[-1] == 0:
        return torch.where(segment_ids > 0, 1, -1).to(torch.int32).contiguous()
    ids = segment_ids.to(torch.int32)
    is_token, last = ids > 0, torch.iinfo(torch.int32).max
    first = ids.masked_fill(~is_token, last).amin(-1, keepdim=True)
    run = torch.maximum(_highest(ids), torch.where(first == last, 1, first))
    return torch.where(is_token, run, -run).contiguous()


def _compiled(segment_ids: Tensor) -> Tensor:
    return runs_cuda.runs(segment_ids) if runs_cuda.takes_segments(segment_ids) else by_operators(segment_ids)


_KERNELS = {"cpu": by_operators, "cuda": _compiled}
_library.impl("runs", by_operators, "CompositeExplicitAutograd")
_library.impl("runs", _compiled, "CUDA")


@torch.library.register_fake("linattn::runs")
def _runs_fake(segment_ids: Tensor) -> Tensor:
    return segment_ids.new_empty(segment_ids.shape, dtype=torch.int32)


def reversed_segments(segments: Tensor) -> Tensor:
    """The same runs read from the end of the row: they rise there too."""
    highest = segments.abs().amax(-1, keepdim=True)
    return ((highest + 1 - segments.abs()) * segments.sign()).flip(-1)
