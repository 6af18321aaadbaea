"""linear_attention: what a user calls. Arguments in any allowed form go in, the operators' one form comes out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .call import Call, Forward
from .decay import canonical_decay, runs_and_decay
from .features import feature_count
from .operators import forward, noise_like
from .reference import reference
from .segments import check_segments, reversed_segments, runs_of
from .weights import Coefficient, coefficients_of, degree_of


def empty_state(batch: int, heads: int, head_dim: int, value_dim: int, *, degree: int = 1, device: torch.device | str | None = None,
                dtype: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
    """The state before the first token: zeros (batch, heads, F, value_dim + 1), F = D + 1, or D + 1 + D (D + 1) / 2 for degree 2."""
    return torch.zeros(batch, heads, feature_count(head_dim, degree), value_dim + 1, device=device, dtype=dtype)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that autocast asks for, as they are outside it; float64 stays."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)  # torch 2.11 cannot trace the question
    if known and torch.is_autocast_enabled(device) and all(isinstance(x, Tensor) and x.is_floating_point() for x in tensors):
        dtype = torch.get_autocast_dtype(device)
        return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
    return tensors


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Coefficient = 1.0,
    b: Coefficient = 1.0,
    c: Coefficient = 0.0,
    *,
    causal: bool = True,
    normalize_qk: bool = True,
    temperature: Coefficient = 1.0,
    log_decay: Tensor | None = None,
    lag: int = 0,
    segment_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    dropout_p: float | Tensor = 0.0,
    dropout_kind: str = "paper",
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalised attention with polynomial weights, in time and memory linear in N.

    out_i = sum_n A_in v_n / sum_n A_in with A_in = f(s_in) exp(G_i - G_n), f(s) = a + b s + c s^2, s_in = temperature * q_i . k_n and G the
    running sum of log_decay (*Towards Making Linear Attention Usable*, eq. 6-10; the decay is ours). n runs up to i - lag when causal, over
    everything otherwise, with exp(-|G_i - G_n|) there. Gradients reach every tensor argument but segment_ids, dropout_p and seed.

    Args:
        query: (B, Hq, N, D), float64, float32, bfloat16 or float16. Sums are float32 (float64 for float64). Any strides.
        key: (B, Hk, N, D) with Hq a multiple of Hk; heads are shared by groups and never repeated in memory.
        value: (B, Hk, N, Dv).
        a, b, c: numbers or tensors (Hq,). f must not be negative: a >= |b| temperature for c = 0 with normalize_qk. c other than the
            number 0 selects the second-degree form, whose state has D + 1 + D (D + 1) / 2 rows.
        causal: False for an encoder; then key and value may have another length than query.
        normalize_qk: bring every query and key to unit length first. Without it, keeping f positive is the caller's business.
        temperature: a number or (Hq,), above 0.
        log_decay: None, (Hk,) or (Hq,) for a constant rate a head, (B, Hk, N) or (B, Hq, N) for one a token; at most 0 and
            finite: a token that forgets everything begins a segment.
        lag: a query sees keys at least this many tokens behind it. With an initial_state, give key and value with the `lag` tokens
            before in front: they are not in the state yet.
        segment_ids: (B, N) integers below 2**31, 0 for padding; tokens with equal ids see each other, and ids never fall along a row. Or a
            bool mask of the real tokens. The output at padding is 0; nothing at padding, NaN included, reaches another row, and decay does
            not count it.
        initial_state: float32 (B, Hs, F, Dv + 1) from a call before; it belongs to the first segment. Hs is Hq where log_decay is a query
            head's own, else Hk. See `empty_state`.
        return_state: also return the state behind the last token (of the last segment).
        dropout_p: noise in place of dropout; at least 0, below 1; a tensor without dimensions lets a schedule change it without
            recompilation.
        dropout_kind: "paper" multiplies the output by (1 - p) (1 + psi), psi ~ N(0, p) (eq. 28); "moment" adds noise of the variance that
            dropout of the weights would have, p / (1 - p) sum_n a_in^2 (v_n - out_i)^2 (c = 0 only, about three times the work).
        seed: int, or an int64 tensor without dimensions; None draws one from torch's generator.

    Returns:
        out (B, Hq, N, Dv) in query's dtype and memory order; with return_state also the state, float32 (B, Hs, F, Dv + 1).

    Raises:
        ValueError: shapes, devices or values that do not fit. Values of CUDA tensors are not read, and so not checked; segment_ids that are
            none end in an assertion of the kernel that reads them.
        TypeError: wrong types or dtypes.
    """
    query, key, value = cast_for_autocast(query, key, value)
    checks.check_tensors(query, key, value, lag, causal, initial_state is not None)
    checks.check_weights(a, b, c, temperature, query.shape[1], normalize_qk)
    checks.check_dropout(dropout_p, dropout_kind)
    noisy = isinstance(dropout_p, Tensor) or dropout_p > 0
    if is_for_onnx(initial_state is not None or return_state or noisy):
        return _by_pairs(query, key, value, a, b, c, causal=causal, normalize_qk=normalize_qk, temperature=temperature,
                         log_decay=log_decay, lag=lag, segment_ids=segment_ids)  # fmt: skip
    coefficients = coefficients_of(query, a, b, c, temperature)
    call = _canonical(query, key, value, coefficients, log_decay, segment_ids, initial_state, degree_of(c), causal, normalize_qk)
    two_sided = not causal and (call.log_decay is not None or (segment_ids is not None and segment_ids.dtype != torch.bool))
    if two_sided and (initial_state is not None or return_state):
        raise ValueError("a state goes with causal attention, or with bidirectional attention without log_decay and packed segments.")
    if noisy:
        noise = _dropout(dropout_p, query.device), _seed(seed, query.device)
        if dropout_kind == "moment":
            out, state = _with_moment_noise(call, lag, return_state, two_sided, *noise)
        elif two_sided:
            out, state = noise_like(_two_sided(call)[0], *noise), None
        else:
            out, _, state = _one_sided(call._replace(dropout_p=noise[0], seed=noise[1]), lag, return_state)
    else:
        out, _, state = _attend(call, lag, return_state, two_sided)
    return out if state is None or not return_state else (out, state)


