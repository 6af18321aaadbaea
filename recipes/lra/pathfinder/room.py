"""Where there is room for paddles: a grey mask of the image, and what is known of paddles before they lie anywhere."""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np

from .picture import grey_mask, sprite_reach
from .rules import Paddle, Rules, opposite, step

FULL = 255  # of a grey mask
TAKEN = 0.3 * FULL  # a seed keeps off pixels above it
CROSSING = 1.8 * FULL  # two paddles cross where their masks add up to it


class Room:
    """Paddles of one margin in an image of one size.

    A mask is a flat int16 array of the image with a guard of full pixels around it, so that no path needs a test for the edge. A place is
    the number of a pixel in it; offsets between pixels are numbers, too."""

    def __init__(self, rules: Rules, margin: int):
        self.rules, self.margin = rules, margin
        circle, reach = rules.paddle_length + margin, sprite_reach(rules, margin)
        self.guard = circle + reach + 1
        self.side = rules.size + 2 * self.guard
        self.empty = self.frame(rules.padding)
        along = np.arange(-reach, reach + 1)
        self.window = (along[:, None] * self.side + along).ravel()
        # heads: the whole-pixel points of a circle around a pivot, and the pixels near each of them
        turns = np.arange(0, 360, 360 / (2 * math.pi * circle)) * math.pi / 180
        self.heads = sorted({(math.floor(circle * math.sin(t)), math.floor(circle * math.cos(t))) for t in turns.tolist()})
        self.angles = np.array([math.atan2(row, column) for row, column in self.heads])
        disc = [(row, column) for row in along for column in along if math.hypot(row, column) <= margin]
        self.near = np.array([[(y + row) * self.side + x + column for y, x in self.heads] for row, column in disc])

    def frame(self, border: int) -> np.ndarray:
        """The mask in which all pixels less than `border` from an edge are full."""
        mask = np.full((self.side, self.side), FULL, np.int16)
        start, stop = self.guard + border, self.guard + self.rules.size - border
        mask[start:stop, start:stop] = 0
        return mask.ravel()

    def place(self, row: int, column: int) -> int:
        return (row + self.guard) * self.side + column + self.guard

    @cache  # noqa: B019  (a Room lives as long as the process, and there are some 400 angles)
    def body(self, angle: float) -> np.ndarray:
        """What a paddle of direction `angle` adds to the window around the point it is drawn from."""
        return np.round(grey_mask(self.rules, self.margin, angle) * FULL).astype(np.int16).ravel()

    def lay(self, mask: np.ndarray, paddle: Paddle) -> None:
        """Add a paddle to a mask."""
        (row, column), angle = paddle.drawn
        window = self.window + self.place(row, column)
        mask[window] = np.maximum(mask[window], self.body(angle))

    @cache  # noqa: B019
    def weights(self, angle: float) -> np.ndarray:
        """How likely each head is after a paddle of direction `angle`, where nothing is in its way."""
        turn = np.abs(self.angles - angle)
        turn = np.minimum(np.minimum(turn, 2 * math.pi - turn) * self.rules.continuity, math.pi / 2)
        return np.cos(turn) ** 2

    def gap_after(self, paddle: Paddle) -> tuple[int, int]:
        return step(paddle.pivot, paddle.angle, self.rules.paddle_length + 2 * self.margin)

    def seed(self, tail: tuple[int, int], angle: float) -> Paddle:
        pivot = step(step(tail, angle, self.rules.paddle_length), opposite(angle), self.rules.paddle_length + self.margin)
        return Paddle(pivot, tail, angle, is_seed=True)

    def follower(self, before: Paddle, mask: np.ndarray, rng: random.Random) -> Paddle | None:
        """A paddle after `before` that crosses nothing in `mask`, or None."""
        row, column = pivot = self.gap_after(before)
        if not (0 <= row < self.rules.size and 0 <= column < self.rules.size):
            return None
        around = self.place(row, column)
        chances = ((FULL - mask[self.near + around].max(0)) * self.weights(before.angle)).cumsum()
        if chances[-1] < 1e-4 * FULL:
            return None
        for _ in range(self.rules.paddle_trials):
            number = int(chances.searchsorted(rng.random() * chances[-1], side="right"))
            down, right = self.heads[number]
            paddle = Paddle(pivot, (row + down, column + right), float(self.angles[number]))
            (row_drawn, column_drawn), angle = paddle.drawn
            if (mask[self.window + self.place(row_drawn, column_drawn)] + self.body(angle)).max() < CROSSING:
                return paddle
        return None

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

    def tails(self, mask: np.ndarray, angle: float) -> np.ndarray:
        """(count, 2) rows and columns at which a seed of direction `angle` may begin."""
        taken = mask.reshape(self.side, self.side) > TAKEN
        low, high = self.guard, self.guard + self.rules.size
        free = np.full((self.rules.size, self.rules.size), bool(self.wanted(angle)))
        for row, column in self.wanted(angle):
            free &= ~taken[low + row : high + row, low + column : high + column]
        return np.argwhere(free)

    @cache  # noqa: B019
    def central_tails(self, angle: float) -> np.ndarray:
        """Where the first seed may begin: two seed distances from every edge."""
        return self.tails(self.frame(2 * self.rules.seed_distance), angle)


@cache
def room_for(rules: Rules, margin: int) -> Room:
    return Room(rules, margin)
