"""Learnable parameters of a linear attention layer, a few numbers per query head."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_linattn.config import LinAttnConfig

LARGEST_START = 0.98
"""Largest start of what a bound limits, as a share of that bound: b * temperature / a (linear), b / (2 sqrt(a c)) (quadratic)."""
SHORTEST_TIME_CONSTANT = 1.5
"""Time constant, in tokens, of the fastest head at the start."""
OFFSET = "_offset"
"""Ends the names of what is learned."""

_INSIDE = 0.999


class LinAttnParams(nn.Module):
    """f(s) = a + b s + c s^2 of s = temperature * q.k, and a decay, learned per query head and inside their bounds by construction.

    Attention divides by the sum of f, so multiplying a, b and c by one number changes nothing, and neither does trading b and c against
    the temperature. What is left is one number a head for the linear kernel and two for the quadratic one, and these are learned:

    - linear: the temperature, in (0, a / b), so that f > 0 for every s that unit-length q and k can give; a and b stay as configured;
    - quadratic: the temperature, above 0, and b, in (0, 2 sqrt(a c)), so that f > 0 for every s; a and c stay as configured;
    - with ``decay="head"``, the time constant T > 0 in tokens: a token n steps back is weighed by exp(-n / T) as well.

    Starting values: temperature and b as configured, but at most 0.98 of their bound; T from 1.5 tokens in the first head, growing
    geometrically to ``longest`` in the last.

    Each number is a float32 buffer, where it started, and a parameter ``..._offset`` in the model's dtype, how far it has learned since,
    at first 0. So a bfloat16 model has parameters of one dtype, which FSDP and DeepSpeed ask for, and loses nothing that it loads: a
    bfloat16 log rate of -7.6 can only move in steps of 0.03, an offset near 0 in as small ones as it is itself. AdamW in bfloat16, to move
    it by 0.48 in 300 steps of rates from 0.03 or 0.01 to 0, ends 0.06 or 0.47 away (it never moved), an offset 0.004 away both times.

    Args:
        heads: number of query heads H, at least 1.
        config: ``kernel``, ``a``, ``b``, ``c``, ``temperature``, ``decay``; with ``learnable=False`` there are buffers alone, which are
            saved and never trained.
        longest: time constant of the slowest head at the start, in tokens, at least 1.5.

    Raises:
        ValueError: no heads; the linear kernel without ``normalize_qk``; a, b, temperature (or c of the quadratic kernel) that is not
            positive.
    """

    def __init__(self, heads: int, config: LinAttnConfig, longest: float = 512.0) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"learnable linear attention needs at least one head, got {heads}")
        if config.kernel == "linear" and not config.normalize_qk:
            raise ValueError("the learnable linear kernel is bounded only for unit-length queries and keys: set normalize_qk to true")
        self.kernel, self.longest = config.kernel, max(float(longest), SHORTEST_TIME_CONSTANT)
        self.a, self.b, self.temperature = float(config.a), float(config.b), float(config.temperature)
        self.c = float(0.5 if config.c is None else config.c) if config.kernel == "quadratic" else 0.0
        numbers = {"a": self.a, "b": self.b, "temperature": self.temperature} | ({"c": self.c} if config.kernel == "quadratic" else {})
        for name, number in numbers.items():
            if not number > 0:
                raise ValueError(f"learnable linear attention needs {name} > 0 to start from, got {number}")
        self.heads = heads
        self.names = ["temperature_logit"] if config.kernel == "linear" else ["log_temperature", "b_logit"]
        if config.decay == "head":
            self.names.append("log_rate")
        for name in self.names:
            # A buffer and not a frozen parameter: loading a checkpoint makes every parameter require a gradient again.
            self.register_buffer(name, torch.empty(heads, dtype=torch.float32))
            if config.learnable:
                self.register_parameter(name + OFFSET, nn.Parameter(torch.empty(heads)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the starting values, except of what Transformers has loaded from disk."""
        for name in self.names:
            init.copy_(getattr(self, name), self._start(name))
        for offset in self.parameters():
            init.zeros_(offset)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinAttnParams:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != torch.float32:  # model.to(torch.bfloat16) is meant for the weights
                setattr(self, name, before[name].to(buffer.device))
        return self

    def forward(self) -> dict[str, Tensor]:
        """The numbers to attend with, as new float32 tensors of shape (H,).

        Returns:
            ``a``, ``b``, ``temperature``; with the quadratic kernel ``c``; with a decay ``log_decay`` = -1 / T < 0.
        """
        learned: dict[str, Tensor] = {name: self._number(name) for name in self.names}
        like = learned[self.names[0]]
        out = {"a": torch.full_like(like, self.a)}
        if self.kernel == "linear":
            out["b"] = torch.full_like(like, self.b)
            out["temperature"] = self._limit() * torch.sigmoid(learned["temperature_logit"])
        else:
            out["b"] = self._limit() * torch.sigmoid(learned["b_logit"])
            out["c"] = torch.full_like(like, self.c)
            out["temperature"] = torch.exp(learned["log_temperature"])
        if "log_rate" in learned:
            out["log_decay"] = -torch.exp(learned["log_rate"])
        return out

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kernel={self.kernel}, {', '.join(self.names)}"

    def _number(self, name: str) -> Tensor:
        started, offset = getattr(self, name).float(), getattr(self, name + OFFSET, None)
        return started if offset is None else started + offset.float()

    def _limit(self) -> float:
        # A logistic function reaches 1 in float32; the bound itself must stay out of reach.
        return _INSIDE * (self.a / self.b if self.kernel == "linear" else 2 * math.sqrt(self.a * self.c))

    def _start(self, name: str) -> Tensor:
        if name == "log_rate":
            exponents = torch.linspace(0, 1, self.heads)
            return -(math.log(SHORTEST_TIME_CONSTANT) + exponents * math.log(self.longest / SHORTEST_TIME_CONSTANT))
        if name == "log_temperature":
            return torch.full((self.heads,), math.log(self.temperature))
        share = min((self.temperature if name == "temperature_logit" else self.b) * _INSIDE / self._limit(), LARGEST_START) / _INSIDE
        return torch.full((self.heads,), math.log(share / (1 - share)))