def is_for_onnx(has_state_or_noise: bool) -> bool:
    """Whether an export to ONNX is under way, which has no operators of ours and takes the formula over all pairs in their place.

    Raises:
        ValueError: one is, and there is a state or noise, of which ONNX takes neither.
    """
    if not (torch.compiler.is_compiling() and _is_for_onnx()):
        return False
    if has_state_or_noise:
        raise ValueError("ONNX takes linear attention without state and without dropout: export model.eval() with use_cache=False.")
    return True


@torch.compiler.assume_constant_result  # else a strict export, which ONNX tries second, takes it for False
def _is_for_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def _by_pairs(query: Tensor, key: Tensor, value: Tensor, *coefficients: Coefficient, segment_ids: Tensor | None, **options) -> Tensor:
    """The ten lines of `reference`, for ONNX, which has no operators of ours: any length, but time and memory grow with its square."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    segments = None if segment_ids is None else segment_ids.to(torch.int32)
    out = reference(query.to(dtype), key.to(dtype), value.to(dtype), *coefficients, segment_ids=segments, **options)
    return out.to(query.dtype)


def _canonical(query: Tensor, key: Tensor, value: Tensor, coefficients: Tensor, log_decay: Tensor | None, segment_ids: Tensor | None,
               initial_state: Tensor | None, degree: int, causal: bool, normalize_qk: bool) -> Call:  # fmt: skip
    """The operators' form of what a user gives, without noise; raises where the decay, the segments or the state do not fit."""
    if segment_ids is not None:
        check_segments(segment_ids, query.shape[0], key.shape[2])
        checks.check_device("segment_ids", segment_ids, query)
    segments, decay = None, None if log_decay is None else canonical_decay(log_decay, query, key)
    if segment_ids is not None and decay is not None:
        segments, decay = runs_and_decay(segment_ids, decay)
    elif segment_ids is not None:
        segments = runs_of(segment_ids)
    if segments is not None and not causal and key.shape[2] != query.shape[2]:
        raise ValueError(f"segment_ids need as many keys as queries, but there are {key.shape[2]} and {query.shape[2]}.")
    call = Call(query, key, value, coefficients, decay, segments, segments, initial_state, None, None, degree, causal, normalize_qk)
    if initial_state is not None:
        checks.check_state(initial_state, call.state_shape, call.dtype)
    return call


def noisy(out: Tensor, dropout_p: float | Tensor) -> Tensor:
    """`out` (B, H, N, Dv) with noise dropout of the kind "paper" of `linear_attention`, for an output composed of several."""
    return noise_like(out, _dropout(dropout_p, out.device), _seed(None, out.device))


def _dropout(dropout_p: float | Tensor, device: torch.device) -> Tensor:
    p = dropout_p if isinstance(dropout_p, Tensor) else torch.full((), float(dropout_p), device=device)
    return p.detach().to(device, torch.float32)


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(0, 2**62, (), device=device)
    if isinstance(seed, Tensor):
        if seed.dim() or seed.dtype != torch.int64:
            raise ValueError(f"seed must be an int or an int64 tensor without dimensions, not {seed.dtype} of shape {tuple(seed.shape)}.")
        return seed.to(device)
    if isinstance(seed, float):  # which would be cut off to an integer
        raise TypeError(f"seed must be an int or an int64 tensor without dimensions, not {seed!r}.")
    return torch.full((), seed, dtype=torch.int64, device=device)


def _attend(call: Call, lag: int, return_state: bool, two_sided: bool) -> Forward:
    return _two_sided(call) if two_sided else _one_sided(call, lag, return_state)


