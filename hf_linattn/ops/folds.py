"""Tokens laid out as blocks of a window, and their gradients laid back: one copy each, where autograd's views take one for every step.

Transforms of torch.func go through the views: they ask for second derivatives, and for rules that such functions have not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_first_derivative


def rows_of_blocks(query: Tensor, size: int, groups: int) -> Tensor:
    """Queries (B, Hq, count size, D) as rows (B count, Hk, groups size, D)."""
    return _rows(query, size, groups) if torch._C._are_functorch_transforms_active() else _Rows.apply(query, size, groups)


def columns_of_blocks(x: Tensor, index: Tensor, size: int, sinks: int) -> Tensor:
    """Of keys (B, H, C, D) what each of `count` blocks sees, (B count, H, S + 2 size, D): the sinks, the block before it, and its own.

    `index` holds these columns, block after block. C is `count` blocks, or one more where another lies in front of the first; the last may
    be short.
    """
    if torch._C._are_functorch_transforms_active():
        return _columns(x, index, size, sinks)
    return _Columns.apply(x, index, size, sinks)


def _rows(query: Tensor, size: int, groups: int) -> Tensor:
    batch, heads, length, width = query.shape
    blocks = query.unflatten(2, (length // size, size)).transpose(1, 2)
    return blocks.reshape(batch * (length // size), heads // groups, groups * size, width)


def _columns(x: Tensor, index: Tensor, size: int, sinks: int) -> Tensor:
    found = x.transpose(1, 2).index_select(1, index)
    return found.unflatten(1, (-1, sinks + 2 * size)).flatten(0, 1).transpose(1, 2)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, size: int, groups: int) -> Tensor:
        ctx.shape, ctx.size = query.shape, size
        return _rows(query, size, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        check_first_derivative()
        batch, heads, length, width = ctx.shape
        out = grad.new_empty(batch, length, heads, width)
        blocks = out.view(batch, length // ctx.size, ctx.size, grad.shape[1], -1, width).permute(0, 1, 3, 4, 2, 5)
        blocks.copy_(grad.unflatten(2, (-1, ctx.size)).unflatten(0, blocks.shape[:2]))
        return out.transpose(1, 2), None, None


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, size: int, sinks: int) -> Tensor:
        ctx.shape, ctx.size, ctx.sinks = x.shape, size, sinks
        return _columns(x, index, size, sinks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        check_first_derivative()
        batch, heads, columns, width = ctx.shape
        size, blocks = ctx.size, -(-columns // ctx.size)
        grad = grad.unflatten(0, (batch, -1))  # (B, count, H, S + 2 size, D)
        sinks, before, own = grad.split([ctx.sinks, size, size], 3)
        out = grad.new_empty(batch, blocks, size, heads, width).transpose(2, 3)
        if blocks > grad.shape[1]:
            out[:, 0] = before[:, 0]
        torch.add(own[:, :-1], before[:, 1:], out=out[:, -grad.shape[1] : -1])
        out[:, -1] = own[:, -1]
        flat = out.transpose(2, 3).flatten(1, 2)[:, :columns].transpose(1, 2)
        if ctx.sinks:
            flat[:, :, : ctx.sinks].add_(sinks.sum(1))
        return flat, None, None, None
