"""The numbers of the three sizes of picture, and what a picture shows."""

from __future__ import annotations

import math
from dataclasses import dataclass


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


def step(point: tuple[int, int], angle: float, distance: float) -> tuple[int, int]:
    """The whole-pixel point `distance` from `point` in the direction `angle`, rounded up as the published generator does. Near the upper
    and the left edge the sine of pi, 1e-16, is not lost in the sum, so that straight paths lean there; at 32 pixels this can be seen."""
    return math.ceil(point[0] + distance * math.sin(angle)), math.ceil(point[1] + distance * math.cos(angle))


def opposite(angle: float) -> float:
    """The direction against `angle`, both in [-pi, pi]."""
    return angle + math.pi if angle < 0 else angle - math.pi


@dataclass(frozen=True)
class Paddle:
    """One dash. pivot: the middle of the gap before it; end: the whole pixel from which it is drawn, a seed's tail and any other's head;
    each (row, column). angle: from tail to head, radians, rows downwards."""

    pivot: tuple[int, int]
    end: tuple[int, int]
    angle: float
    is_seed: bool = False

    @property
    def drawn(self) -> tuple[tuple[int, int], float]:
        """Its end and the direction in which it is drawn from there."""
        return self.end, self.angle if self.is_seed else opposite(self.angle)


@dataclass(frozen=True)
class Scene:
    """What an image shows: two paths and the distractors, each a list of paddles from tail to head, and the two markers' (row, column)."""

    margin: int
    paths: tuple[list[Paddle], list[Paddle]]
    distractors: list[list[Paddle]]
    markers: tuple[tuple[int, int], tuple[int, int]]
    label: int
