"""One new token of a window: inputs of every kind, and the compiled kernels held against float64 at the accuracy bar."""

from __future__ import annotations

from typing import Any

import accuracy_bar
import torch
from torch import Tensor

from hf_linattn.ops import one_token, window_cuda
from hf_linattn.ops.call import Call
from hf_linattn.ops.features import feature_count
from hf_linattn.ops.ring import Ring
from hf_linattn.ops.window_step import by_operators
from hf_linattn.ops.window_token import Beside, Token

Case = tuple[Token, Ring, Beside]

# how many tokens each sequence has seen: none, a ring not yet full, one that fills with this token, one that has come round
SEEN = (0, 3, 6, 7, 25)


def make_ring(generator: torch.Generator, heads: int, window: int, sinks: int, dims: tuple[int, int], seen: tuple[int, ...]) -> Ring:
    """As tokens left it that came one after another; slots without a token are 0."""
    batch = len(seen)
    ring = Ring(*(torch.zeros(batch, heads, sinks + window, d) for d in dims), torch.tensor(seen), None, window, sinks)
    history = [torch.randn(batch, heads, max(seen) + 1, d, generator=generator) for d in dims]
    for row, count in enumerate(seen):
        for t in (*range(min(count, sinks)), *range(max(count - window, 0), count)):
            slots = [sinks + t % window] + ([t] if t < sinks else [])
            for x, past in zip((ring.key, ring.value), history, strict=True):
                x[row, :, slots] = past[row, :, t : t + 1]
    return ring


def make_state(generator: torch.Generator, shape: tuple[int, int, int], degree: int, value_dim: int, positive: bool) -> Tensor:
    """(B, Hs, F, Dv + 1) of 30 tokens with features (B, Hs, features)."""
    batch, heads, features = shape
    state = torch.zeros(batch, heads, feature_count(features, degree), value_dim + 1)
    coefficients = torch.ones(4, heads)
    for _ in range(30):
        key, value = (
            torch.randn(batch, heads, 1, features, generator=generator),
            torch.randn(batch, heads, 1, value_dim, generator=generator),
        )
        value[..., -1] = value[..., -1].abs()  # an input gate's mass, where there is one
        call = Call(key, key.softmax(-1) if positive else key, value, coefficients, degree=degree, normalize_qk=not positive)
        one_token.step(call, state)
    return state


def window_case(dtype: torch.dtype, *, window: int = 7, sinks: int = 4, seen: tuple[int, ...] = SEEN, heads: int = 4, key_heads: int = 2,
                head_dim: int = 64, value_dim: int = 64, beside: dict[str, Any] | None = None, padded: bool = False,
                scaling: float | None = None, seed: int = 0, device: str = "cpu") -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    batch = len(seen)
    real = torch.arange(batch)[:, None] % 3 != 1 if padded else None
    token = Token(
        normal(batch, heads, 1, head_dim), normal(batch, key_heads, 1, head_dim), normal(batch, key_heads, 1, value_dim), real, scaling
    )
    ring = make_ring(generator, key_heads, window, sinks, (head_dim, value_dim), seen)
    far = Beside()
    if beside is not None:
        far, ring.per_token = make_beside(generator, batch, heads, key_heads, head_dim, value_dim, window, **beside)
    numbers = {name: getattr(far, name) for name in ("query_matrix", "key_matrix", "key_center")}
    far = far._replace(**{name: None if x is None else x.to(dtype) for name, x in numbers.items()})
    token = token._replace(query=token.query.to(dtype), key=token.key.to(dtype), value=token.value.to(dtype))
    ring.key, ring.value = ring.key.to(dtype), ring.value.to(dtype)
    return on(device, token, with_empty(ring, 0.0), far)


def make_beside(generator: torch.Generator, batch: int, heads: int, key_heads: int, head_dim: int, value_dim: int, window: int, *,
                degree: int = 1, decay: str | None = None, features: int | None = None, is_map: bool = False, input_gate: bool = False,
                gate: str = "head", output: str = "", normalize_qk: bool = True) -> tuple[Beside, Tensor | None]:  # fmt: skip
    """What lies beside, and what the ring keeps of tokens for it; decay: None, "head", "key_head" or "token"; output: "norm", "gate"."""
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    columns = features or head_dim
    width = 2 * head_dim if is_map else columns
    state_heads = heads if decay == "head" else key_heads
    share = uniform(4, heads)
    coefficients = torch.stack([1.2 + share[0], 0.2 + 0.5 * share[1], (0.5 + share[2]) * (degree == 2), 0.5 + 0.5 * share[3]])
    if is_map:
        coefficients = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None].expand(4, heads).contiguous()
    elif not normalize_qk:
        coefficients[3] *= width**-0.5
    matrices: list[Tensor | None] = [None, None, None]
    if is_map or features:
        columns = head_dim if is_map else columns
        matrices = [normal(h, head_dim, columns) * head_dim**-0.5 for h in (heads, key_heads)]
        matrices.append(None if is_map else normal(key_heads, 1, head_dim))
    kept = (decay == "token") + input_gate
    per_token = -uniform(batch, kept * key_heads, window) if kept else None
    rate = {None: None, "head": -uniform(heads), "key_head": -uniform(key_heads), "token": -uniform(batch, key_heads, 1)}[decay]
    far = Beside(
        make_state(generator, (batch, state_heads, width), degree, value_dim + input_gate, is_map),
        uniform(batch, heads, 1) if gate == "token" else uniform(heads), coefficients, rate,
        normal(batch, key_heads, 1) if input_gate else None, *matrices,
        *((normal(heads).tanh(), normal(heads)) if "norm" in output else (None, None)),
        2 * uniform(batch, heads, 1) if "gate" in output else None, degree, normalize_qk and not is_map, is_map,
    )  # fmt: skip
    return far, per_token


