"""The compiled form of one new token of a window. As in `cuda`, nothing waits for the device."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from . import cuda, device
from .checks import check_device
from .features import feature_count
from .known import at
from .ring import Ring
from .window_token import Beside, Token


def falls_back(token: Token, ring: Ring, beside: Beside) -> bool:
    """Whether the PyTorch form is to run, which is the one place that says so; warns once for each cause."""
    return cuda.falls_back(token, lambda token: _cannot_take(token, ring, beside))


def _cannot_take(token: Token, ring: Ring, beside: Beside) -> str:
    """Why the kernels cannot take this token, or ""."""
    if token.query.dtype not in cuda._DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {token.query.dtype}"
    widest = max(token.query.shape[-1], _features(token, beside), token.value.shape[-1] + (beside.log_input_gate is not None))
    if widest > cuda.MAX_DIM:
        return f"the kernels take head dimensions up to {cuda.MAX_DIM}, not {widest}"
    if any(x is not None and x.dim() != 3 for x in (beside.log_input_gate, beside.output_gate)):
        return "the kernels take input and output gates of each token, not one for all"
    if not all(x is None or x.is_contiguous() for x in (ring.key, ring.value, ring.seen, ring.per_token, beside.state)):
        return "the kernels take rings and states that are contiguous in memory"
    return ""


def _features(token: Token, beside: Beside) -> int:
    """Of how many numbers of a query and a key f is taken."""
    if beside.query_matrix is None:
        return token.query.shape[-1]
    return beside.query_matrix.shape[-1] * (2 if beside.is_map else 1)


_known: set[tuple] = set()


def _check(token: Token, ring: Ring, beside: Beside) -> None:
    """What the kernels ask of shapes and devices, for they see no more than pointers; once for each combination.

    Raises:
        ValueError: one does not fit the others.
    """
    tensors = (*token[:4], ring.key, ring.value, ring.seen, ring.per_token, *beside.tensors)
    in_place = tensors[1:9]  # numbers of what lies beside are moved to the token's device
    facts = (
        *(None if x is None else x.shape for x in tensors),
        *(None if x is None else x.device for x in in_place),
        token.query.device,
        ring.window,
        ring.sinks,
        beside.degree,
        beside.is_map,
    )
    if facts in _known:
        return
    batch, heads, _, head_dim = token.query.shape
    key_heads, value_dim = token.value.shape[1], token.value.shape[3]
    slots, rows = ring.sinks + ring.window, key_heads * (beside.decays_per_token + beside.gated_per_token)
    state_heads = 0 if beside.state is None else beside.state.shape[1]
    state = batch, state_heads, feature_count(_features(token, beside), beside.degree), value_dim + 1 + beside.gated_per_token
    columns = _features(token, beside) // (1 + beside.is_map)
    allowed: list[tuple[tuple[int, ...], ...]] = [
        ((batch, heads, 1, head_dim),), ((batch, key_heads, 1, head_dim),), ((batch, key_heads, 1, value_dim),), ((batch, 1),),
        ((batch, key_heads, slots, head_dim),), ((batch, key_heads, slots, value_dim),), ((batch,),), ((batch, rows, ring.window),),
        (state,), ((heads,), (batch, heads, 1)), ((4, heads),), ((state_heads,), (batch, key_heads, 1)), ((batch, key_heads, 1),),
        ((heads, head_dim, columns),), ((key_heads, head_dim, columns),), ((key_heads, 1, head_dim),), ((heads,),), ((heads,),),
        ((batch, heads, 1),),
    ]  # fmt: skip
    for x, shapes in zip(tensors, allowed, strict=True):
        if x is not None and tuple(x.shape) not in shapes:
            raise ValueError(f"a tensor of a window's token must be of shape {' or '.join(map(str, shapes))}, not {tuple(x.shape)}.")
    for x in in_place:
        if x is not None:
            check_device("a tensor of a window's token", x, token.query)
    if heads % key_heads or state_heads not in (0, key_heads, heads):
        raise ValueError(f"{heads} query heads, {key_heads} key heads and a state of {state_heads} heads do not belong together.")
    if len(_known) >= 256:
        _known.clear()
    _known.add(facts)


def step(token: Token, ring: Ring, beside: Beside) -> Tensor:
    """(B, Hq, 1, Dv), on a CUDA device."""
    library, _ = cuda.load_library()
    assert library is not None
    _check(token, ring, beside)
    query, plan = token.query, cuda._Plan()
    out = query.new_empty(*query.shape[:3], token.value.shape[-1])
    window, kept = _window(token, ring, out)
    far, kept_far = (None, None) if beside.state is None else _beside(token, ring, beside)
    with device.current(query.device):
        library.linattn_plan_window_step(window, far, plan)
        memory = device.memory(plan.workspace_bytes, query.device)
        window.workspace, window.stream = at(memory), device.stream(query.device)
        code = library.linattn_window_step(byref(window), None if far is None else byref(far), byref(plan))
    if code:
        raise RuntimeError(f"the kernels of a window's token failed: {library.linattn_error_string(code).decode()}.")
    del kept, kept_far  # alive until here
    return out


def _window(token: Token, ring: Ring, out: Tensor) -> tuple[cuda._Window, tuple[Tensor, ...]]:
    """The token and the ring as the library sees them, and tensors that must be alive when it does."""
    query, key, value, real, scaling = token
    rows = query, key, value = cuda._rows(query), cuda._rows(key), cuda._rows(value)
    batch, heads, _, head_dim = query.shape
    describe = cuda._describe
    window = cuda._Window(
        batch, heads, key.shape[1], head_dim, value.shape[3], ring.window, ring.sinks, cuda._DTYPES[query.dtype],
        head_dim**-0.5 if scaling is None else scaling,
        describe(query), describe(key), describe(value), describe(out), describe(ring.key), describe(ring.value),
        ring.seen.data_ptr(), at(real), 0 if real is None else real.stride(0),
    )  # fmt: skip
    return window, rows


def _beside(token: Token, ring: Ring, beside: Beside) -> tuple[cuda._Beside, list[Tensor | None]]:
    """The same of what lies beside."""
    dtype, on, heads = token.query.dtype, token.query.device, token.query.shape[1]
    state, gate, *numbers = beside.tensors
    assert state is not None and gate is not None
    gate, coefficients, log_decay, log_input_gate = (cuda._plain(x, torch.float32, on) for x in (gate, *numbers[:3]))
    query_matrix, key_matrix, key_center = (cuda._plain(x, dtype, on) for x in numbers[3:6])
    power, log_scale, output_gate = (cuda._plain(x, torch.float32, on) for x in numbers[6:])
    gate_stride = heads if beside.gate is not None and beside.gate.dim() == 3 else 0
    far = cuda._Beside(
        state.shape[1], _features(token, beside), beside.degree, beside.normalize_qk, at(state), at(coefficients), at(log_decay),
        beside.decays_per_token, at(log_input_gate), at(ring.per_token), at(query_matrix), at(key_matrix), at(key_center), beside.is_map,
        at(gate), gate_stride, at(power), at(log_scale), at(output_gate),
    )  # fmt: skip
    return far, [gate, coefficients, log_decay, log_input_gate, query_matrix, key_matrix, key_center, power, log_scale, output_gate]
