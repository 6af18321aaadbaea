"""Tensors that never change, kept so that a call starts no kernel to write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_constants: dict[Any, Tensor] = {}
_captured: dict[int, Tensor] = {}
"""What captured CUDA graphs may read whenever they are replayed, by identity."""


def constant(signature: Any, make: Callable[[], Tensor], kept: dict[Any, Tensor] = _constants, most: int = 256) -> Tensor:
    """`make()`, or what it gave before under the same signature, which says all that it is made of; outside a graph that is compiled.

    Tensors are kept among small ones, or where the caller says: so many, then all are forgotten.
    """
    if _is_traced() or torch._C._are_functorch_transforms_active():
        return make()  # fake tensors take no others and are none that others take; those of torch.func have no memory
    if (known := kept.get(signature)) is not None:
        return _for_replays(known)
    with torch.inference_mode(False), torch.no_grad():
        made = make()
    is_fake = type(made) is not Tensor or made.device.type == "meta"
    if is_fake or (made.is_cuda and torch.cuda.is_current_stream_capturing()):  # a captured graph writes it when it is replayed
        return made
    if len(kept) >= most:
        kept.clear()
    kept[signature] = made
    return made


def _is_traced() -> bool:
    """Whether tensors are fake, or stand for what a graph will compute."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY, modes.FUNCTIONAL))


def _for_replays(x: Tensor) -> Tensor:
    """`x`, never to be forgotten where a graph is being captured that reads it."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured[id(x)] = x
    return x
