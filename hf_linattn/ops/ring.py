"""The keys and values that a window keeps from call to call: those of the last W tokens and of the first S, in memory that never grows.

Token t of a sequence lies in slot S + t mod W, so a new one takes the place of the one that leaves the window, and nothing moves. What
is counted are real tokens, of each sequence for itself: padding takes no slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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
        is_real = torch.ones_like(self.seen, dtype=torch.bool) if real is None else real[:, 0]
        had_left = is_real & (self.seen >= self.window)
        slot = self.seen[:, None] % self.window
        places, new = slot + self.sinks, is_real[:, None]
        if self.sinks:  # the first tokens are written twice
            places = torch.cat([places, self.seen[:, None].clamp(max=self.sinks - 1)], 1)
            new = torch.cat([new, new & (self.seen[:, None] < self.sinks)], 1)
        leaving = [_exchange(x, places, incoming, new) for x, incoming in ((self.key, key), (self.value, value))]
        numbers = None
        if self.per_token is not None and per_token is not None:
            numbers = _exchange(self.per_token, slot, per_token, is_real[:, None])
        self.seen.add_(is_real)
        return Leaving(leaving[0], leaving[1], numbers, had_left[:, None])

    def visible(self) -> Tensor:
        """Which slots the newest token sees, bool (B, S + W): itself among them, and a sink once it has left the window."""
        seen, slots = self.seen[:, None], torch.arange(self.window, device=self.seen.device)
        far = torch.arange(self.sinks, device=self.seen.device) < seen - self.window
        return torch.cat([far, (slots < seen) | ((seen == 0) & (slots == 0))], 1)  # before any token an empty slot, and no division by 0


def take(x: Tensor, index: Tensor) -> Tensor:
    """The entries `index` (B, n) of each sequence along dimension 2 of `x`, (B, H, C) or (B, H, C, .)."""
    return x.gather(2, along(index, x).expand(*x.shape[:2], -1, *x.shape[3:]))


def shared(x: Tensor, index: Tensor) -> Tensor:
    """The same of (B, H, C, .), for entries that come up more than once: its gradient sums them in a fixed order."""
    return x.transpose(1, 2)[torch.arange(len(index), device=x.device)[:, None], index].transpose(1, 2)


def _exchange(x: Tensor, places: Tensor, incoming: Tensor, new: Tensor) -> Tensor:
    """Writes `incoming` (B, H, 1, ...) into each of the `places` (B, n) of `x` where `new` (B, n); returns what was in the first place."""
    before = take(x, places)
    x.scatter_(2, along(places, x).expand_as(before), torch.where(along(new, x), incoming.to(x.dtype), before))
    return before[:, :, :1]


def along(index: Tensor, x: Tensor) -> Tensor:
    """(B, n) as (B, 1, n) or (B, 1, n, 1), to be broadcast against `x`."""
    return index[:, None] if x.dim() == 3 else index[:, None, :, None]
