"""Small tensors that never change, kept so that a call starts no kernel to write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_constants: dict[Any, Tensor] = {}


def constant(signature: Any, make: Callable[[], Tensor]) -> Tensor:
    """`make()`, or what it gave before under the same signature, which says all that it is made of; outside a graph that is compiled."""
    if signature in _constants:
        return _constants[signature]
    with torch.inference_mode(False), torch.no_grad():
        made = make()
    is_fake = type(made) is not Tensor or made.device.type == "meta"
    if is_fake or (made.is_cuda and torch.cuda.is_current_stream_capturing()):  # a captured graph writes it when it is replayed
        return made
    if len(_constants) >= 256:
        _constants.clear()
    _constants[signature] = made
    return made
