"""The keys and values that a window keeps from call to call: those of the last W tokens and of the first S, in memory that never grows.

Token t of a sequence lies in slot S + t mod W, so a new one takes the place of the one that leaves the window, and nothing moves. What
is counted are real tokens, of each sequence for itself: padding takes no slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .constants import constant


class Leaving(NamedTuple):
    """The token that has left each window for a new one: what the attention beside the window takes in next."""

    key: Tensor  # (B, Hk, 1, D)
    value: Tensor  # (B, Hk, 1, Dv)
    per_token: Tensor | None  # (B, n, 1)
    real: Tensor  # bool (B, 1), False where none has left


@dataclass
class Ring:
    """One layer's.

    Attributes:
        key, value: (B, Hk, S + W, D) and (B, Hk, S + W, Dv), the sinks in front.
        seen: int64 (B,), the tokens of each sequence so far.
        per_token: None, or (B, n, W): n numbers a token, where the attention beside the window has them; token t's in slot t mod W.
        window, sinks: W and S.
    """

    key: Tensor
    value: Tensor
    seen: Tensor
    per_token: Tensor | None
    window: int
    sinks: int

    def in_order(self, x: Tensor) -> Tensor:
        """The window of `key`, `value` or `per_token` from its oldest token to its newest; slots that hold none yet come first."""
        slots = (self.seen[:, None] + torch.arange(self.window, device=x.device)) % self.window
        return take(x[:, :, -self.window :], slots)

    def push(self, key: Tensor, value: Tensor, per_token: Tensor | None = None, real: Tensor | None = None) -> Leaving:
        """Takes in one token a sequence, in place: (B, Hk, 1, D), (B, Hk, 1, Dv), None or (B, n, 1), and None or bool (B, 1)."""
        seen = self.seen[:, None]
        had_left = seen >= self.window if real is None else real & (seen >= self.window)
        slot = seen % self.window
        places = slot + self.sinks
        if self.sinks:  # the first tokens are written to another place as well, the others to the same one twice
            places = torch.cat([places, torch.where(seen < self.sinks, seen, places)], 1)
        leaving = [_exchange(x, places, incoming, real) for x, incoming in ((self.key, key), (self.value, value))]
        numbers = None
        if self.per_token is not None and per_token is not None:
            numbers = _exchange(self.per_token, slot, per_token, real)
        self.seen.add_(1 if real is None else real[:, 0])
        return Leaving(leaving[0], leaving[1], numbers, had_left)

    def visible(self) -> Tensor:
        """Which slots the newest token sees, bool (B, S + W): itself among them, and a sink once it has left the window."""
        size = self.sinks, self.window, self.seen.device
        return self.seen[:, None] > (_hidden_up_to(*size) if is_compiling() else constant(("ring", *size), lambda: _hidden_up_to(*size)))


def take(x: Tensor, index: Tensor) -> Tensor:
    """The entries `index` (B, n) of each sequence along dimension 2 of `x`, (B, H, C) or (B, H, C, .)."""
    return x.gather(2, along(index, x).expand(*x.shape[:2], -1, *x.shape[3:]))


def shared(x: Tensor, index: Tensor) -> Tensor:
    """The same of (B, H, C, .), for entries that come up more than once: its gradient sums them in a fixed order."""
    return x.transpose(1, 2)[torch.arange(len(index), device=x.device)[:, None], index].transpose(1, 2)


def _hidden_up_to(sinks: int, window: int, device: torch.device) -> Tensor:
    """For each slot the number of tokens up to which the newest one does not see it, (S + W,)."""
    ranges = (window, window + sinks), (-1, 0), (1, window)  # of a sequence without a token one slot is seen, and there is no division by 0
    return torch.cat([torch.arange(*each, device=device) for each in ranges])


def _exchange(x: Tensor, places: Tensor, incoming: Tensor, real: Tensor | None) -> Tensor:
    """Writes `incoming` (B, H, 1, ...) into each of the `places` (B, n) of `x`, except padding; returns what was in the first place."""
    before = take(x, places[:, :1] if real is None else places)
    new = incoming.to(x.dtype) if real is None else torch.where(along(real, x), incoming.to(x.dtype), before)
    index = along(places, x).expand(*x.shape[:2], -1, *x.shape[3:])
    x.scatter_(2, index, new.expand(index.shape))
    return before if real is None else before[:, :, :1]


def along(index: Tensor, x: Tensor) -> Tensor:
    """(B, n) as (B, 1, n) or (B, 1, n, 1), to be broadcast against `x`."""
    return index.view(index.shape[0], 1, *index.shape[1:], *(1,) * (x.dim() - 3))
