"""Packed sequences and padding, in the one form that every kernel reads."""

import torch
from torch import Tensor

from .checks import values_are_readable


def canonical_segments(segment_ids: Tensor, batch: int, length: int) -> Tensor:
    """(B, N) int32 of runs: |id| >= 1 never falls along a row, positive for a token, negative for padding inside its run.

    Padding takes the run it lies in, and the run to come where a row begins with it, so that a state survives padding on either side.
    """
    if not isinstance(segment_ids, Tensor) or tuple(segment_ids.shape) != (batch, length):
        shape = tuple(segment_ids.shape) if isinstance(segment_ids, Tensor) else type(segment_ids).__name__
        raise ValueError(f"segment_ids must be a tensor of shape ({batch}, {length}), one a token, not {shape}.")
    if segment_ids.dtype == torch.bool:
        return torch.where(segment_ids, 1, -1).to(torch.int32)
    if segment_ids.is_floating_point():
        raise TypeError(f"segment_ids must be integers (0 for padding) or bool (False for padding), not {segment_ids.dtype}.")
    if length == 0:
        return segment_ids.to(torch.int32)
    ids = segment_ids.to(torch.int32)
    is_token = ids > 0
    highest = ids.clamp(min=0).cummax(-1).values
    if values_are_readable(ids) and bool((is_token & (ids < highest)).any() | (ids < 0).any()):
        raise ValueError("segment_ids must be 0 for padding and, apart from zeros, never fall along a row.")
    last = torch.iinfo(torch.int32).max
    first = ids.masked_fill(~is_token, last).amin(-1, keepdim=True)
    run = torch.maximum(highest, torch.where(first == last, 1, first))
    return torch.where(is_token, run, -run)


def reversed_segments(segments: Tensor) -> Tensor:
    """The same runs read from the end of the row: they rise there too."""
    highest = segments.abs().amax(-1, keepdim=True)
    return ((highest + 1 - segments.abs()) * segments.sign()).flip(-1)
