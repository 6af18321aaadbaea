"""Pathfinder images (Linsley et al. 2018, arXiv:1805.08315; Kim et al. 2020) with the sizes and numbers of the Long Range Arena release.

Two dashed paths of 14 paddles grow from two seeds near the middle; shorter distractors fill in. One marker lies on the tail of one path,
the other on the head of the same path (label 1) or of the other path (label 0). A path grows paddle by paddle: from the gap after the
last paddle, the next head lies on a circle, drawn with weight cos^2(continuity * turn), where no other paddle's surroundings lie.

What is taken from the rules and what is ours:
- A paddle's surroundings (its line widened by the margin) are a set of pixels, not grey levels; a board of such pixels is one Python
  integer, so a test for room is a shift and an "and". This makes a 32 x 32 image in about a millisecond.
- Surroundings of different paths never overlap, seeds and last paddles included, so that a label is never in doubt; nor do
  the markers touch each other.
- A path with no room to go on begins a new image, as in the published generator; at 64 and 128 pixels, where one beginning in 3000 or in
  100 ends well, it first takes back its last paddles and tries again, up to 30 times.
- At 32 pixels the distractors are brighter than the paths (2 to 1.5), because the published generator multiplies the contrast of a
  snake by that of a paddle for the two paths alone. A distractor with no room for its full length is left out, as there.
- Labels alternate, so each split whose size is even is balanced exactly.

Every image depends on (seed, its number) alone.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import or_

import numpy as np
from PIL import Image, ImageDraw


@dataclass(frozen=True)
class Rules:
    """Lengths in pixels. The contrasts multiply the brightness of the paths' and of the distractors' paddles; an image is then scaled so
    that its brightest pixel is 255."""

    size: int
    seed_distance: int
    marker_radius: float
    paddle_length: int
    paddle_thickness: float
    margins: tuple[int, ...]
    continuity: float
    contrast: float
    distractor_contrast: float
    distractors: int
    contour_length: int = 14
    distractor_length: int = 4
    padding: int = 1
    antialias: int = 2
    paddle_trials: int = 3
    distractor_trials: int = 5
    setbacks: int = 0
    take_back: int = 4


# The numbers the release documents for 32, 64 and 128 (distractor length contour_length // 3, their number 20, 22, 35 over it).
RULES = {
    32: Rules(
        32,
        seed_distance=7,
        marker_radius=1.5,
        paddle_length=2,
        paddle_thickness=0.5,
        margins=(1,),
        continuity=1.0,
        contrast=1.5,
        distractor_contrast=2.0,
        distractors=5,
    ),
    64: Rules(
        64,
        seed_distance=12,
        marker_radius=2.5,
        paddle_length=5,
        paddle_thickness=1.0,
        margins=(1,),
        continuity=1.8,
        contrast=0.8,
        distractor_contrast=0.8,
        distractors=5,
        setbacks=30,
    ),
    128: Rules(
        128,
        seed_distance=20,
        marker_radius=3,
        paddle_length=5,
        paddle_thickness=1.5,
        margins=(2, 3),
        continuity=1.8,
        contrast=0.9,
        distractor_contrast=0.9,
        distractors=8,
        setbacks=30,
    ),
}


@dataclass(frozen=True)
class Paddle:
    """One dash. pivot: the middle of the gap before it; tail, head: its ends; each (row, column). angle: from pivot to head, radians,
    rows downwards."""

    pivot: tuple[int, int]
    tail: tuple[float, float]
    head: tuple[float, float]
    angle: float


@dataclass(frozen=True)
class Scene:
    """What an image shows: two paths and the distractors, each a list of paddles from tail to head, and the two markers' (row, column)."""

    margin: int
    paths: tuple[list[Paddle], list[Paddle]]
    distractors: list[list[Paddle]]
    markers: tuple[tuple[float, float], tuple[float, float]]
    label: int


