"""What generating will cost, known before anything is converted: bytes a sequence in every form, and against the source's own cache, and
the time that each token takes to read and write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from convert.errors import ConversionError
from hf_linattn.config import LinAttnConfig, attention_layers, readers_of, sizes_of, sliding_windows
from hf_linattn.forms import Form

LARGEST_STATE = 2**30
"""Bytes of state a sequence, beyond which a conversion must be asked for by --large-state."""
BANDWIDTH = 20 * 10**9
"""Bytes a second that one core of a server's CPU reads and writes (a Xeon, scaling a tensor of 136 MB in place: 20.5 GB/s)."""
SLOWER = (4, 10)
"""How many times as long plain PyTorch takes there, which goes over the state several times: 3.9 to 9.4 measured, at states of a layer from
0.5 to 138 MB. At 18 layers of 4 heads of 256, the second degree, 2.1 s a token where reading and writing once takes 0.25 s."""


@dataclass(frozen=True)
class Costs:
    """Memory and time of one sequence while generating.

    Attributes:
        state: bytes in all linear layers together, whatever the length.
        traffic: bytes that a new token moves, since it reads and writes the state once.
        seconds: the time that takes at ``bandwidth``: a bound from below, and what kernels come near to.
        bandwidth: bytes a second.
        forms: what ``state`` would be with other options, by name.
        kept: bytes a token that layers which keep softmax add, up to their windows.
        source: bytes of the source's own cache, by length in tokens.
        break_even: from how many tokens on the source's cache is no smaller; None: it never is, because of its windows.
    """

    state: int
    traffic: int
    seconds: float
    bandwidth: int
    forms: dict[str, int]
    kept: int
    source: dict[str, int]
    break_even: int | None

    def sentence(self) -> str:
        """The costs in words, for the screen and the model card."""
        even = "which the source's cache never reaches, because its windows bound it"
        if self.break_even is not None:
            even = f"as much as the source's cache after {self.break_even:,} tokens"
        more = f" Softmax layers add {self.kept:,} bytes a token, up to their windows." if self.kept else ""
        return f"{self.state:,} bytes of state a sequence, {even}; {self.time()}.{more}"

    def time(self) -> str:
        """The time that a token takes, in words."""
        return (
            f"each new token reads and writes them once, {self.traffic:,} bytes, which takes {_duration(self.seconds)} at "
            f"{self.bandwidth / 1e9:.0f} GB/s (one core of a CPU; plain PyTorch there takes {SLOWER[0]} to {SLOWER[1]} times as long)"
        )


class Keys(NamedTuple):
    """What an attention layer of the source adds to its cache: bytes a token, up to its window."""

    token: int
    window: int | None


def generating_costs(config: Any, large_state: bool = False) -> Costs:
    """The costs of a converted configuration.

    Args:
        config: the converted configuration, with its ``linattn`` options.
        large_state: whether a state beyond LARGEST_STATE was asked for.

    Raises:
        ConversionError: the state is larger than that, and was not asked for; the configuration's dtype is none.
    """
    linattn, windows, dtype = config.linattn, sliding_windows(config), _dtype(config)
    sizes = {layer: sizes_of(config, layer=layer) for layer in attention_layers(config)}
    keys = {layer: Keys((of.head_dim + of.value_dim) * of.key_heads * dtype.itemsize, windows[layer]) for layer, of in sizes.items()}
    linear = [layer for layer in sizes if layer not in linattn["softmax_layers"]]
    form, readers = LinAttnConfig(**linattn).attention, readers_of(config)

    def state_of(form: Form) -> int:
        return readers * sum(form.state_bytes(sizes[layer], dtype) for layer in linear)

    state = state_of(form)
    forms = {other.describe(): state_of(other) for other in form.alternatives()}
    if state > LARGEST_STATE and not large_state:
        raise ConversionError(
            f"generating would take {state / 1e9:.2f} GB of state a sequence, all of it read and written for every token "
            f"({_duration(SLOWER[1] * 2 * state / BANDWIDTH)} in plain PyTorch on one core of a CPU), and more than "
            f"{LARGEST_STATE / 1e9:.2f} GB must be asked for: give --large-state, --keep-softmax with more layers, or another "
            f"form, of which these are the bytes: {_listed(forms)}"
        )
    lengths = (1024, 8192, 65536)
    kept = sum(keys[layer].token for layer in sizes if layer not in linear)
    source = {str(length): _held(list(keys.values()), length) for length in lengths}
    even = _break_even(state, [keys[layer] for layer in linear])
    return Costs(state, 2 * state, 2 * state / BANDWIDTH, BANDWIDTH, forms, kept, source, even)


def _break_even(state: int, keys: list[Keys]) -> int | None:
    """The least length at which the source's cache of the layers that become linear holds ``state`` bytes."""
    low, high = 0, state + 1
    if _held(keys, high) < state:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _held(keys, middle) >= state else (middle, high)
    return high


def _held(keys: list[Keys], length: int) -> int:
    """Bytes of keys and values of so many tokens."""
    return sum(of.token * _tokens(of.window, length) for of in keys)


def _tokens(window: int | None, length: int) -> int:
    """Tokens that a cache keeps of ``length``; of a window, all but the one that the next token pushes out."""
    return length if window is None else min(length, window - 1)


def _dtype(config: Any) -> torch.dtype:
    dtype = getattr(torch, str(config.dtype).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConversionError(f"config.json: the dtype {config.dtype!r:.100} is none of floating-point numbers: mend it, or give --dtype")
    return dtype


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"


def _listed(forms: dict[str, int]) -> str:
    return ", ".join(f"{name} {size:,}" for name, size in forms.items())
