"""The blocks of a window as the one operator that torch.compile sees, `linattn::window`.

Traced through, their sizes are quotients of the length, on which the tracer spends minutes a layer where the length may change. So a graph
holds a call and its inputs; its gradient runs the blocks again, and nothing else of them is kept in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import blocks
from .frame import Frame
from .ring import Ring

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? runs, Tensor? number, Tensor? kept_key, Tensor? kept_value, int front, int window, "
    "int sinks, float? scaling"
)
_library = torch.library.Library("linattn", "FRAGMENT")
_library.define(f"window({_INPUTS}) -> Tensor")
_library.define(f"window_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)")
_KEYS = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)


def traced(query: Tensor, frame: Frame, scaling: float | None) -> Tensor:
    """`blocks.attend` as one call in a graph; gradients reach the query and the frame's keys and values."""
    kept = (None, None) if frame.ring is None else (frame.ring.key, frame.ring.value)
    return torch.ops.linattn.window(
        query, frame.key, frame.value, frame.runs, frame.number, *kept, frame.front, frame.window, frame.sinks, scaling
    )


def _window(query: Tensor, key: Tensor, value: Tensor, runs: Tensor | None, number: Tensor | None, kept_key: Tensor | None,
            kept_value: Tensor | None, front: int, window: int, sinks: int, scaling: float | None) -> Tensor:  # fmt: skip
    ring = None
    if kept_key is not None and kept_value is not None and number is not None:  # of a ring, the sinks are all that blocks read
        ring = Ring(kept_key, kept_value, number, None, window, sinks)
    frame = Frame(key, value, runs, number, front, window, sinks, ring=ring)
    out = blocks.attend(query, frame, scaling, keep=False)  # memory of a graph is no place for what other calls find later
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _window_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    with _recorded():
        leaves = query, key, value = query.detach().requires_grad_(), key.detach().requires_grad_(), value.detach().requires_grad_()
        found = torch.autograd.grad(_window(query, key, value, *rest), leaves, grad)
    return tuple(torch.empty_like(x).copy_(g) for x, g in zip(leaves, found, strict=True))  # type: ignore[return-value]


@contextmanager
def _recorded() -> Iterator[None]:
    """Autograd inside an operator, where the dispatcher leaves it out."""
    before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in _KEYS]
    for key in _KEYS:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for key, excluded in zip(_KEYS, before, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


_library.impl("window", _window, "CompositeExplicitAutograd")
_library.impl("window_backward", _window_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("linattn::window")
def _window_fake(query: Tensor, key, value: Tensor, *rest) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


@torch.library.register_fake("linattn::window_backward")
def _window_backward_fake(grad, query: Tensor, key: Tensor, value: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx, inputs, output) -> None:
    tensors, ctx.sizes = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    return *torch.ops.linattn.window_backward(grad, *ctx.saved_tensors, *ctx.sizes), *[None] * 8


torch.library.register_autograd("linattn::window", _backward, setup_context=_save)
