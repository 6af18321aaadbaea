"""Packed sequences and padding by the kernels of `kernels/runs.cu`, a launch each."""

from __future__ import annotations

from ctypes import byref

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
    batch, length = segment_ids.shape
    made = segment_ids.new_empty(batch, length, dtype=torch.int32)
    given = cuda._Segments(segment_ids.data_ptr(), *segment_ids.stride(), length, batch, _INTEGERS[segment_ids.dtype])
    _launch("runs", given, made, made)
    return made


def decay_at_tokens(log_decay: Tensor, runs: Tensor) -> Tensor:
    """float32 (B, H, N) of float32 (H,) or (B, H, N): 0 at padding."""
    batch, length = runs.shape
    strides = (0, *log_decay.stride(), 0) if log_decay.dim() == 1 else log_decay.stride()
    made = log_decay.new_empty(batch, log_decay.shape[-2 if log_decay.dim() == 3 else 0], length)
    _launch("decay_at_tokens", cuda._Decay(log_decay.data_ptr(), *strides, length, batch, made.shape[1]), runs.contiguous(), made)
    return made


def sum_at_tokens(gradient: Tensor, runs: Tensor) -> Tensor:
    """float32 (H,): the sums of float32 (B, H, N) over all tokens but padding."""
    gradient = gradient.contiguous()
    batch, heads, length = gradient.shape
    made = gradient.new_empty(heads)
    _launch("sum_at_tokens", cuda._Decay(gradient.data_ptr(), *gradient.stride(), length, batch, heads), runs.contiguous(), made)
    return made


def _launch(name: str, given: cuda._Segments | cuda._Decay, runs: Tensor, made: Tensor) -> None:
    library, _ = cuda.load_library()
    with device.current(made.device):
        results = (made.data_ptr(),) if runs is made else (runs.data_ptr(), made.data_ptr())
        cuda._raise_if(getattr(library, f"linattn_{name}")(byref(given), *results, device.stream(made.device)), name)
