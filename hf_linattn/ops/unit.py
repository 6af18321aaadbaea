"""Unit length per token, with a gradient that stays finite at zero."""

import torch
from torch import Tensor

SMALLEST_SQUARE = 1e-24  # |x| <= 1e-12 has no direction: its unit vector and its gradient are zero


def inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| over the last dimension, kept, and 0 where |x| <= 1e-12."""
    square = (x * x).sum(-1, keepdim=True)
    has_direction = square > SMALLEST_SQUARE
    return torch.where(has_direction, square, 1).rsqrt() * has_direction


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, and 0 where |x| <= 1e-12 (where a clamped norm would give gradients of 1e12)."""
    return x * inverse_norm(x)


def unit_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient that reaches x when `grad` is that of `unit(x)`: the part across x, over |x|."""
    scale = inverse_norm(x)
    direction = x * scale
    return (grad - direction * (grad * direction).sum(-1, keepdim=True)) * scale