def step(point: tuple[int, int], angle: float, distance: float) -> tuple[int, int]:
    """The whole-pixel point `distance` from `point` in the direction `angle`, rounded up as the published generator does."""
    return point[0] + math.ceil(distance * math.sin(angle) - 1e-9), point[1] + math.ceil(distance * math.cos(angle) - 1e-9)


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
        inside = range(rules.padding, rules.size - rules.padding)
        inner = sum(1 << ((row + self.guard) * self.stride + column + self.guard) for row in inside for column in inside)
        self.empty = ((1 << self.stride * self.stride) - 1) ^ inner
        # heads: the whole-pixel points of a circle around a pivot, each with the pixels that must be free there and those the paddle takes
        turns = np.arange(0, 360, 360 / (2 * math.pi * circle)) * math.pi / 180
        self.heads = sorted({(math.floor(circle * math.sin(t)), math.floor(circle * math.cos(t))) for t in turns.tolist()})
        self.angles = [math.atan2(row, column) for row, column in self.heads]
        self.grid = np.arange(-self.reach, self.reach + 1)
        discs = [self.stencil(np.hypot(self.grid[:, None] - row, self.grid[None] - column) <= margin) for row, column in self.heads]
        self.bodies = [self.surroundings(head, angle + math.pi) for head, angle in zip(self.heads, self.angles, strict=True)]
        self._numbered = list(zip(range(len(discs)), discs, strict=True))
        self._candidates: dict[float, list[tuple[int, int, float]]] = {}

    def shift(self, row: int, column: int) -> int:
        return (row + self.guard - self.reach) * self.stride + column + self.guard - self.reach

    def stencil(self, takes: np.ndarray) -> int:
        """The stencil of a (2 reach + 1, 2 reach + 1) picture of booleans."""
        rows = np.zeros((len(takes), self.stride), bool)
        rows[:, : len(takes)] = takes
        return int.from_bytes(np.packbits(rows, bitorder="little").tobytes(), "little")

    def surroundings(self, start: tuple[float, float], angle: float) -> int:
        """The pixels near a paddle that leaves `start` in the direction `angle`: its line widened by the margin, a pixel counted when
        mostly covered."""
        length, near = self.rules.paddle_length, self.margin + self.rules.paddle_thickness / 2 - 0.25
        y, x = self.grid[:, None] - start[0], self.grid[None] - start[1]
        along = np.clip(y * math.sin(angle) + x * math.cos(angle), 0, length)
        return self.stencil(np.hypot(y - along * math.sin(angle), x - along * math.cos(angle)) <= near)

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

    @lru_cache(maxsize=512)  # noqa: B019  (a Stencils lives as long as the process)
    def seed(self, angle: float) -> int:
        return self.surroundings((0, 0), angle)


@lru_cache(maxsize=16)
def stencils(rules: Rules, margin: int) -> Stencils:
    return Stencils(rules, margin)


@dataclass
class Contour:
    """A path while it grows: its paddles and the board that each takes. A paddle may touch the one before it, and nothing else."""

    paddles: list[Paddle]
    boards: list[int]

    @classmethod
    def seeded(cls, s: Stencils, tail: tuple[int, int], angle: float) -> Contour:
        length = s.rules.paddle_length
        head = (tail[0] + length * math.sin(angle), tail[1] + length * math.cos(angle))
        return cls([Paddle(step(tail, angle, -s.margin), tail, head, angle)], [s.seed(angle) << s.shift(*tail)])

    def extend(self, s: Stencils, rng: random.Random, board: int) -> bool:
        """Grow by one paddle that keeps off `board`, which holds all but this contour's own last paddle. False if there is no room."""
        before, length = self.paddles[-1], s.rules.paddle_length
        row, column = pivot = step(before.pivot, before.angle, length + 2 * s.margin)
        if not (0 <= row < s.rules.size and 0 <= column < s.rules.size):
            return False
        shift = s.shift(row, column)
        around = board >> shift & s.window
        numbers, sums, total = [], [], 0.0
        for number, disc, weight in s.candidates(before.angle):
            if not around & disc:
                total += weight
                numbers.append(number)
                sums.append(total)
        if total < 1e-4:
            return False
        for _ in range(s.rules.paddle_trials):
            number = numbers[bisect(sums, rng.random() * total, hi=len(sums) - 1)]
            if not around & s.bodies[number]:
                angle, (down, right) = s.angles[number], s.heads[number]
                head = (row + down, column + right)
                tail = (head[0] - length * math.sin(angle), head[1] - length * math.cos(angle))
                self.paddles.append(Paddle(pivot, tail, head, angle))
                self.boards.append(s.bodies[number] << shift)
                return True
        return False

    def take_back(self, count: int) -> None:
        keep = max(1, len(self.paddles) - count)
        del self.paddles[keep:], self.boards[keep:]


def union(boards: Iterable[int]) -> int:
    return reduce(or_, boards, 0)


def two_paths(s: Stencils, rng: random.Random) -> tuple[list[Paddle], list[Paddle], int] | None:
    """Two paths of full length and the board they take, or None where the attempt ran into itself too often."""
    rules = s.rules
    low, high = 2 * rules.seed_distance, rules.size - 2 * rules.seed_distance
    tail = (rng.randrange(low, high), rng.randrange(low, high))
    around = rng.randrange(360) * math.pi / 180
    other = (round(tail[0] + rules.seed_distance * math.sin(around)), round(tail[1] + rules.seed_distance * math.cos(around)))
    first, second = (Contour.seeded(s, point, rng.randrange(-180, 180) * math.pi / 180) for point in (tail, other))
    if first.boards[0] & second.boards[0] or (first.boards[0] | second.boards[0]) & s.empty:
        return None
    settled = s.empty
    setbacks = 0
    while len(second.paddles) < rules.contour_length or len(first.paddles) < rules.contour_length:
        shorter, longer = (first, second) if len(first.paddles) <= len(second.paddles) else (second, first)
        if shorter.extend(s, rng, settled | longer.boards[-1]):
            settled |= shorter.boards[-2]
            continue
        setbacks += 1
        if setbacks > rules.setbacks:
            return None
        shorter.take_back(rules.take_back)
        settled = s.empty | union(first.boards[:-1]) | union(second.boards[:-1])
    return first.paddles, second.paddles, settled | first.boards[-1] | second.boards[-1]


