"""One new token of a window, beside linear attention or alone, as the operator `linattn::window_step`.

The ring takes the token in, softmax is taken over what it then holds, the token that has left the window goes to the state of the attention
beside, and both outputs are mixed by the gate. On a CUDA device that is three or four kernels (`window_cuda`), anywhere else the operators
of PyTorch below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import window, window_cuda
from .beside import normed_and_gated, of_each_head, quotient, softmax_features, weighed
from .mixing import mixed
from .operators import are_written_alike, reach_kernels
from .precision import in_full_precision
from .ring import Leaving, Ring
from .step import step_by
from .weights import Weights
from .window_token import Beside, Token

_library = torch.library.Library("linattn", "FRAGMENT")
_library.define(
    "window_step(Tensor query, Tensor key, Tensor value, Tensor? real, float? scaling, Tensor(a!) ring_key, Tensor(b!) ring_value, "
    "Tensor(c!) seen, Tensor(d!)? per_token, int window, int sinks, Tensor(e!)? state, Tensor? gate, Tensor? coefficients, "
    "Tensor? log_decay, Tensor? log_input_gate, Tensor? query_matrix, Tensor? key_matrix, Tensor? key_center, Tensor? output_power, "
    "Tensor? output_log_scale, Tensor? output_gate, int degree, bool normalize_qk, bool is_map) -> Tensor"
)
NOTHING = Beside()


def step(token: Token, ring: Ring, beside: Beside = NOTHING) -> Tensor:
    """(B, Hq, 1, Dv), 0 where a sequence has no token; the ring, and the state beside it, are moved on in place."""
    tensors = (*token[:4], ring.key, ring.value, ring.seen, ring.per_token, *beside.tensors)
    if reach_kernels(token.query.device.type, tensors) and are_written_alike(tensors, ring.key):
        written = (ring.key, ring.value, ring.seen, ring.per_token, beside.state)
        torch.autograd.graph.increment_version([x for x in written if x is not None])
        return _KERNELS[token.query.device.type](token, ring, beside)
    return torch.ops.linattn.window_step(*token, ring.key, ring.value, ring.seen, ring.per_token, ring.window, ring.sinks, *beside)


def by_operators(token: Token, ring: Ring, beside: Beside) -> Tensor:
    """The same in PyTorch, on any device."""
    leaving = ring.push(token.key, token.value, beside.kept, token.real)
    near = window.step(token.query, ring, token.scaling, token.real)
    if beside.state is None or beside.gate is None:
        return near
    far = _far(token, leaving, beside, beside.state)
    gate = beside.gate[..., None] if beside.gate.dim() == 3 else beside.gate[None, :, None, None]
    return mixed(near, far, gate, leaving.real[:, None, :, None])


def _far(token: Token, leaving: Leaving, beside: Beside, state: Tensor) -> Tensor:
    """What the attention beside gives the query over all that has left the window, once it has taken in what leaves it now."""
    query, key, value = token.query, leaving.key.to(token.key.dtype), leaving.value.to(token.value.dtype)
    decay, log_gate = beside.of_the_kept(leaving.per_token)
    if beside.query_matrix is not None and beside.key_matrix is not None:
        if beside.key_center is not None:
            key = key - beside.key_center
        features = softmax_features if beside.is_map else of_each_head
        query, key = features(query, beside.query_matrix), features(key, beside.key_matrix)
    if log_gate is not None:
        value = weighed(value, log_gate)
    assert beside.coefficients is not None
    weights = Weights(beside.coefficients, beside.degree, beside.normalize_qk, None if beside.decays_per_token else beside.log_decay)
    out = step_by(weights, query, key, value, state, decay, leaving.real)
    out = quotient(out) if log_gate is not None else out
    return normed_and_gated(out, beside.output_power, beside.output_log_scale, beside.output_gate)


def _compiled(token: Token, ring: Ring, beside: Beside) -> Tensor:
    return by_operators(token, ring, beside) if window_cuda.falls_back(token, ring, beside) else window_cuda.step(token, ring, beside)


_KERNELS = {"cpu": in_full_precision(by_operators), "cuda": in_full_precision(_compiled)}


def _by_device(device: str):
    """A kernel as torch.library calls it."""

    def run(query, key, value, real, scaling, ring_key, ring_value, seen, per_token, window, sinks, *beside) -> Tensor:
        ring = Ring(ring_key, ring_value, seen, per_token, window, sinks)
        return _KERNELS[device](Token(query, key, value, real, scaling), ring, Beside(*beside))

    return run


_library.impl("window_step", _by_device("cpu"), "CompositeExplicitAutograd")
_library.impl("window_step", _by_device("cuda"), "CUDA")


@torch.library.register_fake("linattn::window_step")
def _fake(query: Tensor, key, value: Tensor, *rest) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])
