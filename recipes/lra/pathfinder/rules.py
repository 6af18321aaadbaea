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
