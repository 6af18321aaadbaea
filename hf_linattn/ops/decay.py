"""A decay in the one form that the operators take, and at padding the operator `linattn::decay_at_tokens`: one kernel on a CUDA device, and
one for its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import checks, runs_cuda
from .operators import reach_kernels
from .segments import runs_of

_library = torch.library.Library("linattn", "FRAGMENT")
_library.define("decay_at_tokens(Tensor log_decay, Tensor runs) -> Tensor")
_library.define("decay_at_tokens_backward(Tensor grad, Tensor runs, bool each) -> Tensor")


def canonical_decay(log_decay: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """float32 (float64 beside float64); raises where it does not fit."""
    checks.check_decay(log_decay, query.shape[0], query.shape[1], key.shape[1], key.shape[2])
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return log_decay if log_decay.dtype == dtype else log_decay.to(dtype)


def without_padding(rate: Tensor, segments: Tensor) -> Tensor:
    """(B, H, N) of (H,) or (B, H, N), 0 at padding: a padded row decays as it does without its padding."""
    if not reach_kernels(rate.device.type, (rate, segments)):
        return torch.ops.linattn.decay_at_tokens(rate, segments)
    kernel, each = _KERNELS[rate.device.type], rate.dim() == 3
    wants_gradient = torch.is_grad_enabled() and rate.requires_grad
    return _AtTokens.apply(kernel, _BACKWARD[rate.device.type], each, rate, segments) if wants_gradient else kernel(rate, segments)


def runs_and_decay(segment_ids: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """`runs_of`, and `without_padding` of a rate beside them: one launch where nothing stands between the tensors and a kernel."""
    is_straight = rate.is_cuda and reach_kernels("cuda", (segment_ids, rate))
    if not (is_straight and runs_cuda.takes_segments(segment_ids) and runs_cuda.takes_decay(rate)):
        segments = runs_of(segment_ids)
        return segments, without_padding(rate, segments)
    if torch.is_grad_enabled() and rate.requires_grad:
        return _WithRuns.apply(rate, segment_ids)
    return runs_cuda.runs_and_decay(segment_ids, rate)


class _WithRuns(torch.autograd.Function):
    """Both in one launch, and the derivative of the second."""

    @staticmethod
    def forward(ctx, rate: Tensor, segment_ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.each = rate.dim() == 3
        segments, at_tokens = runs_cuda.runs_and_decay(segment_ids, rate)
        ctx.save_for_backward(segments)
        ctx.mark_non_differentiable(segments)
        return segments, at_tokens

    @staticmethod
    def backward(ctx, _, grad):
        checks.check_first_derivative()
        return _compiled_gradient(grad, *ctx.saved_tensors, ctx.each), None


class _AtTokens(torch.autograd.Function):
    """`linattn::decay_at_tokens` and its derivative, by whichever way the two kernels take there."""

    @staticmethod
    def forward(ctx, kernel: Callable, backward: Callable, each: bool, rate: Tensor, segments: Tensor) -> Tensor:
        ctx.backward, ctx.each = backward, each
        ctx.save_for_backward(segments)
        return kernel(rate, segments)

    @staticmethod
    def backward(ctx, grad):
        checks.check_first_derivative()
        return None, None, None, ctx.backward(grad, *ctx.saved_tensors, ctx.each), None


def _autograd(rate: Tensor, segments: Tensor) -> Tensor:
    def below(rate: Tensor, segments: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.linattn.decay_at_tokens(rate, segments)

    if torch.is_grad_enabled() and rate.requires_grad:
        return _AtTokens.apply(below, torch.ops.linattn.decay_at_tokens_backward, rate.dim() == 3, rate, segments)
    return below(rate, segments)


# ---- by PyTorch's operators, on any device


def _decay(rate: Tensor, segments: Tensor) -> Tensor:
    rate = rate[None, :, None].expand(len(segments), -1, segments.shape[1]) if rate.dim() == 1 else rate
    return rate.masked_fill((segments <= 0)[:, None], 0).contiguous()


def _gradient(grad: Tensor, segments: Tensor, each: bool) -> Tensor:
    """Of rates that tokens have each, or all alike."""
    grad = _decay(grad, segments)
    return grad if each else grad.sum((0, -1))


# ---- by a kernel


def _compiled(rate: Tensor, segments: Tensor) -> Tensor:
    return runs_cuda.decay_at_tokens(rate, segments) if segments.numel() and runs_cuda.takes_decay(rate) else _decay(rate, segments)


def _compiled_gradient(grad: Tensor, segments: Tensor, each: bool) -> Tensor:
    if not runs_cuda.takes_decay(grad):
        return _gradient(grad, segments, each)
    return runs_cuda.decay_at_tokens(grad, segments) if each else runs_cuda.sum_at_tokens(grad, segments)


_KERNELS = {"cpu": _decay, "cuda": _compiled}
_BACKWARD = {"cpu": _gradient, "cuda": _compiled_gradient}
for _name, _by_operators, _by_kernel in (("", _decay, _compiled), ("_backward", _gradient, _compiled_gradient)):
    _library.impl(f"decay_at_tokens{_name}", _by_operators, "CompositeExplicitAutograd")
    _library.impl(f"decay_at_tokens{_name}", _by_kernel, "CUDA")
_library.impl("decay_at_tokens", _autograd, "Autograd")


@torch.library.register_fake("linattn::decay_at_tokens")
def _decay_fake(rate: Tensor, segments: Tensor) -> Tensor:
    return rate.new_empty(segments.shape[0], rate.shape[-2 if rate.dim() == 3 else 0], segments.shape[1])


@torch.library.register_fake("linattn::decay_at_tokens_backward")
def _gradient_fake(grad: Tensor, segments: Tensor, each: bool) -> Tensor:
    return grad.new_empty(grad.shape if each else grad.shape[1:2])
