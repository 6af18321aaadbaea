"""An input gate: a key weighs exp(u) beside f, u read off the hidden state of its token, which so says how much of itself is kept.

The gate is that of xLSTM (arXiv 2405.04517). The operators know of no such weight, and need none: for values (e^u v, e^u), one column more,
they give sum_n f e^u v / sum_n f and sum_n f e^u / sum_n f, whose quotient is attention with the weights f e^u.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import beside
from ..ops.precision import exact
from .form import Call, Numbers

CHOICES = ("none", "token")
NAME = "log_input_gate"
"""Of u among a layer's numbers, (B, Hk, N)."""
LARGEST = 5.0
"""u = 5 tanh(x / 5), so that weights stay from 1 / 148 to 148. A state is a sum, which forgets nothing but by its decay: one token of
boundless weight would drown all others in it for good. And e^u v keeps within float16 for values up to 441."""


def bounded(x: Tensor) -> Tensor:
    """u of what was read off the hidden states, in at least float32: x where it is small, and never beyond LARGEST."""
    return LARGEST * torch.tanh(x.to(exact(x.dtype)) / LARGEST)


def weighed(call: Call, numbers: Numbers) -> tuple[Call, Numbers]:
    """The call with the values (e^u v, e^u), and the numbers that are left; both as they are where there is no gate."""
    if NAME not in numbers:
        return call, numbers
    value = beside.weighed(call.value, numbers[NAME])
    return call._replace(value=value), {name: number for name, number in numbers.items() if name != NAME}
