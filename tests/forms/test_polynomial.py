"""The polynomial form: bounds, starting values, gradients of what it learns."""

from __future__ import annotations

import math

import pytest
import torch

from hf_linattn import LinAttnConfig
from hf_linattn.forms import Call, Sizes
from hf_linattn.forms.polynomial import PolynomialParameters

KERNELS = ("linear", "quadratic")


def params(kernel: str = "linear", decay: str = "head", heads: int = 4, longest: float = 512.0, **options: object) -> PolynomialParameters:
    options = LinAttnConfig(kernel=kernel, decay=decay, **options).options
    return PolynomialParameters(Sizes(heads, heads, 8, 8, longest=longest), options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("raw", [-1e3, -40.0, -1.0, 0.0, 1.0, 40.0])
def test_whatever_the_parameters_are_the_weights_stay_positive(kernel: str, raw: float) -> None:
    module = params(kernel, a=1.5, b=0.7)
    for parameter in module.parameters():
        parameter.data.fill_(raw)
    out = module()
    assert all(values.dtype == torch.float32 and values.shape == (4,) for values in out.values())
    if kernel == "linear":
        assert (out["a"] > out["b"] * out["temperature"]).all()
        assert "c" not in out
    else:
        assert (out["b"] ** 2 < 4 * out["a"] * out["c"]).all()
    assert (out["log_decay"] <= 0).all()


@pytest.mark.parametrize("scaling, scale", [(0.3, 0.3), (None, 0.25)], ids=str)
def test_products_that_are_no_cosines_are_scaled_as_the_model_scales(scaling: float | None, scale: float) -> None:
    call = Call(*torch.zeros(3, 1, 2, 5, 16), scaling=scaling)
    assert LinAttnConfig(normalize_qk=False, b=0.2, temperature=2.0).attention.numbers(call, None)["temperature"] == 2 * scale
    assert LinAttnConfig(b=0.2, temperature=2.0).attention.numbers(call, None)["temperature"] == 2


def test_starting_values() -> None:
    linear = params(temperature=0.5)()
    torch.testing.assert_close(linear["temperature"], torch.full((4,), 0.5))
    assert params()()["temperature"].tolist() == pytest.approx([0.98] * 4, abs=1e-5)
    for numbers in ({"a": 1.0, "b": 1.0, "c": 0.5, "temperature": 2.0}, {"a": 0.8, "b": 0.6, "c": 1.7, "temperature": 0.3}):
        quadratic = params("quadratic", **numbers)()
        for name, value in numbers.items():
            torch.testing.assert_close(quadratic[name], torch.full((4,), value))


def test_time_constants_start_spread_geometrically() -> None:
    time_constants = -1 / params(heads=8, longest=512)()["log_decay"]
    assert time_constants[0].item() == pytest.approx(1.5)
    assert time_constants[-1].item() == pytest.approx(512, rel=1e-4)
    steps = (time_constants[1:] / time_constants[:-1]).tolist()
    assert steps == pytest.approx([(512 / 1.5) ** (1 / 7)] * 7, rel=1e-4)
    assert "log_decay" not in params(decay="none")()


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_reach_every_parameter_through_the_operator(kernel: str) -> None:
    from hf_linattn import linear_attention

    module = params(kernel)
    query, key, value = torch.randn(3, 1, 4, 10, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    numbers = module()
    out = linear_attention(query, key, value, **numbers)
    (out * torch.arange(8.0)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and (parameter.grad.abs() > 0).all(), name


def test_frozen_where_not_learnable() -> None:
    module = PolynomialParameters(Sizes(4, 4, 8, 8), LinAttnConfig(decay="head").options, learnable=False)
    assert not list(module.parameters())
    assert set(module.state_dict()) == {"temperature_logit", "log_rate"}


def test_forward_gives_new_float32_tensors_whatever_the_parameters_are_in() -> None:
    module = params("quadratic").to(torch.bfloat16)
    out = module()
    assert all(values.dtype == torch.float32 for values in out.values())
    before = module()["temperature"].clone()
    out["temperature"].data.zero_()
    torch.testing.assert_close(module()["temperature"], before)
    assert math.isfinite(before.sum().item())


def test_parameters_loaded_from_disk_are_left_alone_by_initialisation() -> None:
    module = params(decay="none")
    module.temperature_logit.data.fill_(0.25)
    module.temperature_logit._is_hf_initialized = True
    module.reset_parameters()
    assert (module.temperature_logit == 0.25).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"b": -0.5}, "b > 0"), ({"b": 0.0}, "b > 0"), ({"normalize_qk": False}, "normalize_qk"), ({"heads": 0}, "at least one head")],
)
def test_refuses_what_it_cannot_bound(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params(**options)  # type: ignore[arg-type]