def _one_sided(call: Call, lag: int, return_state: bool) -> Forward:
    """One call of the operator. A lag is a shift of the rows against the columns: row i meets the columns up to i - lag.

    The shift leaves out the decay between i - lag and i. It is one factor a row, and the division by the mass cancels it.
    """
    if not lag:
        return forward(call, return_state)
    query, key, value, segments = call.query, call.key, call.value, call.query_segments
    padding, length = 0, query.shape[2]
    if key.shape[2] > length:  # the state covers all but the tokens in front, so the shift is in the keys already
        count, ahead = length, lag
    else:
        padding = ahead = min(lag, length)
        count = length - padding
        query = query[:, :, padding:]
    decay = call.log_decay
    out, mass, state = forward(
        call._replace(
            query=query,
            key=key[:, :, :count],
            value=value[:, :, :count],
            log_decay=decay[:, :, :count] if decay is not None and decay.dim() == 3 else decay,
            query_segments=None if segments is None else segments[:, ahead:],
            key_segments=None if segments is None else segments[:, :count],
        ),
        return_state,
    )
    if padding:
        out, mass = F.pad(out, (0, 0, padding, 0)), F.pad(mass, (padding, 0))
    return out, mass, state


def _two_sided(call: Call) -> Forward:
    """Bidirectional attention with a decay or with packed segments: what lies behind each token and what lies ahead, joined by mass."""
    query, key, value, _, decay, segments, *_ = call
    length = query.shape[2]
    rate = decay[None, :, None].expand(query.shape[0], -1, length) if decay is not None and decay.dim() == 1 else decay
    call = call._replace(log_decay=rate, causal=True)
    behind, mass_behind, _ = _one_sided(call, 0, False)
    if length < 2:
        return behind, mass_behind, None
    # read from the end, token i decays by the rate of token i + 1; the row's own factor is given back, since two masses are added here
    shifted = None if rate is None else F.pad(rate.flip(-1)[..., :-1], (1, 0))
    runs = None if segments is None else reversed_segments(segments)
    backwards = call._replace(
        query=query.flip(2), key=key.flip(2), value=value.flip(2), log_decay=shifted, query_segments=runs, key_segments=runs
    )
    ahead, mass_ahead, _ = _one_sided(backwards, 1, False)
    ahead, mass_ahead = ahead.flip(2), mass_ahead.flip(-1)
    if rate is not None:
        next_rate = F.pad(rate[..., 1:], (0, 1)).exp()
        mass_ahead = mass_ahead * next_rate.repeat_interleave(query.shape[1] // next_rate.shape[1], 1)
    mass = mass_behind + mass_ahead
    share = (mass_behind / mass.masked_fill(mass == 0, 1))[..., None]
    out = share * behind + (1 - share) * ahead
    if segments is not None:
        out = out.masked_fill((segments <= 0)[:, None, :, None], 0)
    return out.to(query.dtype), mass, None


def _with_moment_noise(call: Call, lag: int, return_state: bool, two_sided: bool, p: Tensor, seed: Tensor) -> tuple[Tensor, Tensor | None]:
    """Noise of the variance that dropout of the weights would have; the moments take a second call, with the weights squared."""
    if call.degree == 2 or call.initial_state is not None:
        raise ValueError('dropout_kind="moment" needs c = 0 and no initial_state: its variance takes the square of f over all keys.')
    result_dtype, dtype = call.query.dtype, call.dtype
    query, key, value, decay = call.query.to(dtype), call.key.to(dtype), call.value.to(dtype), call.log_decay
    call = call._replace(query=query, key=key, value=value)
    out, mass, state = _attend(call, lag, return_state, two_sided)
    squares = call._replace(
        value=torch.cat([value * value, value], -1),
        coefficients=_squared_weights(call.coefficients),
        log_decay=None if decay is None else 2 * decay,
        degree=2,
    )
    moments, squared_mass, _ = _attend(squares, lag, False, two_sided)
    deviation = _dropout_deviation(out, mass, moments, squared_mass, p)
    return (out + noise_like(deviation, None, seed)).to(result_dtype), state


def _squared_weights(coefficients: Tensor) -> Tensor:
    """f^2 = a^2 + 2 a b s + b^2 s^2, again a second-degree polynomial."""
    a, b, _, temperature = coefficients.unbind()
    return torch.stack([a * a, 2 * a * b, b * b, temperature])


def _dropout_deviation(out: Tensor, mass: Tensor, moments: Tensor, squared_mass: Tensor, p: Tensor) -> Tensor:
    """The standard deviation that dropout of the weights gives each output, sqrt(p / (1 - p) sum_n a_in^2 (v_nj - o_ij)^2).

    It is a difference of large numbers, so everything comes in at least float32.
    """
    second, first = moments.chunk(2, -1)  # means of v^2 and v under the weights f^2
    spread = second - 2 * out * first + out * out
    is_spread = spread > 64 * torch.finfo(spread.dtype).eps * second  # below, it is rounding, and a square root has no slope at 0
    share = torch.where(mass == 0, 0, squared_mass / mass.masked_fill(mass == 0, 1).square())[..., None]
    return torch.where(is_spread, (p / (1 - p) * share * torch.where(is_spread, spread, 1)).sqrt(), 0)