def on(device: str | None, token: Token, ring: Ring, beside: Beside, dtype: torch.dtype | None = None) -> Case:
    """Copies, on a device or with all numbers in a dtype."""

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device=device, dtype=dtype if x.is_floating_point() else None, copy=True)

    rings = (moved(x) for x in (ring.key, ring.value, ring.seen, ring.per_token))
    return Token(*map(moved, token)), Ring(*rings, ring.window, ring.sinks), Beside(*map(moved, beside))


def changed(ring: Ring, beside: Beside) -> dict[str, Tensor]:
    """All that a step writes."""
    written = {"key": ring.key, "value": ring.value, "seen": ring.seen, "per_token": ring.per_token, "state": beside.state}
    return {name: x for name, x in written.items() if x is not None}


def with_empty(ring: Ring, filler: float) -> Ring:
    """A filler in the slots that hold no token."""
    places = torch.arange(ring.sinks + ring.window, device=ring.seen.device)
    number = torch.where(places < ring.sinks, places, places - ring.sinks)
    empty = number >= ring.seen[:, None]
    for x in (ring.key, ring.value):
        x.masked_fill_(empty[:, None, :, None], filler)
    if ring.per_token is not None:
        ring.per_token.masked_fill_(empty[:, None, ring.sinks :], filler)
    return ring


def check_window_step(dtype: torch.dtype, **kind: Any) -> None:
    """Output, ring and state: at most twice the error of the PyTorch form in the same dtypes, whatever lies in empty slots."""
    case = window_case(dtype, **kind)
    ours, at_start = on(None, *case), on("cpu", *case)
    plain, exact = on(None, *at_start), on(None, *at_start, dtype=torch.float64)  # on the CPU, where no kernel stands behind the operators
    exact_out, plain_out = by_operators(*exact), by_operators(*plain)
    out = window_cuda.step(ours[0], with_empty(ours[1], float("nan")), ours[2]).cpu()
    assert out.dtype == dtype
    accuracy_bar.assert_bar("out", out, plain_out, exact_out, 2, dtype)
    found, expected, right = (changed(ring, beside) for _, ring, beside in (on("cpu", *ours), plain, exact))
    for name in ("key", "value", "per_token"):
        if name in found:
            assert torch.equal(found[name].nan_to_num(0.0), expected[name]), name
    assert torch.equal(found["seen"], expected["seen"])
    token, ring, beside = at_start
    if "state" in found:
        accuracy_bar.assert_bar("state", found["state"], expected["state"], right["state"], 2, torch.float32)
        stays = (ring.seen < ring.window) if token.real is None else ~token.real[:, 0] | (ring.seen < ring.window)
        assert torch.equal(found["state"][stays], beside.state[stays])
    if token.real is not None:
        assert not out[~token.real[:, 0]].any()


SECOND = {"degree": 2, "decay": "key_head", "features": 16}
WINDOW_KINDS: list[dict[str, Any]] = [
    {}, {"sinks": 0, "padded": True}, {"beside": {}}, {"beside": {"decay": "head"}, "heads": 9, "key_heads": 3},
    {"beside": {**SECOND, "gate": "token"}, "padded": True}, {"beside": SECOND, "heads": 32, "key_heads": 4, "seen": (25,)},
    {"beside": {"decay": "token", "input_gate": True, "output": "norm gate", "gate": "token"}, "padded": True, "sinks": 2},
    {"beside": {"input_gate": True, "degree": 2, "features": 3, "output": "norm"}, "head_dim": 7, "value_dim": 5, "sinks": 9},
    {"beside": {"is_map": True, "decay": "key_head", "output": "gate"}, "head_dim": 40, "value_dim": 24},
    {"beside": {"is_map": True}, "head_dim": 128, "heads": 3, "key_heads": 1, "value_dim": 200, "seen": (25, 2)},
    {"beside": {"decay": "key_head", "normalize_qk": False}, "head_dim": 256, "value_dim": 256, "heads": 2, "key_heads": 1},
    {"beside": {}, "heads": 20, "key_heads": 1, "head_dim": 33, "value_dim": 65, "scaling": 0.3, "padded": True},
    {"beside": {"degree": 2}, "window": 1, "sinks": 0, "heads": 2, "key_heads": 1, "head_dim": 24, "value_dim": 40},
    {"beside": SECOND, "window": 64, "seen": (200, 70, 63), "heads": 9, "key_heads": 3},
    {"window": 500, "seen": (0, 300, 499, 1000), "heads": 3, "key_heads": 1, "head_dim": 16, "value_dim": 16},
    {"window": 1, "sinks": 1, "heads": 1, "key_heads": 1, "head_dim": 1, "value_dim": 1, "beside": {}},
]  # fmt: skip
