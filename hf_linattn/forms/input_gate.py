"""An input gate: a key weighs exp(u) beside f, u read off the hidden state of its token, which so says how much of itself is kept.

The gate is that of xLSTM (arXiv 2405.04517). The operators know of no such weight, and need none: for values (e^u v, e^u), one column more,
they give sum_n f e^u v / sum_n f and sum_n f e^u / sum_n f, whose quotient is attention with the weights f e^u.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .form import Call, Numbers

CHOICES = ("none", "token")
NAME = "log_input_gate"
"""Of u among a layer's numbers, (B, Hk, N)."""
LARGEST = 5.0
"""u = 5 tanh(x / 5), so that weights stay from 1 / 148 to 148. A state is a sum, which forgets nothing but by its decay: one token of
boundless weight would drown all others in it for good. And e^u v keeps within float16 for values up to 441."""


def bounded(x: Tensor) -> Tensor:
    """u of what was read off the hidden states, float32: x where it is small, and never beyond LARGEST."""
    return LARGEST * torch.tanh(x.float() / LARGEST)


def weighed(call: Call, numbers: Numbers) -> tuple[Call, Numbers]:
    """The call with the values (e^u v, e^u), and the numbers that are left; both as they are where there is no gate."""
    if NAME not in numbers:
        return call, numbers
    log_gate = numbers[NAME].to(torch.float64 if call.value.dtype == torch.float64 else torch.float32)
    gate = (log_gate if log_gate.dim() == 3 else log_gate[:, None]).exp()[..., None].to(call.value.dtype)
    value = torch.cat([call.value * gate, gate.expand(*call.value.shape[:3], 1)], -1)
    return call._replace(value=value), {name: number for name, number in numbers.items() if name != NAME}


def quotient(out: Tensor) -> Tensor:
    """(B, Hq, N, Dv) of what the operators give for such values, (B, Hq, N, Dv + 1): 0 for a token that sees nothing."""
    share = out[..., -1:]
    return out[..., :-1] / share.masked_fill(share == 0, 1)
