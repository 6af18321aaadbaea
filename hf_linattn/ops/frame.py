"""The tokens of one call as a window needs them: padding closed up, and what a ring holds of the tokens before in front.

A window counts tokens, and linear attention with a `lag` counts columns. So that both mean the same wherever padding lies, real tokens are
moved together to the end of their row, behind those that a ring holds from the calls before, and what is computed is moved back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ring import Ring, along, shared, take
from .segments import canonical_segments


@dataclass
class Frame:
    """N new tokens a row, and `front` columns before them: W of a ring, or 0 without one.

    Attributes:
        key, value: (B, Hk, front + N, D) and (B, Hk, front + N, Dv), 0 in columns without a token.
        per_token: None, or (B, n, front + N): numbers of each token, 0 in columns without one.
        runs: None where every new token is real, none is packed and none came before; else int (B, front + N): the number of the
            sequence of each column, rising from 1, 0 in columns without a token, which all come first.
        number: beside runs, int (B, front + N): each token's place in its own sequence, from 0.
        ring: what came before, or None.
    """

    key: Tensor
    value: Tensor
    runs: Tensor | None
    number: Tensor | None
    front: int
    window: int
    sinks: int
    per_token: Tensor | None = None
    ring: Ring | None = None
    order: Tensor | None = None  # (B, N), the new token in each of the last N columns
    real: Tensor | None = None  # bool (B, N), of the new tokens as they were given

    @classmethod
    def of(cls, key: Tensor, value: Tensor, *, window: int, sinks: int, segment_ids: Tensor | None = None, ring: Ring | None = None,
           per_token: Tensor | None = None) -> Frame:  # fmt: skip
        """From key (B, Hk, N, D), value (B, Hk, N, Dv), per_token None or (B, n, N); `segment_ids` as in `linear_attention`.

        The first sequence of a row goes on from its ring.
        """
        batch, _, length, _ = key.shape
        front = 0 if ring is None else window
        tensors: dict[str, Any] = {"key": key, "value": value} | ({} if per_token is None else {"per_token": per_token})
        if segment_ids is None and ring is None:
            return cls(**tensors, runs=None, number=None, front=front, window=window, sinks=sinks)
        runs = torch.ones(batch, length, dtype=torch.int32, device=key.device)
        real = order = None
        if segment_ids is not None:
            runs = canonical_segments(segment_ids, batch, length)
            real = runs > 0
            order = _padding_first(real)
            tensors = {name: x.masked_fill(~along(real, x), 0) for name, x in tensors.items()}
        hidden: Tensor | int = 0
        first, runs = runs[:, :1].abs(), runs.clamp(min=0)
        if ring is not None:
            hidden = (ring.seen[:, None] - window).clamp(min=0)
            is_there = torch.arange(front, device=key.device) >= front - ring.seen[:, None]
            tensors = {name: torch.cat([ring.in_order(getattr(ring, name)).to(x.dtype), x], 2) for name, x in tensors.items()}
            runs = torch.cat([is_there * first, runs], 1)
        if order is not None:
            together = _padding_first(runs > 0)
            tensors, runs = {name: take(x, together) for name, x in tensors.items()}, runs.gather(1, together)
        return cls(**tensors, runs=runs, number=_numbered(runs, hidden), front=front, window=window, sinks=sinks, ring=ring, order=order,
                   real=real)  # fmt: skip

    @property
    def length(self) -> int:
        return self.key.shape[2] - self.front

    def close(self, x: Tensor) -> Tensor:
        """(B, H, N, .) of the new tokens, moved as their keys were, and 0 at padding."""
        if self.order is None or self.real is None:
            return x
        return take(x.masked_fill(~self.real[:, None, :, None], 0), self.order)

    def open(self, x: Tensor) -> Tensor:
        """The way back: (B, H, N, .) at the tokens as they were given, and 0 at padding."""
        if self.order is None or self.real is None:
            return x
        return take(x, self.order.argsort(-1)).masked_fill(~self.real[:, None, :, None], 0)

    def has_before(self) -> Tensor:
        """Whether a new token's sequence has tokens before its window, bool (1 or B, 1, N, 1)."""
        number = torch.arange(self.length, device=self.key.device)[None] if self.number is None else self.number[:, self.front :]
        return (number >= self.window)[:, None, :, None]

    def sinks_of(self, columns: Tensor) -> list[Tensor]:
        """The first S keys (B, Hk, n, S, D) and values of the sequences that n `columns` belong to; one that is not there is never seen."""
        if self.runs is None or self.number is None:
            first = slice(self.front, self.front + self.sinks)
            short = max(self.sinks - self.length, 0)
            return [
                F.pad(x[:, :, first], (0, 0, 0, short))[:, :, None].expand(-1, -1, len(columns), -1, -1) for x in (self.key, self.value)
            ]
        tokens = torch.arange(self.sinks, device=columns.device)
        at = (columns[:, None] - self.number[:, columns, None] + tokens).flatten(1)  # (B, n S)
        found = [shared(x, at.clamp(0, x.shape[2] - 1)) for x in (self.key, self.value)]
        if self.ring is not None:
            is_older = (at < (self.runs == 0).sum(-1, keepdim=True))[:, None, :, None]  # than the frame
            kept = [x[:, :, : self.sinks].repeat(1, 1, len(columns), 1) for x in (self.ring.key, self.ring.value)]
            found = [torch.where(is_older, old, new) for old, new in zip(kept, found, strict=True)]
        return [x.unflatten(2, (len(columns), self.sinks)) for x in found]

    def ring_behind(self) -> Ring:
        """What the next call goes on from: the last W tokens and the sinks of each row's last sequence."""
        columns = self.key.shape[2]
        batch, device = self.key.shape[0], self.key.device
        seen = torch.full((batch,), columns, device=device) if self.number is None else self.number[:, -1] + 1
        slots = (torch.arange(self.window, device=device) - seen[:, None]) % self.window
        newest = lambda x: take(_ahead(x[:, :, -self.window :], max(self.window - columns, 0)), slots)  # noqa: E731
        sinks = self.sinks_of(torch.full((1,), columns - 1, device=device))
        key, value = (torch.cat([sink[:, :, 0], newest(x)], 2) for x, sink in zip((self.key, self.value), sinks, strict=True))
        return Ring(key, value, seen, None if self.per_token is None else newest(self.per_token), self.window, self.sinks)


def _ahead(x: Tensor, columns: int) -> Tensor:
    """`x`, (B, H, C) or (B, H, C, .), with columns of zeros ahead of it."""
    return F.pad(x, (columns, 0) if x.dim() == 3 else (0, 0, columns, 0))


def _padding_first(real: Tensor) -> Tensor:
    """The columns of `real` (B, N), in their order but for those where it is False, which come first."""
    return real.int().argsort(dim=-1, stable=True)


def _numbered(runs: Tensor, hidden: Tensor | int) -> Tensor:
    """Each token's place in its sequence (B, C), -1 without a token; `hidden` (B, 1) tokens of the first sequence lie ahead."""
    starts = runs != F.pad(runs, (1, 0))[:, :-1]
    columns = torch.arange(runs.shape[1], device=runs.device)
    number = columns - torch.where(starts, columns, 0).cummax(-1).values + hidden * (starts.cumsum(-1) == 1)
    return number.masked_fill(runs == 0, -1)
