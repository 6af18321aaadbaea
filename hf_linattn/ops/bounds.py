"""Where f(s) = a + b s + c s^2 stays positive: the bounds that options, learned numbers and the operator's own check share."""

import math


def largest_temperature(a: float, b: float) -> float:
    """Up to this temperature a + b s > 0 for every s that queries and keys of unit length can give, |s| <= temperature."""
    return math.inf if b == 0 else a / abs(b)


def largest_slope(a: float, c: float) -> float:
    """Below this |b|, a + b s + c s^2 > 0 for every s (c > 0)."""
    return 2 * math.sqrt(a * c)


def least_weight(a: float, b: float, c: float, reach: float) -> float:
    """The least of f over |s| <= reach: at the vertex of the parabola where it lies within, at an end otherwise."""
    at_an_end = a - abs(b) * reach + c * reach**2
    return at_an_end if c <= 0 or abs(b) > 2 * c * reach else a - b * b / (4 * c)
