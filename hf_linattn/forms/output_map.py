"""A norm and a gate on what linear attention puts out, per query head: o exp(s) / rms(o)^m, and 2 sigmoid(w.x) times that.

RetNet (arXiv 2307.08621) and GLA (arXiv 2312.06635) have both behind theirs. Here they start where they change nothing, as a conversion
must. A plain norm cannot: it takes an output's length away. So the RMS is taken to a power m, from 0, where the output stays as it is, to
1, where its direction alone is left; the factor is positive on all the way and has a gradient at its beginning. One gate a head and not
one a channel: channels are weighed by the projection that follows, and Hq numbers a token are few.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import beside
from ..ops.precision import exact
from .form import Numbers
from .parameters import refuse_unread

CHOICES = ("none", "norm", "gate", "norm_gate")
POWER, LOG_SCALE, GATE = "output_power", "output_log_scale", "output_gate"
"""Of m and s, (Hq,) each, and of the gate, (B, Hq, N), among a layer's numbers."""
WEIGHT = "output_weight"
"""Of the matrix that the gate is read off with."""
WORDS = {
    "none": "",
    "norm": ", the output over a learned power of its RMS per query head",
    "gate": ", the output times a gate learned per token and query head",
    "norm_gate": ", the output over a learned power of its RMS per query head and times a gate learned per token and query head",
}


def norms(choice: str) -> bool:
    return choice in ("norm", "norm_gate")


def gates(choice: str) -> bool:
    return choice in ("gate", "norm_gate")


def refuse_unlearned(choice: str, learnable: bool, hidden_size: int | None) -> None:
    """Raises ValueError where a norm is not to be learned, or a gate cannot be."""
    if gates(choice):
        refuse_unread("output_map", learnable, hidden_size, choice)
    if norms(choice) and not learnable:
        raise ValueError(f'linattn option output_map="{choice}" is learned from where it changes nothing, so it needs learnable=true.')


def starting_numbers(choice: str, heads: int) -> Numbers:
    """Those that change nothing, float64."""
    norm = {name: torch.zeros(heads, dtype=torch.float64) for name in (POWER, LOG_SCALE)} if norms(choice) else {}
    return norm | ({GATE: torch.ones(heads, dtype=torch.float64)} if gates(choice) else {})


def gate(read: Tensor) -> Tensor:
    """Of what was read off the hidden states, in at least float32: 1 at first, from 0 to 2."""
    return 2 * torch.sigmoid(read.to(exact(read.dtype)))


def mapped(out: Tensor, numbers: Numbers) -> Tensor:
    """`out` (B, Hq, N, Dv) with its norm and gate, computed in at least float32; of the numbers' tokens it has all or the last."""
    return beside.normed_and_gated(out, numbers.get(POWER), numbers.get(LOG_SCALE), numbers.get(GATE))


def moved(numbers: Numbers, move: Callable[[Tensor], Tensor]) -> Numbers:
    """The numbers with the gates of tokens moved as `move` does: (B, Hq, N) to the same."""
    if GATE not in numbers or numbers[GATE].dim() < 3:
        return numbers
    return numbers | {GATE: move(numbers[GATE])}


def without(numbers: Numbers) -> Numbers:
    """The numbers that have a say in weights and states."""
    if POWER not in numbers and GATE not in numbers:
        return numbers
    return {name: number for name, number in numbers.items() if name not in (POWER, LOG_SCALE, GATE)}
