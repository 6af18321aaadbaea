"""The bounds on f(s) = a + b s + c s^2 against f itself, for s that reach to 1, less far and farther."""

import itertools
import math

import pytest
import torch

from hf_linattn.ops.bounds import largest_slope, largest_temperature, least_weight


def f(a: float, b: float, c: float, reach: float) -> torch.Tensor:
    s = torch.linspace(-reach, reach, 200_001, dtype=torch.float64)
    return a + b * s + c * s * s


@pytest.mark.parametrize("reach", [0.25, 1.0, 3.0])
def test_the_least_weight_is_that_of_f(reach: float) -> None:
    for a, b, c in itertools.product((0.5, 2.0), (-3.0, -0.4, 0.0, 0.4, 3.0), (-0.7, 0.0, 0.3, 2.0)):
        assert least_weight(a, b, c, reach) == pytest.approx(f(a, b, c, reach).min().item(), abs=1e-8), (a, b, c)


@pytest.mark.parametrize(("a", "b", "c"), [(1.0, 1.0, 0.5), (2.0, -0.5, 0.5), (0.3, 4.0, 3.0)])
def test_at_the_bounds_f_touches_zero(a: float, b: float, c: float) -> None:
    assert f(a, b, 0.0, largest_temperature(a, b)).min().item() == pytest.approx(0, abs=1e-12)
    slope = largest_slope(a, c)
    assert f(a, slope, c, slope / c).min().item() == pytest.approx(0, abs=1e-8)
    assert largest_temperature(a, 0.0) == math.inf
