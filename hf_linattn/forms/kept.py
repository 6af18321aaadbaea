"""What a layer's numbers come to, kept from one token to the next instead of made anew by a dozen small kernels a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Made = dict[Any, Any]
_PLAIN = (Tensor, nn.Parameter)


class Kept:
    """What was made of parameters for the tokens of one text, until someone writes them.

    A write in place counts a tensor's version up, and what takes its place is another object or lies elsewhere in memory. A write that
    PyTorch does not count (`parameter.data.copy_`, as some optimizers write) is seen by the next text, for which everything is made anew.
    """

    def __init__(self) -> None:
        self._made: Made = {}
        self._tensors: tuple[Tensor, ...] = ()  # alive, so that no other tensor has the identity of one of them
        self._written: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Kept, ()  # a copy of a cache copies no parameters

    def forget(self) -> None:
        self.__init__()  # type: ignore[misc]

    def of(self, tensors: tuple[Tensor, ...]) -> Made | None:
        """What was made of these tensors so far, to be added to; None where nothing may be kept: a gradient is recorded, or who writes
        them cannot be known."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return None
        written: list[int] = []
        for x in tensors:
            if type(x) not in _PLAIN or x.is_inference():
                return None
            written += id(x), x._version, x.data_ptr()
        if self._written != (found := tuple(written)):
            self._made, self._tensors, self._written = {}, tensors, found
        return self._made


def once(made: Made | None, name: Any, make: Callable[[], Any]) -> Any:
    """`make()`, or what it gave before where that was kept under its name."""
    if made is None:
        return make()
    if name not in made:
        made[name] = make()
    return made[name]
