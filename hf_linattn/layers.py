"""Learnable parameters of a linear attention layer, a few numbers per query head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_linattn.config import LinAttnConfig

LARGEST_START = 0.98
"""Largest start of what a bound limits, as a share of that bound: b * temperature / a (linear), b / (2 sqrt(a c)) (quadratic)."""
SHORTEST_TIME_CONSTANT = 1.5
"""Time constant, in tokens, of the fastest head at the start."""

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

    Args:
        heads: number of query heads H, at least 1.
        config: ``kernel``, ``a``, ``b``, ``c``, ``temperature``, ``decay``; ``learnable=False`` makes them buffers, which are
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
            # float32 said aloud: Transformers loads a parameter in the dtype it was made in, whatever the rest is loaded in.
            values = torch.empty(heads, dtype=torch.float32)
            # Frozen ones are buffers: loading a checkpoint makes every parameter require a gradient again.
            if config.learnable:
                self.register_parameter(name, nn.Parameter(values))
            else:
                self.register_buffer(name, values)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the starting values, except in parameters that Transformers has loaded from disk."""
        for name in self.names:
            init.copy_(getattr(self, name), self._start(name))

    def forward(self) -> dict[str, Tensor]:
        """The numbers to attend with, as new float32 tensors of shape (H,).

        Returns:
            ``a``, ``b``, ``temperature``; with the quadratic kernel ``c``; with a decay ``log_decay`` = -1 / T < 0.
        """
        learned: dict[str, Tensor] = {name: getattr(self, name).float() for name in self.names}
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
