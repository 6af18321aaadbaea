"""Tensors that never change, kept so that a call starts no kernel to write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_constants: dict[Any, Tensor] = {}


def constant(signature: Any, make: Callable[[], Tensor], kept: dict[Any, Tensor] = _constants, most: int = 256) -> Tensor:
    """`make()`, or what it gave before under the same signature, which says all that it is made of; outside a graph that is compiled.

    Tensors are kept among small ones, or where the caller says: so many, then all are forgotten.
    """
    if signature in kept:
        return kept[signature]
    with torch.inference_mode(False), torch.no_grad():
        made = make()
    is_fake = type(made) is not Tensor or made.device.type == "meta"
    if is_fake or (made.is_cuda and torch.cuda.is_current_stream_capturing()):  # a captured graph writes it when it is replayed
        return made
    if len(kept) >= most:
        kept.clear()
    kept[signature] = made
    return made
