"""Paths that grow paddle by paddle, and the scene made of them."""

from __future__ import annotations

import math
import random
from itertools import combinations

import numpy as np

from .room import Room, room_for
from .rules import Paddle, Rules, Scene

Gaps = set[tuple[int, int]]


def two_paths(room: Room, rng: random.Random) -> tuple[list[Paddle], list[Paddle], np.ndarray] | None:
    """Two paths of full length and the mask with both, or None where the attempt ran into itself too often or leaves a label in doubt.

    They grow in turn; while they do, neither's last paddle is in the mask."""
    rules = room.rules
    angle = random_angle(rng)
    tail = any_of(room.central_tails(angle), rng)
    if tail is None:
        return None
    other_angle, around = random_angle(rng), random_angle(rng)
    other = (round(tail[0] + rules.seed_distance * math.sin(around)), round(tail[1] + rules.seed_distance * math.cos(around)))
    first, second = [room.seed(tail, angle)], [room.seed(other, other_angle)]
    mask = room.empty.copy()
    setbacks = 0
    while len(second) < rules.contour_length:
        shorter = first if len(first) <= len(second) else second
        paddle = room.follower(shorter[-1], mask, rng)
        if paddle is not None:
            room.lay(mask, shorter[-1])
            shorter.append(paddle)
            continue
        setbacks += 1
        if setbacks > rules.setbacks:
            return None
        del shorter[max(1, len(shorter) - rules.take_back) :]
        mask = room.empty.copy()
        for paddle in (*first[:-1], *second[:-1]):
            room.lay(mask, paddle)
    if len(gaps(room, first) | gaps(room, second)) < 2 * (rules.contour_length + 1):
        return None
    ends = [paddle.end for path in (first, second) for paddle in (path[0], path[-1])]
    if min(math.dist(*pair) for pair in combinations(ends, 2)) <= rules.marker_radius:  # a marker would cover two
        return None
    room.lay(mask, first[-1])
    room.lay(mask, second[-1])
    return first, second, mask


def distractor(room: Room, rng: random.Random, mask: np.ndarray, others: Gaps) -> tuple[list[Paddle], np.ndarray]:
    """A path of distractor_length paddles, each from a gap of its own, not in `others`, and the mask with it; an empty path and the mask
    as it was where none found room."""
    length = room.rules.distractor_length
    for _ in range(room.rules.distractor_trials):
        angle = random_angle(rng)
        tail = any_of(room.tails(mask, angle), rng)
        if tail is None:
            continue
        path, own = [room.seed(tail, angle)], mask.copy()
        while len(path) < length and (paddle := room.follower(path[-1], own, rng)) is not None:
            room.lay(own, path[-1])
            path.append(paddle)
        if len(gaps(room, path) | others) == length + 1 + len(others):
            room.lay(own, path[-1])
            return path, own
    return [], mask


def gaps(room: Room, path: list[Paddle]) -> Gaps:
    """The middles of the gaps before every paddle and after the last."""
    return {room.gap_after(path[-1]), *(paddle.pivot for paddle in path)}


def random_angle(rng: random.Random) -> float:
    return rng.randrange(-180, 180) * math.pi / 180


def any_of(points: np.ndarray, rng: random.Random) -> tuple[int, int] | None:
    """One row of (count, 2) points, None of none."""
    if not len(points):
        return None
    row, column = points[rng.randrange(len(points))].tolist()
    return row, column


def make_scene(rules: Rules, seed: int, number: int, attempt: int = 0) -> Scene:
    """Scene `number`; its label is number % 2. `attempt` gives another scene in its place."""
    rng = random.Random(f"{seed} {rules.size} {number} {attempt}")
    margin = rng.choice(rules.margins)
    room = room_for(rules, margin)
    label, origin = number % 2, rng.randrange(2)
    terminal = origin if label else 1 - origin
    while True:
        grown = two_paths(room, rng)
        if grown is None:
            continue
        *paths, mask = grown
        markers = (paths[origin][0].end, paths[terminal][-1].end)
        if math.dist(*markers) > 2 * rules.marker_radius + 2:
            break
    distractors: list[list[Paddle]] = []
    taken = gaps(room, paths[0]) | gaps(room, paths[1])
    for _ in range(rules.distractors):
        path, mask = distractor(room, rng, mask, taken)
        if path:
            distractors.append(path)
            taken |= gaps(room, path)
    return Scene(margin, (paths[0], paths[1]), distractors, markers, label)