def distractor(s: Stencils, rng: random.Random, board: int) -> tuple[list[Paddle], int]:
    """A path of distractor_length paddles and the board with it; an empty path where none found room."""
    inside = range(s.rules.padding, s.rules.size - s.rules.padding)
    for _ in range(s.rules.distractor_trials):
        contour = Contour.seeded(s, (rng.choice(inside), rng.choice(inside)), rng.randrange(-180, 180) * math.pi / 180)
        if contour.boards[0] & board:
            continue
        taken = board
        while len(contour.paddles) < s.rules.distractor_length and contour.extend(s, rng, taken):
            taken |= contour.boards[-2]
        if len(contour.paddles) == s.rules.distractor_length:
            return contour.paddles, taken | contour.boards[-1]
    return [], board


def make_scene(rules: Rules, seed: int, number: int, attempt: int = 0) -> Scene:
    """Scene `number`; its label is number % 2. `attempt` gives another scene in its place."""
    rng = random.Random(f"{seed} {rules.size} {number} {attempt}")
    margin = rng.choice(rules.margins)
    s = stencils(rules, margin)
    label, origin = number % 2, rng.randrange(2)
    terminal = origin if label else 1 - origin
    while True:
        grown = two_paths(s, rng)
        if grown is None:
            continue
        *paths, board = grown
        markers = (paths[origin][0].tail, paths[terminal][-1].head)
        if math.dist(*markers) > 2 * rules.marker_radius + 2:
            break
    distractors = []
    for _ in range(rules.distractors):
        paddles, board = distractor(s, rng, board)
        if paddles:
            distractors.append(paddles)
    return Scene(margin, (paths[0], paths[1]), distractors, markers, label)


@lru_cache(maxsize=4096)
def paddle_sprite(rules: Rules, contrast: float, angle: float, row: float, column: float) -> np.ndarray:
    """A paddle's picture, float32 in [0, contrast], drawn `antialias` times larger and scaled down; (row, column): its tail's offset from
    the middle pixel."""
    reach, scale = _sprite_reach(rules), rules.antialias
    side = (2 * reach + 1) * scale
    canvas = Image.new("L", (side, side))
    middle = (reach + 0.5) * scale - 0.5
    y, x = middle + row * scale, middle + column * scale
    length = rules.paddle_length * scale
    ImageDraw.Draw(canvas).line(
        [(x, y), (x + length * math.cos(angle), y + length * math.sin(angle))], fill=255, width=round(rules.paddle_thickness * scale)
    )
    small = canvas.resize((2 * reach + 1, 2 * reach + 1), Image.Resampling.LANCZOS)
    return np.asarray(small, np.float32) * (contrast / 255)


def _sprite_reach(rules: Rules) -> int:
    return rules.paddle_length + math.ceil(rules.paddle_thickness) + 2


@lru_cache(maxsize=64)
def marker_sprite(radius: float, scale: int) -> np.ndarray:
    """A filled disc, float32 in [0, 1]."""
    reach = math.ceil(radius) + 1
    grid = (np.arange((2 * reach + 1) * scale) + 0.5) / scale - reach - 0.5
    disc = np.where(grid[:, None] ** 2 + grid[None] ** 2 <= radius**2, 255, 0).astype(np.uint8)
    small = Image.fromarray(disc).resize((2 * reach + 1, 2 * reach + 1), Image.Resampling.LANCZOS)
    return np.asarray(small, np.float32) / 255


def render(rules: Rules, scene: Scene) -> np.ndarray:
    """The image, (size, size) uint8."""
    reach = _sprite_reach(rules)
    border = reach + math.ceil(rules.marker_radius) + 1
    canvas = np.zeros((rules.size + 2 * border, rules.size + 2 * border), np.float32)
    contrasts = [rules.contrast] * 2 + [rules.distractor_contrast] * len(scene.distractors)
    for path, contrast in zip((*scene.paths, *scene.distractors), contrasts, strict=True):
        for paddle in path:
            # sprites are kept per angle and tenth of a pixel: a tail is a whole pixel (seeds) or a head less a fixed vector
            row, column = round(paddle.tail[0]), round(paddle.tail[1])
            sprite = paddle_sprite(rules, contrast, paddle.angle, round(paddle.tail[0] - row, 1), round(paddle.tail[1] - column, 1))
            _stamp(canvas, sprite, row + border, column + border)
    sprite = marker_sprite(rules.marker_radius, rules.antialias)
    for marker in scene.markers:
        _stamp(canvas, sprite, int(marker[0]) + border, int(marker[1]) + border)
    image = canvas[border:-border, border:-border]
    return (image * (255 / image.max()) + 0.5).astype(np.uint8)


def _stamp(canvas: np.ndarray, sprite: np.ndarray, row: int, column: int) -> None:
    reach = sprite.shape[0] // 2
    window = canvas[row - reach : row + reach + 1, column - reach : column + reach + 1]
    np.maximum(window, sprite, out=window)
