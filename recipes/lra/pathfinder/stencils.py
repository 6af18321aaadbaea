"""Where there is room: sets of pixels as Python integers, and what paddles take of them."""

from __future__ import annotations

import math
import random
from functools import cache
from typing import NamedTuple

import numpy as np

from .picture import grey_mask, stamp
from .rules import Rules

TOUCHED, COVERED = 0.4, 0.9


class Boards(NamedTuple):
    """A grey mask, kept as two sets of its pixels: those of at least TOUCHED keep seeds and heads away, those of at least COVERED may
    belong to one paddle only."""

    touched: int
    covered: int

    def __or__(self, other: Boards) -> Boards:
        return Boards(self.touched | other.touched, self.covered | other.covered)

    def __lshift__(self, shift: int) -> Boards:
        return Boards(self.touched << shift, self.covered << shift)


class Stencils:
    """Everything about paddles of one margin that does not depend on where they lie, computed once.

    A board is an integer whose bit row * stride + column says that a pixel is taken. The guard around the image is taken too, so that no
    path needs a test for the edge. A stencil is a board of the pixels around a point: shifted up by `shift(point)` it lies there, and a
    board shifted down by as much can be compared with it."""

    def __init__(self, rules: Rules, margin: int):
        self.rules, self.margin = rules, margin
        circle = rules.paddle_length + margin
        self.reach = circle + margin + math.ceil(rules.paddle_thickness)
        self.guard = circle + margin + self.reach
        self.stride = rules.size + 2 * self.guard
        self.window = (1 << (2 * self.reach + 1) * self.stride) - 1
        outside = self.outside(rules.padding)
        self.empty = Boards(outside, outside)
        # heads: the whole-pixel points of a circle around a pivot, each with the pixels that must be free there and those the paddle takes
        turns = np.arange(0, 360, 360 / (2 * math.pi * circle)) * math.pi / 180
        self.heads = sorted({(math.floor(circle * math.sin(t)), math.floor(circle * math.cos(t))) for t in turns.tolist()})
        self.angles = [math.atan2(row, column) for row, column in self.heads]
        grid = np.arange(-self.reach, self.reach + 1)
        discs = [self.stencil(np.hypot(grid[:, None] - row, grid[None] - column) <= margin) for row, column in self.heads]
        self.bodies = [self.surroundings(head, angle + math.pi) for head, angle in zip(self.heads, self.angles, strict=True)]
        self._numbered = list(zip(range(len(discs)), discs, strict=True))
        self._candidates: dict[float, list[tuple[int, int, float]]] = {}

    def shift(self, row: int, column: int) -> int:
        return (row + self.guard - self.reach) * self.stride + column + self.guard - self.reach

    def outside(self, border: int) -> int:
        """The board of the pixels that are not at least `border` from every edge."""
        inside = range(border, self.rules.size - border)
        inner = sum(1 << ((row + self.guard) * self.stride + column + self.guard) for row in inside for column in inside)
        return ((1 << self.stride * self.stride) - 1) ^ inner

    def stencil(self, takes: np.ndarray) -> int:
        """The stencil of a (2 reach + 1, 2 reach + 1) picture of booleans."""
        rows = np.zeros((len(takes), self.stride), bool)
        rows[:, : len(takes)] = takes
        return int.from_bytes(np.packbits(rows, bitorder="little").tobytes(), "little")

    def surroundings(self, start: tuple[int, int], angle: float) -> Boards:
        """The stencils of a paddle that leaves `start` in the direction `angle`."""
        grey = grey_mask(self.rules, self.margin, angle)
        far = len(grey) // 2 + self.reach
        whole = np.zeros((2 * far + 1, 2 * far + 1), np.float32)
        stamp(whole, grey, far + start[0], far + start[1])
        cut = whole[far - self.reach : far + self.reach + 1, far - self.reach : far + self.reach + 1]
        return Boards(self.stencil(cut >= TOUCHED), self.stencil(cut >= COVERED))

    def candidates(self, angle: float) -> list[tuple[int, int, float]]:
        """(number, pixels that must be free, weight) of the heads that may follow a paddle of direction `angle`."""
        known = self._candidates.get(angle)
        if known is None:
            known = []
            for number, disc in self._numbered:
                turn = abs(self.angles[number] - angle)
                turn = min(turn, 2 * math.pi - turn) * self.rules.continuity
                if turn < math.pi / 2:
                    known.append((number, disc, math.cos(turn) ** 2))
            self._candidates[angle] = known
        return known

    @cache  # noqa: B019  (a Stencils lives as long as the process, and there are 360 angles)
    def seed(self, angle: float) -> Boards:
        return self.surroundings((0, 0), angle)

    @cache  # noqa: B019
    def wanted(self, angle: float) -> list[tuple[int, int]]:
        """The (rows, columns) from a seed's tail to the pixels that must be free for it: those its paddle takes wholly, one further down
        and right. Empty where the published search finds no place for any seed: at a corner of the image all of them would lie outside,
        and there its dilation gives the least number there is, which it takes for a failure."""
        grey = grey_mask(self.rules, self.margin, angle)
        pixels = [(int(row) - len(grey) // 2 + 1, int(column) - len(grey) // 2 + 1) for row, column in np.argwhere(grey == 1)]
        corners = ((down, right) for down in (-1, 1) for right in (-1, 1))
        found = all(any(down * row <= 0 and right * column <= 0 for row, column in pixels) for down, right in corners)
        return pixels if found else []

    def tails(self, taken: int, angle: float) -> np.ndarray:
        """The numbers of the bits at which a seed of direction `angle` may begin beside the board `taken`."""
        wanted = self.wanted(angle)
        if not wanted:
            return np.zeros(0, np.int64)
        blocked = taken
        for row, column in wanted:
            offset = row * self.stride + column
            blocked |= taken >> offset if offset > 0 else taken << -offset
        count = self.stride * self.stride
        bits = np.frombuffer((blocked & ((1 << count) - 1)).to_bytes(count // 8 + 1, "little"), np.uint8)
        return np.flatnonzero(np.unpackbits(bits, count=count, bitorder="little") == 0)

    @cache  # noqa: B019
    def central_tails(self, angle: float) -> np.ndarray:
        """Where the first seed may begin: two seed distances from every edge."""
        return self.tails(self.outside(2 * self.rules.seed_distance), angle)

    def any_of(self, bits: np.ndarray, rng: random.Random) -> tuple[int, int] | None:
        """(row, column) of one of the bits, None of none."""
        if not len(bits):
            return None
        row, column = divmod(int(rng.choice(bits)), self.stride)
        return row - self.guard, column - self.guard


@cache
def stencils(rules: Rules, margin: int) -> Stencils:
    return Stencils(rules, margin)
