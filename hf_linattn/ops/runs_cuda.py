"""Packed sequences and padding by the kernels of `kernels/runs.cu`."""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from . import cuda, device

_INTEGERS = {torch.bool: 0, torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4}


def takes_segments(segment_ids: Tensor) -> bool:
    """Whether `runs` can be made of them here; else PyTorch's operators do."""
    return segment_ids.dtype in _INTEGERS and _runs_here(segment_ids)


def takes_decay(log_decay: Tensor) -> bool:
    """The same of `decay_at_tokens` and `sum_at_tokens`."""
    return log_decay.dtype == torch.float32 and _runs_here(log_decay)


def _runs_here(x: Tensor) -> bool:
    return x.numel() > 0 and cuda.backend() != "torch" and not cuda.cannot_run(x.device.index or 0)


def runs(segment_ids: Tensor) -> Tensor:
    """int32 (B, N), as `segments.canonical_segments` says."""
    made = segment_ids.new_empty(segment_ids.shape, dtype=torch.int32)
    _launch("runs", made, byref(_segments(segment_ids)), None, made.data_ptr(), None)
    return made


def runs_and_decay(segment_ids: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """`runs`, and `decay_at_tokens` of them, in one launch."""
    made = segment_ids.new_empty(segment_ids.shape, dtype=torch.int32)
    decay, at_tokens = _decay(log_decay, *segment_ids.shape)
    _launch("runs", made, byref(_segments(segment_ids)), byref(decay), made.data_ptr(), at_tokens.data_ptr())
    return made, at_tokens


def decay_at_tokens(log_decay: Tensor, runs: Tensor) -> Tensor:
    """float32 (B, H, N) of float32 (H,) or (B, H, N): 0 at padding."""
    decay, made = _decay(log_decay, *runs.shape)
    runs = runs.contiguous()
    _launch("decay_at_tokens", made, byref(decay), runs.data_ptr(), made.data_ptr())
    return made


def sum_at_tokens(gradient: Tensor, runs: Tensor) -> Tensor:
    """float32 (H,): the sums of float32 (B, H, N) over all tokens but padding."""
    gradient = gradient.contiguous()
    batch, heads, length = gradient.shape
    made, runs = gradient.new_empty(heads), runs.contiguous()
    given = cuda._Decay(gradient.data_ptr(), *gradient.stride(), length, batch, heads)
    _launch("sum_at_tokens", made, byref(given), runs.data_ptr(), made.data_ptr())
    return made


def _segments(ids: Tensor) -> cuda._Segments:
    return cuda._Segments(ids.data_ptr(), *ids.stride(), ids.shape[1], len(ids), _INTEGERS[ids.dtype])


def _decay(log_decay: Tensor, batch: int, length: int) -> tuple[cuda._Decay, Tensor]:
    """As the library takes it, and what it writes."""
    strides = (0, *log_decay.stride(), 0) if log_decay.dim() == 1 else log_decay.stride()
    made = log_decay.new_empty(batch, log_decay.shape[-2 if log_decay.dim() == 3 else 0], length)
    return cuda._Decay(log_decay.data_ptr(), *strides, length, batch, made.shape[1]), made


def _launch(name: str, made: Tensor, *arguments: Any) -> None:
    library, _ = cuda.load_library()
    with device.current(made.device):
        cuda._raise_if(getattr(library, f"linattn_{name}")(*arguments, device.stream(made.device)), name)
