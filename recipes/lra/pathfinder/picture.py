"""The picture of a scene: black and white, `antialias` times as fine, made smaller and laid over one another by the maximum."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .rules import Rules, Scene, step


def render(rules: Rules, scene: Scene) -> np.ndarray:
    """The image, (size, size) uint8."""
    border = sprite_reach(rules, scene.margin) + marker_reach(rules.marker_radius)
    canvas = np.zeros((rules.size + 2 * border, rules.size + 2 * border))
    for paths, contrast in ((scene.paths, rules.contrast), (scene.distractors, rules.distractor_contrast)):
        for path in paths:
            for paddle in path:
                (row, column), angle = paddle.drawn
                stamp(canvas, paddle_sprite(rules, scene.margin, contrast, angle), row + border, column + border)
    for row, column in scene.markers:
        stamp(canvas, marker_sprite(rules.marker_radius, rules.antialias), row + border, column + border)
    image = canvas[border:-border, border:-border]
    return (image * (255 / image.max()) + 0.5).astype(np.uint8)


def stamp(canvas: np.ndarray, sprite: np.ndarray, row: int, column: int) -> None:
    reach = sprite.shape[0] // 2
    window = canvas[row - reach : row + reach + 1, column - reach : column + reach + 1]
    np.maximum(window, sprite, out=window)


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


@cache
def paddle_sprite(rules: Rules, margin: int, contrast: float, angle: float) -> np.ndarray:
    """The picture of a paddle that leaves the middle in the direction `angle`."""
    return contrast * reduced(enlarged_paddle(rules, margin, angle), 2 * sprite_reach(rules, margin) + 1)


@cache
def grey_mask(rules: Rules, margin: int, angle: float) -> np.ndarray:
    """The surroundings of a paddle that leaves the middle in the direction `angle`: its line widened by the margin, in [0, 1]."""
    line = enlarged_paddle(rules, margin, angle)
    rows, columns = np.nonzero(line)
    y, x = np.indices(line.shape)[..., None]
    near = np.hypot(y - rows, x - columns).min(-1) <= margin * rules.antialias
    return reduced(near, 2 * sprite_reach(rules, margin) + 1)


def marker_reach(radius: float) -> int:
    return math.ceil(radius) + 3  # as far as Lanczos's window sees


@cache
def marker_sprite(radius: float, antialias: int) -> np.ndarray:
    """A filled disc around a whole pixel of the enlarged drawing."""
    reach = marker_reach(radius)
    along = np.arange((2 * reach + 1) * antialias) - reach * antialias
    return reduced(np.hypot(along[:, None], along[None]) <= radius * antialias, 2 * reach + 1)
