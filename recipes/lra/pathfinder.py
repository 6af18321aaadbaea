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
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import or_
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

TOUCHED, COVERED = 0.4, 0.9


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

    @lru_cache(maxsize=512)  # noqa: B019  (a Stencils lives as long as the process)
    def seed(self, angle: float) -> Boards:
        return self.surroundings((0, 0), angle)

    @lru_cache(maxsize=512)  # noqa: B019
    def wanted(self, angle: float) -> list[tuple[int, int]]:
        """The (rows, columns) from a seed's tail to the pixels that must be free for it: those its paddle takes wholly, one further down
        and right. Empty where the published search finds no place for any seed: at a corner of the image all of them would lie outside,
        and there its dilation gives the least number there is, which it takes for a failure."""
        grey = grey_mask(self.rules, self.margin, angle)
        pixels = [(int(row) - len(grey) // 2 + 1, int(column) - len(grey) // 2 + 1) for row, column in np.argwhere(grey == 1)]
        corners = ((down, right) for down in (-1, 1) for right in (-1, 1))
        found = all(any(down * row <= 0 and right * column <= 0 for row, column in pixels) for down, right in corners)
        return pixels if found else []

    def tails(self, taken: int, angle: float) -> list[tuple[int, int]]:
        """Every (row, column) at which a seed of direction `angle` may begin beside the board `taken`."""
        wanted = self.wanted(angle)
        if not wanted:
            return []
        blocked = taken
        for row, column in wanted:
            offset = row * self.stride + column
            blocked |= taken >> offset if offset > 0 else taken << -offset
        count = self.stride * self.stride
        bits = np.frombuffer((blocked & ((1 << count) - 1)).to_bytes(count // 8 + 1, "little"), np.uint8)
        free = np.flatnonzero(np.unpackbits(bits, count=count, bitorder="little") == 0).tolist()
        return [(place // self.stride - self.guard, place % self.stride - self.guard) for place in free]

    @lru_cache(maxsize=512)  # noqa: B019
    def central_tails(self, angle: float) -> list[tuple[int, int]]:
        """Where the first seed may begin: two seed distances from every edge."""
        return self.tails(self.outside(2 * self.rules.seed_distance), angle)


@lru_cache(maxsize=16)
def stencils(rules: Rules, margin: int) -> Stencils:
    return Stencils(rules, margin)


@dataclass
class Contour:
    """A path while it grows: its paddles and what each takes. A paddle may touch the one before it, and nothing else."""

    paddles: list[Paddle]
    boards: list[Boards]

    @classmethod
    def seeded(cls, s: Stencils, tail: tuple[int, int], angle: float) -> Contour:
        length = s.rules.paddle_length
        pivot = step(step(tail, angle, length), angle + math.pi, length + s.margin)
        down, right = end_of(s.rules, angle)
        return cls([Paddle(pivot, tail, (tail[0] + down, tail[1] + right), angle)], [s.seed(angle) << s.shift(*tail)])

    def extend(self, s: Stencils, rng: random.Random, boards: Boards) -> bool:
        """Grow by one paddle that keeps off `boards`, which hold all but this contour's own last paddle. False if there is no room."""
        before = self.paddles[-1]
        row, column = pivot = gap_after(s, before)
        if not (0 <= row < s.rules.size and 0 <= column < s.rules.size):
            return False
        shift = s.shift(row, column)
        touched, covered = boards.touched >> shift & s.window, boards.covered >> shift & s.window
        numbers, sums, total = [], [], 0.0
        for number, disc, weight in s.candidates(before.angle):
            if not touched & disc:
                total += weight
                numbers.append(number)
                sums.append(total)
        if total < 1e-4:
            return False
        for _ in range(s.rules.paddle_trials):
            number = numbers[bisect(sums, rng.random() * total, hi=len(sums) - 1)]
            if not covered & s.bodies[number].covered:
                head = (row + s.heads[number][0], column + s.heads[number][1])
                down, right = end_of(s.rules, s.angles[number] + math.pi)
                self.paddles.append(Paddle(pivot, (head[0] + down, head[1] + right), head, s.angles[number]))
                self.boards.append(s.bodies[number] << shift)
                return True
        return False

    def take_back(self, count: int) -> None:
        keep = max(1, len(self.paddles) - count)
        del self.paddles[keep:], self.boards[keep:]


def two_paths(s: Stencils, rng: random.Random) -> tuple[list[Paddle], list[Paddle], Boards] | None:
    """Two paths of full length and the board they take, or None where the attempt ran into itself too often."""
    rules = s.rules
    angle, other_angle, around = (random_angle(rng) for _ in range(3))
    tails = s.central_tails(angle)
    if not tails:
        return None
    tail = rng.choice(tails)
    other = (round(tail[0] + rules.seed_distance * math.sin(around)), round(tail[1] + rules.seed_distance * math.cos(around)))
    first, second = Contour.seeded(s, tail, angle), Contour.seeded(s, other, other_angle)
    if second.boards[0].covered & (s.empty | first.boards[0]).covered:
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
        settled = reduce(or_, first.boards[:-1] + second.boards[:-1], s.empty)
    if len(gaps(s, first.paddles) | gaps(s, second.paddles)) < 2 * (rules.contour_length + 1):
        return None
    return first.paddles, second.paddles, settled | first.boards[-1] | second.boards[-1]


def gaps(s: Stencils, path: list[Paddle]) -> set[tuple[int, int]]:
    """The middles of the gaps before every paddle and after the last."""
    return {gap_after(s, path[-1]), *(paddle.pivot for paddle in path)}


def gap_after(s: Stencils, paddle: Paddle) -> tuple[int, int]:
    return step(paddle.pivot, paddle.angle, s.rules.paddle_length + 2 * s.margin)


def distractor(s: Stencils, rng: random.Random, boards: Boards, others: set[tuple[int, int]]) -> tuple[list[Paddle], Boards]:
    """A path of distractor_length paddles, each from a gap of its own, not in `others`, and the boards with it; an empty path where none
    found room."""
    for _ in range(s.rules.distractor_trials):
        angle = random_angle(rng)
        tails = s.tails(boards.touched, angle)
        if not tails:
            continue
        contour = Contour.seeded(s, rng.choice(tails), angle)
        if contour.boards[0].covered & boards.covered:
            continue
        taken = boards
        while len(contour.paddles) < s.rules.distractor_length and contour.extend(s, rng, taken):
            taken |= contour.boards[-2]
        own = gaps(s, contour.paddles)
        if len(own | others) == s.rules.distractor_length + 1 + len(others):
            return contour.paddles, taken | contour.boards[-1]
    return [], boards


def random_angle(rng: random.Random) -> float:
    return rng.randrange(-180, 180) * math.pi / 180


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
        *paths, boards = grown
        markers = (paths[origin][0].tail, paths[terminal][-1].head)
        if math.dist(*markers) > 2 * rules.marker_radius + 2:
            break
    distractors: list[list[Paddle]] = []
    taken = gaps(s, paths[0]) | gaps(s, paths[1])
    for _ in range(rules.distractors):
        paddles, boards = distractor(s, rng, boards, taken)
        if paddles:
            distractors.append(paddles)
            taken |= gaps(s, paddles)
    return Scene(margin, (paths[0], paths[1]), distractors, markers, label)


def render(rules: Rules, scene: Scene) -> np.ndarray:
    """The image, (size, size) uint8."""
    border = sprite_reach(rules, scene.margin) + math.ceil(rules.marker_radius) + 1
    canvas = np.zeros((rules.size + 2 * border, rules.size + 2 * border), np.float32)
    for paths, contrast in ((scene.paths, rules.contrast), (scene.distractors, rules.distractor_contrast)):
        for path in paths:
            for number, paddle in enumerate(path):
                # a seed is drawn from its tail, every other paddle from its head: these are whole pixels
                (row, column), angle = (paddle.head, paddle.angle + math.pi) if number else (paddle.tail, paddle.angle)
                stamp(canvas, paddle_sprite(rules, scene.margin, contrast, angle), int(row) + border, int(column) + border)
    for row, column in scene.markers:
        stamp(canvas, marker_sprite(rules.marker_radius, rules.antialias), int(row) + border, int(column) + border)
    image = canvas[border:-border, border:-border]
    return (image * (255 / image.max()) + 0.5).astype(np.uint8)


def stamp(canvas: np.ndarray, sprite: np.ndarray, row: int, column: int) -> None:
    reach = sprite.shape[0] // 2
    window = canvas[row - reach : row + reach + 1, column - reach : column + reach + 1]
    np.maximum(window, sprite, out=window)


def end_of(rules: Rules, angle: float) -> tuple[float, float]:
    """Where a paddle drawn from (0, 0) in the direction `angle` ends: a whole pixel of the enlarged drawing."""
    down, right = step((0, 0), angle, rules.paddle_length * rules.antialias)
    return down / rules.antialias, right / rules.antialias


def sprite_reach(rules: Rules, margin: int) -> int:
    return rules.paddle_length + math.ceil(rules.paddle_thickness) + margin


def enlarged_paddle(rules: Rules, margin: int, angle: float) -> np.ndarray:
    """The pixels of a paddle that leaves the middle of a picture `antialias` times as fine, of booleans."""
    middle = sprite_reach(rules, margin) * rules.antialias
    picture = Image.new("1", (2 * middle + 1, 2 * middle + 1))
    row, column = step((middle, middle), angle, rules.paddle_length * rules.antialias)
    ImageDraw.Draw(picture).line([(middle, middle), (column, row)], fill=1, width=round(rules.paddle_thickness * rules.antialias))
    return np.asarray(picture, bool)


def reduced(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture of booleans at `side` by `side` pixels, (side, side) float32 in [0, 1] by steps of 1/255."""
    grey = Image.fromarray(np.where(picture, 255, 0).astype(np.uint8)).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(grey, np.float32) / 255


@lru_cache(maxsize=4096)
def paddle_sprite(rules: Rules, margin: int, contrast: float, angle: float) -> np.ndarray:
    """The picture of a paddle that leaves the middle in the direction `angle`."""
    return contrast * reduced(enlarged_paddle(rules, margin, angle), 2 * sprite_reach(rules, margin) + 1)


def grey_mask(rules: Rules, margin: int, angle: float) -> np.ndarray:
    """The surroundings of a paddle that leaves the middle in the direction `angle`: its line widened by the margin, in [0, 1]."""
    line = enlarged_paddle(rules, margin, angle)
    rows, columns = np.nonzero(line)
    y, x = np.indices(line.shape)[..., None]
    near = np.hypot(y - rows, x - columns).min(-1) <= margin * rules.antialias
    return reduced(near, 2 * sprite_reach(rules, margin) + 1)


@lru_cache(maxsize=64)
def marker_sprite(radius: float, antialias: int) -> np.ndarray:
    """A filled disc around a whole pixel of the enlarged drawing."""
    reach = math.ceil(radius) + 1
    along = np.arange((2 * reach + 1) * antialias) - reach * antialias
    return reduced(np.hypot(along[:, None], along[None]) <= radius * antialias, 2 * reach + 1)
