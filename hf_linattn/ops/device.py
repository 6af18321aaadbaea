"""What a launch asks of PyTorch: that its device be the current one, the stream to run on, and memory to work in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING_TO_DO: AbstractContextManager = nullcontext()


def current(device: torch.device) -> AbstractContextManager:
    """The device as PyTorch's current one, which it mostly is."""
    return _NOTHING_TO_DO if device.index == torch._C._cuda_getDevice() else torch.cuda.device(device)


def stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


def memory(count: int, device: torch.device) -> Tensor | None:
    """So many bytes for kernels to work in; None for none."""
    return torch.empty(count, dtype=torch.uint8, device=device) if count else None
