"""Paths that grow paddle by paddle, and the scene made of them."""

from __future__ import annotations

import math
import random
from bisect import bisect
from dataclasses import dataclass
from functools import reduce
from operator import or_

from .picture import end_of
from .rules import Paddle, Rules, Scene, step
from .stencils import Boards, Stencils, stencils


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
    tail = s.any_of(s.central_tails(angle), rng)
    if tail is None:
        return None
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
        tail = s.any_of(s.tails(boards.touched, angle), rng)
        if tail is None:
            continue
        contour = Contour.seeded(s, tail, angle)
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
