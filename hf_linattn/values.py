"""Values of tensors, which a GPU stalls for: asked once a forward pass, or asserted by the graph while it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing


def is_traced(x: Tensor) -> bool:
    """Transformers' `is_tracing`, which asks seven questions, behind the few that settle it for an ordinary tensor."""
    if torch.compiler.is_compiling():
        return True
    if type(x) is not Tensor or torch._C._get_tracing_state() or not (x.is_cpu or x.is_cuda):
        return is_tracing(x)
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def attribute(thing: Any, name: str, default: Any) -> Any:
    """`getattr` for what lies in a config or a module itself or in its class, past their own look-ups, which go a long way a layer."""
    if torch.compiler.is_compiling() or hasattr(type(thing), name):
        return getattr(thing, name, default)
    return object.__getattribute__(thing, "__dict__").get(name, default)


def remember(source: Tensor, name: str, beside: tuple[Any, ...], read: Callable[[], Any], none_if_false: bool = False) -> Any:
    """`read()`, or what it gave before, if `source` was not written since and `beside` holds the same objects.

    With `none_if_false`, a bool tensor without a True is None. Nothing is kept, and no value asked for, while a graph is traced.
    """
    if is_traced(source):
        return read()
    written = None if source.is_inference() else source._version
    known = getattr(source, f"_linattn_{name}", None)
    if known is not None and written is not None and known[0] == written and _same(known[1], beside):
        return known[2]
    found = read()
    if none_if_false and not bool(found.any()):
        found = None
    setattr(source, f"_linattn_{name}", (written, beside, found))
    return found


def _same(known: tuple[Any, ...], beside: tuple[Any, ...]) -> bool:
    return all(x is y or (isinstance(x, int) and x == y) for x, y in zip(known, beside, strict=True))


def require(condition: Tensor, sentence: str) -> None:
    """Raises ValueError with `sentence` unless the one value holds; a traced graph raises RuntimeError when it runs.

    Raises:
        ValueError: it does not hold.
    """
    if is_tracing(condition):
        torch._assert_async(condition, sentence.replace('"', "'"))  # Inductor pastes the sentence into C++ as it is
    elif not bool(condition):
        raise ValueError(sentence)
