"""The operators `linattn::forward`, `linattn::backward`, `linattn::step` and `linattn::noise`, as torch.library knows them.

They take tensors in one canonical form, which `functional` prepares: coefficients (4, Hq) with rows a, b, c, temperature; log_decay (Hs,)
or (B, Hs, N); segments (B, N) int32, where |id| counts the runs of a row upward from 1 and a negative id is padding inside its run, so that
row i sees column n where query_segments[i] == key_segments[n] > 0; dropout_p and seed without dimensions. Bidirectional calls have no
decay and one run. What is absent is None on the way in and an empty tensor on the way out.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from . import checks, chunked, cuda, noise, one_token
from .call import TENSORS, Call, Forward
from .precision import in_full_precision

_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor coefficients, Tensor? log_decay, Tensor? query_segments, Tensor? key_segments, "
    "Tensor? initial_state, Tensor? dropout_p, Tensor? seed, int degree, bool causal, bool normalize_qk"
)
_library = torch.library.Library("linattn", "DEF")
_library.define(f"forward({_CALL}, bool return_state) -> (Tensor out, Tensor mass, Tensor state)")
_library.define(
    f"backward({_CALL}, Tensor out, Tensor mass, Tensor grad_out, Tensor? grad_mass, Tensor? grad_state) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "step(Tensor query, Tensor key, Tensor value, Tensor(a!) state, Tensor coefficients, Tensor? log_decay, Tensor? segments, int degree, "
    "bool normalize_qk) -> Tensor"
)
_library.define("noise(Tensor x, Tensor? dropout_p, Tensor seed) -> Tensor")

noise_like = torch.ops.linattn.noise


# ---- forward and backward

_FORWARD = {"cpu": in_full_precision(chunked.forward), "cuda": cuda.forward}
_BACKWARD = {"cpu": in_full_precision(chunked.backward), "cuda": cuda.backward}
_KEEPING = {"cpu": lambda *x: (_FORWARD["cpu"](*x), None), "cuda": cuda.forward_keeping}  # for a backward pass to come
_FIELDS = len(Call._fields)


def _present(call: Call, results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """The results with an empty tensor for each that is None."""
    return tuple(call.query.new_empty(0, dtype=call.dtype) if x is None else x for x in results)


def _by_device(kernels: dict[str, Callable]) -> Callable:
    """A kernel as torch.library calls it: by flat arguments, and without None among its results."""

    def run(*flat):
        call = Call(*flat[:_FIELDS])
        return _present(call, kernels[call.query.device.type](call, *flat[_FIELDS:]))

    return run


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _by_device(_FORWARD), _device)
    _library.impl("backward", _by_device(_BACKWARD), _device)


@torch.library.register_fake("linattn::forward")
def _forward_fake(*flat):
    call, return_state = Call(*flat[:_FIELDS]), flat[_FIELDS]
    mass = call.query.new_empty(call.query.shape[:3], dtype=call.dtype)
    return _present(call, (call.empty_out(), mass, call.query.new_empty(call.state_shape, dtype=call.dtype) if return_state else None))


@torch.library.register_fake("linattn::backward")
def _backward_fake(*flat):
    call = Call(*flat[:_FIELDS])
    initial = None if call.initial_state is None else torch.empty_like(call.initial_state, dtype=call.dtype)
    rate = None if call.log_decay is None else call.log_decay.new_empty(call.log_decay.shape)  # contiguous, whatever the rates' strides
    given = call.query, call.key, call.value, call.coefficients
    return _present(call, (*(torch.empty_like(x) for x in given), rate, initial))


_PLAIN = (Tensor, Parameter)  # not what derives from them: a subclass may have its own say
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # which some are that were taken out of a transform


def _reaches_kernels(call: Call, *others: Tensor | None) -> bool:
    return reach_kernels(call.query.device.type, (*call.tensors, *others))


def reach_kernels(device: str, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether nothing that traces, transforms or watches stands between these tensors and a kernel, so that torch.library's dispatcher,
    which takes a tenth of a small call's time whenever it is passed, leads there and nowhere else."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._are_functorch_transforms_active() or device not in _FORWARD:
        return False
    for x in tensors:  # noqa: SIM110 (all() over a generator takes twice as long)
        if x is not None and (type(x) not in _PLAIN or x.is_neg() or _is_wrapped(x)):
            return False
    return True


class _Forward(torch.autograd.Function):
    """The derivative of `linattn::forward`, by whichever way `kernel` takes there, is `linattn::backward`."""

    @staticmethod
    def forward(ctx, kernel, options, *tensors):
        *ctx.options, return_state = options
        (out, mass, state), kept = kernel(Call(*tensors, *ctx.options), return_state)
        states, ctx.segment_length = kept or (None, 0)
        ctx.save_for_backward(*tensors, out, mass, states)
        ctx.set_materialize_grads(False)
        return out, mass, state

    @staticmethod
    def backward(ctx, grad_out, grad_mass, grad_state):
        checks.check_first_derivative()
        *tensors, out, mass, states = ctx.saved_tensors
        call = Call(*tensors, *ctx.options)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if grad_state is not None and grad_state.numel() == 0:  # the state was not asked for
            grad_state = None
        given = out, mass, grad_out, grad_mass, grad_state
        if _reaches_kernels(call, *given):
            kept = () if states is None else (cuda.Kept(states, ctx.segment_length),)
            gradients = _BACKWARD[call.query.device.type](call, *given, *kept)
        else:
            gradients = torch.ops.linattn.backward(*call, *given)
        query, key, value, coefficients, log_decay, initial_state = gradients
        return (
            None, None, query, key, value, coefficients, log_decay if call.log_decay is not None else None, None, None,
            initial_state.to(call.initial_state.dtype) if call.initial_state is not None else None, None, None,
        )  # fmt: skip


# What `Function.apply` does ahead of it is for tensors out of transforms, and none come straight.
_apply_straight = super(torch.autograd.Function, _Forward).apply


def _below_autograd(call: Call, return_state: bool) -> tuple[Forward, None]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.linattn.forward(*call, return_state), None


def _wants_gradient(call: Call) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call.tensors)


def _autograd(*flat) -> Forward:
    call, return_state = Call(*flat[:_FIELDS]), flat[_FIELDS]
    if _wants_gradient(call):
        return _Forward.apply(_below_autograd, (*call[TENSORS:], return_state), *call.tensors)
    return _below_autograd(call, return_state)[0]


# Not torch.library.register_autograd: it reads the schema anew at every call, which takes longer than all of the rest.
_library.impl("forward", _autograd, "Autograd")


def forward(call: Call, return_state: bool = False) -> Forward:
    """out (B, Hq, N, Dv), mass (B, Hq, N) and, where it is asked for, the state behind the last key; differentiable."""
    if not _reaches_kernels(call):
        return torch.ops.linattn.forward(*call, return_state)
    kernel = _KEEPING[call.query.device.type]
    if _wants_gradient(call):
        return _apply_straight(kernel, (*call[TENSORS:], return_state), *call.tensors)
    return kernel(call, return_state)[0]


# ---- a few new tokens


_STEP = {"cpu": in_full_precision(one_token.step), "cuda": cuda.step}


def _on_a_state(kernel: Callable) -> Callable:
    """A kernel of a few tokens as torch.library calls it."""

    def run(query, key, value, state, coefficients, log_decay, segments, degree, normalize_qk):
        call = Call(query, key, value, coefficients, log_decay, segments, segments, degree=degree, normalize_qk=normalize_qk)
        return kernel(call, state)

    return run


_library.impl("step", _on_a_state(_STEP["cpu"]), "CompositeExplicitAutograd")
_library.impl("step", _on_a_state(_STEP["cuda"]), "CUDA")


_KNOWN_STEP = {"cuda": cuda.known_step}


def step(call: Call, state: Tensor) -> Tensor:
    """out (B, Hq, N, Dv) of up to 16 tokens; `state` is moved on in place.

    Raises:
        ValueError, TypeError: as `checks.check_step`.
    """
    given, on = (*call.tensors_of_a_step, state), call.query.device.type
    is_straight = reach_kernels(on, given) and are_written_alike(given, state)
    find = _KNOWN_STEP.get(on) if is_straight else None
    if find is not None and (known := find(given, call[TENSORS:])) is not None:  # it was checked when it was launched first
        torch.autograd.graph.increment_version(state)
        return cuda.step_again(known, call, state)
    checks.check_step(call, state)
    if is_straight:
        torch.autograd.graph.increment_version(state)
        return _STEP[state.device.type](call, state)
    return torch.ops.linattn.step(
        call.query, call.key, call.value, state, call.coefficients, call.log_decay, call.key_segments, call.degree, call.normalize_qk
    )


def are_written_alike(tensors: tuple[Tensor | None, ...], written: Tensor) -> bool:
    """Whether the dispatcher would do no more than count what is written, of which `written` is one: no gradient is asked for, and it may
    be written."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    return not written.is_inference() or torch.is_inference_mode_enabled()


@torch.library.register_fake("linattn::step")
def _step_fake(query: Tensor, key: Tensor, value: Tensor, state: Tensor, coefficients: Tensor, *rest) -> Tensor:
    return Call(query, key, value, coefficients).empty_out()


# ---- noise outside a kernel, where the output is composed of several calls


def _noise(x: Tensor, dropout_p: Tensor | None, seed: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    normal = noise.standard_normal(seed, batch, heads, 0, length, width)
    factor = normal if dropout_p is None else noise.paper_factor(dropout_p.float(), normal)
    return torch.empty_like(x).copy_(x * factor)


_library.impl("noise", _noise, "CompositeExplicitAutograd")


def _save_noise(ctx, inputs, output) -> None:
    _, dropout_p, seed = inputs
    ctx.save_for_backward(dropout_p, seed)


torch.library.register_autograd(
    "linattn::noise",
    lambda ctx, grad: (torch.ops.linattn.noise(grad, *ctx.saved_tensors), None, None),  # linear in x: its own transpose
    setup_context=_save_noise,
)
