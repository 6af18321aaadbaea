"""What a layer's numbers come to, kept from one token to the next instead of made anew by a dozen small kernels a layer."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Made = dict[Any, Any]
_PLAIN = (Tensor, nn.Parameter)
_steps = 0
"""Those of all optimizers: fused ones write parameters without counting."""


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)


class Kept:
    """What was made of parameters for the tokens of one text, until someone writes them.

    A write in place counts a tensor's version up, what takes its place is another object or lies elsewhere in memory, and PyTorch's
    optimizers say when they step. A write by hand that nothing counts (`parameter.data.copy_`) is seen by the next text, for which
    everything is made anew: behind a reset, and where more tokens come at once than a form's `step` takes.
    """

    def __init__(self) -> None:
        self._made: Made = {}
        self._tensors: tuple[Tensor, ...] = ()  # alive, so that no other tensor has the identity of one of them
        self._memory: list[Any] = []  # alive, so that nothing else comes to lie there
        self._written: list[int] = []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Kept, ()  # a copy of a cache copies no parameters

    def forget(self) -> None:
        self.__init__()  # type: ignore[misc]

    def of(self, tensors: tuple[Tensor, ...] | None) -> Made | None:
        """What was made of these tensors so far, to be added to; None where nothing may be kept: a gradient is recorded, or what there is
        or who writes it cannot be known."""
        if tensors is None:
            return None
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return None
        is_known = len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))
        if not is_known and any(type(x) not in _PLAIN or x.is_inference() for x in tensors):
            return None
        written = [_steps, torch.is_inference_mode_enabled()]  # what was made inside cannot be trained through outside
        for x in tensors:
            written += x._version, x.data_ptr()
        if not is_known or self._written != written:
            self._made, self._tensors, self._written = {}, tensors, written
            self._memory = [x.untyped_storage() for x in tensors]
        return self._made


def once(made: Made | None, name: Any, make: Callable[[], Any]) -> Any:
    """`make()`, or what it gave before where that was kept under its name."""
    if made is None:
        return make()
    if name not in made:
        made[name] = make()
    return made[name]
