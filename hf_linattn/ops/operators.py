"""The operators `linattn::forward`, `linattn::backward`, `linattn::step` and `linattn::noise`, as torch.library knows them.

They take tensors in one canonical form, which `functional` prepares: coefficients (4, Hq) with rows a, b, c, temperature; log_decay (Hs,)
or (B, Hs, N); segments (B, N) int32, where |id| counts the runs of a row upward from 1 and a negative id is padding inside its run, so that
row i sees column n where query_segments[i] == key_segments[n] > 0; dropout_p and seed without dimensions. Bidirectional calls have no
decay and one run. What is absent is None on the way in and an empty tensor on the way out.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from . import chunked, cuda, noise, one_token
from .features import feature_count

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor coefficients, Tensor? log_decay, Tensor? query_segments, "
    "Tensor? key_segments, Tensor? initial_state, Tensor? dropout_p, Tensor? seed"
)
_library = torch.library.Library("linattn", "DEF")
_library.define(
    f"forward({_INPUTS}, int degree, bool causal, bool normalize_qk, bool return_state) -> (Tensor out, Tensor mass, Tensor state)"
)
_library.define(
    f"backward(Tensor grad_out, Tensor? grad_mass, Tensor? grad_state, {_INPUTS}, Tensor out, Tensor mass, int degree, bool causal, "
    "bool normalize_qk) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "step(Tensor query, Tensor key, Tensor value, Tensor(a!) state, Tensor coefficients, Tensor? log_decay, Tensor? segments, int degree, "
    "bool normalize_qk) -> Tensor"
)
_library.define("noise(Tensor x, Tensor? dropout_p, Tensor seed) -> Tensor")

forward = torch.ops.linattn.forward
step = torch.ops.linattn.step
noise_like = torch.ops.linattn.noise


def _accumulated(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _in_full_precision(kernel: Callable) -> Callable:
    """Autocast has brought the inputs to its dtype before; the sums inside stay float32."""

    @wraps(kernel)
    def run(*args):
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        if not torch.is_autocast_enabled(device):
            return kernel(*args)
        with torch.autocast(device, enabled=False):
            return kernel(*args)

    return run


# ---- forward and backward

_library.impl("forward", _in_full_precision(chunked.forward), "CPU")
_library.impl("backward", _in_full_precision(chunked.backward), "CPU")
_library.impl("forward", _in_full_precision(cuda.forward), "CUDA")
_library.impl("backward", _in_full_precision(cuda.backward), "CUDA")


@torch.library.register_fake("linattn::forward")
def _forward_fake(query: Tensor, key: Tensor, value: Tensor, coefficients: Tensor, log_decay: Tensor | None, query_segments, key_segments,
                  initial_state, dropout_p, seed, degree: int, causal, normalize_qk, return_state: bool):  # fmt: skip
    dtype = _accumulated(query)
    out = chunked.empty_like_query(query, value.shape[-1])
    mass = query.new_empty(query.shape[:3], dtype=dtype)
    heads = chunked.state_heads(query, key, log_decay)
    shape = (query.shape[0], heads, feature_count(query.shape[-1], degree), value.shape[-1] + 1) if return_state else (0,)
    return out, mass, query.new_empty(shape, dtype=dtype)


@torch.library.register_fake("linattn::backward")
def _backward_fake(grad_out, grad_mass, grad_state, query: Tensor, key: Tensor, value: Tensor, coefficients: Tensor,
                   log_decay: Tensor | None, query_segments, key_segments, initial_state: Tensor | None, *rest):  # fmt: skip
    dtype = _accumulated(query)
    return (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
        torch.empty_like(coefficients),
        query.new_empty(0, dtype=dtype) if log_decay is None else torch.empty_like(log_decay),
        query.new_empty(0, dtype=dtype) if initial_state is None else torch.empty_like(initial_state, dtype=dtype),
    )


class _Forward(torch.autograd.Function):
    """The derivative of `linattn::forward` is `linattn::backward`."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            out, mass, state = forward(*inputs)
        *tensors, ctx.degree, ctx.causal, ctx.normalize_qk, _ = inputs
        ctx.save_for_backward(*tensors, out, mass)
        ctx.set_materialize_grads(False)
        return out, mass, state

    @staticmethod
    def backward(ctx, grad_out, grad_mass, grad_state):
        *inputs, out, mass = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if grad_state is not None and grad_state.numel() == 0:  # the state was not asked for
            grad_state = None
        query, key, value, coefficients, log_decay, initial_state = torch.ops.linattn.backward(
            grad_out, grad_mass, grad_state, *inputs, out, mass, ctx.degree, ctx.causal, ctx.normalize_qk
        )
        return (
            query, key, value, coefficients, log_decay if inputs[4] is not None else None, None, None,
            initial_state.to(inputs[7].dtype) if inputs[7] is not None else None, None, None, None, None, None, None,
        )  # fmt: skip


def _forward_with_gradient(*inputs):
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return _Forward.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return forward(*inputs)


# Not torch.library.register_autograd: it reads the schema anew at every call, which takes longer than all of the rest.
_library.impl("forward", _forward_with_gradient, "Autograd")

# ---- one new token


_library.impl("step", _in_full_precision(one_token.step), "CompositeExplicitAutograd")
_library.impl("step", _in_full_precision(cuda.step), "CUDA")


@torch.library.register_fake("linattn::step")
def _step_fake(query: Tensor, key, value: Tensor, *rest) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


# ---- noise outside a kernel, where the output is composed of several calls


def _noise(x: Tensor, dropout_p: Tensor | None, seed: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    normal = noise.standard_normal(seed, batch, heads, 0, length, width)
    factor = normal if dropout_p is None else noise.paper_factor(dropout_p.float(), normal)
    return torch.empty_like(x).copy_(x * factor)


_library.impl("noise", _noise, "CompositeExplicitAutograd")
torch.library.register_fake("linattn::noise", lambda x, dropout_p, seed: torch.empty_like(x))


def _save_noise(ctx, inputs, output) -> None:
    _, dropout_p, seed = inputs
    ctx.save_for_backward(dropout_p, seed)


torch.library.register_autograd(
    "linattn::noise",
    lambda ctx, grad: (torch.ops.linattn.noise(grad, *ctx.saved_tensors), None, None),  # linear in x: its own transpose
    setup_context=_save_noise,
)
