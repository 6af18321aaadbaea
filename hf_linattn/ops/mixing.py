"""The window's output and that of the attention beside it, mixed by a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .checks import check_first_derivative
from .constants import constant


def mixed(near: Tensor, far: Tensor, gate: float | Tensor, has_before: Tensor) -> Tensor:
    """gate near + (1 - gate) far, in at least float32; near alone where there is nothing before the window."""
    dtype = torch.float64 if near.dtype == torch.float64 else torch.float32
    one = lambda: torch.ones((), dtype=dtype, device=near.device)  # noqa: E731
    all_of_it = one() if is_compiling() else constant(("one", dtype, near.device), one)
    share = torch.where(has_before, gate, all_of_it).to(dtype)
    return (share * near + (1 - share) * far).to(near.dtype)


class MixedBlocks(torch.autograd.Function):
    """The same of blocks, laid out as tokens on the way: (B, Hq, count size, Dv) of near (B, count, Hk, groups, size, Dv).

    The share of far is rounded to the dtype of both, and near has the rest of it, exactly.

    Args:
        far: (B, Hq, M, Dv) of the last M tokens, all those of some last blocks; the others are near alone.
        gate: (B or 1, Hq or 1, count size or 1, 1).
        has_before: None where all of the M tokens have something before their windows, else bool (B, 1, count size, 1).
    """

    @staticmethod
    def forward(ctx: Any, near: Tensor, far: Tensor, gate: Tensor, has_before: Tensor | None) -> Tensor:
        batch, count, heads, groups, size, width = near.shape
        first = count - far.shape[2] // size
        share = 1 - _last(gate, far)
        if has_before is not None:
            share = share * _last(has_before, far)
        share = share.to(near.dtype)
        out = near.new_empty(batch, count * size, heads * groups, width).transpose(1, 2)
        blocks = _in_blocks(out, near)
        if first:
            blocks[:, :first] = near[:, :first]
        torch.lerp(near[:, first:], _in_blocks(far, near), _in_blocks(share, near), out=blocks[:, first:])
        ctx.save_for_backward(near, far, share, has_before)
        ctx.gate_shape = gate.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        check_first_derivative()
        near, far, share, has_before = ctx.saved_tensors
        first = near.shape[1] - far.shape[2] // near.shape[4]
        blocks, share = _in_blocks(grad, near), _in_blocks(share, near)
        by_near, by_far = torch.empty_like(near, memory_format=torch.contiguous_format), torch.empty_like(far)
        late, late_by_far = blocks[:, first:], _in_blocks(by_far, near)
        torch.mul(late, share, out=late_by_far)
        torch.sub(late, late_by_far, out=by_near[:, first:])
        if first:
            by_near[:, :first] = blocks[:, :first]
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        by_gate = torch.zeros(grad.shape[0], grad.shape[2], grad.shape[1], 1, dtype=dtype, device=grad.device).transpose(1, 2)
        products = (near[:, first:] - _in_blocks(far, near)).mul_(late)
        torch.sum(products, -1, keepdim=True, dtype=dtype, out=_in_blocks(_last(by_gate, far), near))
        if has_before is not None:
            by_gate.mul_(has_before)
        return by_near, by_far, by_gate.sum_to_size(ctx.gate_shape), None


def _last(x: Tensor, far: Tensor) -> Tensor:
    """Of (., ., count size or 1, 1) what belongs to the tokens that `far` has."""
    return x if x.shape[2] == 1 and far.shape[2] else x[:, :, x.shape[2] - far.shape[2] :]


def _in_blocks(x: Tensor, near: Tensor) -> Tensor:
    """A view of (., ., N, .) as the blocks of `near`; heads and tokens that are 1 for all stay so."""
    _, _, heads, groups, size, _ = near.shape
    by_heads = (heads, groups) if x.shape[1] > 1 else (1, 1)
    by_tokens = (x.shape[2] // size, size) if x.shape[2] != 1 else (1, 1)
    return x.unflatten(2, by_tokens).unflatten(1, by_heads).permute(0, 3, 1, 2, 4, 5)
