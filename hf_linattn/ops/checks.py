"""What may be passed to the operator, said in one sentence where it may not."""

import math
from functools import lru_cache
from numbers import Real

import torch
from torch import Tensor

from . import bounds
from .call import Call

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def values_are_readable(x: Tensor) -> bool:
    """Whether looking at the values of x costs no device synchronisation and breaks no trace."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


_known: set[tuple] = set()


def check_tensors(query: Tensor, key: Tensor, value: Tensor, lag: int, causal: bool, has_state: bool) -> None:
    """What is asked of the three together; of ordinary ones once for each combination of shapes, dtypes and devices."""
    known: tuple | None = None
    if type(query) is type(key) is type(value) is Tensor and not torch.compiler.is_compiling():  # else sizes may be symbols
        facts = query.shape, query.dtype, query.device, key.shape, key.dtype, key.device, value.shape, value.dtype, value.device
        known = *facts, lag, causal, has_state
        if known in _known:
            return
    _check_tensors(query, key, value, lag, causal, has_state)
    if known is not None:
        _remember(known)


def _remember(known: tuple) -> None:
    if torch._C._get_tracing_state():  # to torch.jit.trace sizes are tensors
        return
    if len(_known) >= 256:
        _known.clear()
    _known.add(known)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, lag: int, causal: bool, has_state: bool) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor of shape (batch, heads, length, head_dim), not {type(x).__name__}.")
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, head_dim), but its shape is {tuple(x.shape)}.")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, not {x.dtype}: cast it first.")
        if x.device != query.device:
            raise ValueError(f"query, key and value must be on one device, but query is on {query.device} and {name} on {x.device}.")
        if x.dtype != query.dtype:
            raise TypeError(f"query, key and value must have one dtype, not {query.dtype} and {x.dtype} ({name}): cast one.")
    batch, heads, length, head_dim = query.shape
    if head_dim == 0 or value.shape[-1] == 0:
        raise ValueError("head_dim is 0: query, key and value need at least one channel a head.")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key and value must agree in batch, heads and length, but are {tuple(key.shape)} and {tuple(value.shape)}.")
    if key.shape[0] != batch or key.shape[-1] != head_dim:
        raise ValueError(f"query and key must agree in batch and head_dim, but are {tuple(query.shape)} and {tuple(key.shape)}.")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"the {heads} query heads must be a multiple of the {key.shape[1]} key heads.")
    if lag < 0 or (lag and not causal):
        raise ValueError(f"lag must be 0 or more, and 0 where causal=False, but is {lag} with causal={causal}.")
    if causal and key.shape[2] != length and not (lag and has_state and key.shape[2] == length + lag):
        expected = f"{length}" + (f", or {length + lag} with the {lag} tokens before in front and an initial_state" if lag else "")
        raise ValueError(f"causal attention needs as many keys as queries: expected {expected}, got {key.shape[2]}.")


def check_weights(a, b, c, temperature, heads: int, normalize_qk: bool) -> None:
    """f(s) = a + b s + c s^2 must be able to be a weight: finite, and nowhere negative over the s that can occur."""
    if type(a) is type(b) is type(c) is type(temperature) is float and not torch.compiler.is_compiling():
        _check_row(a, b, c, temperature, normalize_qk=normalize_qk)
        return
    table = (a, b, c, temperature)
    for name, x in zip(("a", "b", "c", "temperature"), table, strict=True):
        if isinstance(x, Tensor):
            if x.dim() > 1 or (x.dim() == 1 and x.shape[0] != heads):
                raise ValueError(f"{name} must be a number or a tensor of shape ({heads},), one a query head, not {tuple(x.shape)}.")
        elif not isinstance(x, Real):
            raise TypeError(f"{name} must be a number or a tensor, not {type(x).__name__}.")
    if torch.compiler.is_compiling() or not all(values_are_readable(x) for x in table if isinstance(x, Tensor)):
        return
    if not any(isinstance(x, Tensor) for x in table):  # one row says it all
        heads = 1
    columns = [x.detach().double().expand(heads).tolist() if isinstance(x, Tensor) else [float(x)] * heads for x in table]
    for row in zip(*columns, strict=True):
        _check_row(*row, normalize_qk=normalize_qk)


@lru_cache(maxsize=256)
def _check_row(a: float, b: float, c: float, temperature: float, *, normalize_qk: bool) -> None:
    shown = f"a={a:g}, b={b:g}, c={c:g}, temperature={temperature:g}"
    if not all(math.isfinite(x) for x in (a, b, c, temperature)):
        raise ValueError(f"a, b, c and temperature must be finite, but {shown}.")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, but {shown}.")
    if normalize_qk:
        least = bounds.least_weight(a, b, c, temperature)
        if least < -1e-6 * max(abs(a), 1):  # room for the rounding of learned bounds
            raise ValueError(
                f"f(s) = a + b s + c s^2 must not be negative for |s| <= temperature, but falls to {least:g} for {shown}: "
                "lower |b| or temperature, or raise a."
            )
    elif c < 0 or a < 0 or (c > 0 and abs(b) > bounds.largest_slope(a, c) * (1 + 5e-7)):
        raise ValueError(
            f"without normalize_qk, s has no bound, so f(s) = a + b s + c s^2 needs a >= 0 and b^2 <= 4 a c (or c = 0), but {shown}."
        )


def check_decay(log_decay: Tensor, batch: int, heads: int, key_heads: int, length: int) -> None:
    if not isinstance(log_decay, Tensor):
        raise TypeError(f"log_decay must be a tensor or None, not {type(log_decay).__name__}.")
    # a tuple, not a set: to hash a length that is dynamic in torch.export would fix it
    shapes = ((heads,), (key_heads,), (batch, heads, length), (batch, key_heads, length))
    if tuple(log_decay.shape) not in shapes:
        allowed = ", ".join(str(shape) for shape in sorted(set(shapes), key=lambda s: (len(s), s)))
        raise ValueError(f"log_decay must have one of the shapes {allowed}, not {tuple(log_decay.shape)}.")
    if values_are_readable(log_decay) and not bool(((log_decay <= 0) & log_decay.isfinite()).all()):
        raise ValueError("log_decay must be 0 or negative everywhere (it is the logarithm of a factor of at most 1), finite, and not NaN.")


def check_state(state: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"the state must be a tensor, not {type(state).__name__}.")
    if tuple(state.shape) != shape or state.dtype != dtype:
        raise ValueError(
            f"the state must be {dtype} of shape {shape} (batch, heads, features, value_dim + 1), "
            f"but is {state.dtype} of {tuple(state.shape)}."
        )


def check_device(name: str, x: Tensor, query: Tensor) -> None:
    """Kernels get no more of these tensors than an address, which means nothing on another device."""
    if x.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, but is on {x.device}.")


MOST_TOKENS = 16  # of a step, as kernels/tokens.cu has it


def check_step(call: Call, state: Tensor) -> None:
    """What a step asks of its tensors and its state; of ordinary ones once for each combination of shapes, dtypes and devices."""
    query, key, value, _, decay, *_ = call
    known: tuple | None = None
    if type(query) is type(key) is type(value) is type(state) is Tensor and not torch.compiler.is_compiling():  # else sizes may be symbols
        facts = query.shape, query.dtype, query.device, key.shape, key.dtype, key.device, value.shape, value.dtype, value.device
        known = *facts, state.shape, state.dtype, state.device, None if decay is None else decay.shape, call.degree
        if known in _known:
            return
    _check_tensors(query, key, value, 0, True, True)
    if query.shape[2] == 0 or query.shape[2] > MOST_TOKENS:
        raise ValueError(f"linear_attention_step takes 1 to {MOST_TOKENS} tokens a call, not {query.shape[2]}: use linear_attention.")
    check_state(state, call.state_shape, call.dtype)
    check_device("the state", state, query)
    if known is not None:
        _remember(known)


def check_first_derivative() -> None:
    """Of a backward pass. PyTorch's `once_differentiable` raises only where a second derivative goes on from there: one that also comes by
    another way, as by a residual stream, would be given without this part.

    Raises:
        RuntimeError: it is recorded itself.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("linear attention has no second derivative: take its gradient without create_graph=True.")


def check_dropout(dropout_p, kind: str) -> None:
    if type(dropout_p) is float and dropout_p == 0 and kind == "paper":
        return
    if kind not in ("paper", "moment"):
        raise ValueError(f'dropout_kind must be "paper" or "moment", not {kind!r}.')
    if isinstance(dropout_p, Tensor):
        if dropout_p.dim():
            raise ValueError(f"dropout_p must be a number or a tensor without dimensions, not of shape {tuple(dropout_p.shape)}.")
        if not values_are_readable(dropout_p):
            return
    elif not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p must be a number or a tensor, not {type(dropout_p).__name__}.")
    if not torch.compiler.is_compiling() and not 0 <= float(dropout_p) < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, but is {float(dropout_p):g}.")
