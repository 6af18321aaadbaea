"""Where each form starts: its parameters, and the same computed apart for the converter's check; and what a teacher was seen to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_linattn import LinAttnConfig
from hf_linattn.forms import Sizes, projection
from hf_linattn.forms.seen import Seen

KINDS: list[dict[str, Any]] = [
    {}, {"a": 2.0, "b": 0.5, "temperature": 1.5}, {"temperature": 0.98, "decay": "head"}, {"decay": "key_head", "kernel": "quadratic"},
    {"kernel": "quadratic", "b": 1.4, "c": 0.5, "temperature": 2.0}, {"decay": "token", "input_gate": "token"},
    {"output_map": "norm"}, {"output_map": "norm_gate", "decay": "head"}, {"form": "window", "output_map": "gate"},
    {"kernel": "quadratic", "features": 3}, {"form": "window"}, {"form": "window", "gate": "token", "decay": "key_head"},
    {"form": "window", "beside": "none"}, {"feature_map": "hedgehog"}, {"form": "window", "feature_map": "hedgehog", "decay": "head"},
]  # fmt: skip
SIZES = Sizes(4, 2, 8, 8, 12, 100.0)


@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_layer_starts_where_the_check_expects_it(kind: dict[str, Any], learnable: bool) -> None:
    form = LinAttnConfig(**kind).attention
    if not learnable and ("token" in kind.values() or kind.keys() & {"features", "feature_map", "output_map"}):
        with pytest.raises(ValueError, match="needs learnable=true"):
            form.parameters(SIZES, learnable)
        return
    parameters, wanted = form.parameters(SIZES, learnable), form.starting_numbers(SIZES, learnable)
    if parameters is None:
        assert all(wanted[name] == getattr(form.options, name) for name in set(wanted) - {"gate"})
        return
    found = parameters.at_rest()
    assert set(found) <= set(wanted)
    for name, number in found.items():
        exact = torch.as_tensor(wanted[name], dtype=torch.float64)
        torch.testing.assert_close(
            number.double(), exact.expand_as(number), rtol=2e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("longest", "last"), [(100.0, 100.0), (1.5, 1.5), (1.0, 1.5)])
def test_a_layer_that_looks_back_over_little_starts_with_short_times(longest: float, last: float) -> None:
    form = LinAttnConfig(decay="head").attention
    times = -1 / form.parameters(Sizes(4, 2, 8, 8, longest=longest), True).at_rest()["log_decay"]
    assert times[0].item() == pytest.approx(1.5) and times[-1].item() == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "converted"),
    [
        ({}, {"temperature": 0.98, "decay": "head"}),
        ({"kernel": "quadratic", "decay": None}, {"kernel": "quadratic", "temperature": 2.0, "decay": "head"}),
        ({"temperature": 0.5, "decay": "none"}, {"temperature": 0.5, "decay": "none"}),
        ({"feature_map": "hedgehog"}, {"feature_map": "hedgehog", "decay": "head"}),
        ({"form": "window", "window": 8, "gate": None}, {"window": 8, "gate": "token", "temperature": 0.98, "decay": "head"}),
        (
            {"form": "window", "gate": "head", "kernel": "quadratic"},
            {"gate": "head", "kernel": "quadratic", "temperature": 2.0, "decay": "head"},
        ),
        ({"form": "window", "beside": "none", "kernel": None}, {"beside": "none", "gate": "token"}),
    ],
    ids=str,
)
def test_options_of_a_conversion(options: dict[str, Any], converted: dict[str, Any]) -> None:
    given = {name: value for name, value in options.items() if name != "form"}
    assert type(LinAttnConfig(form=options.get("form", "polynomial")).attention).converted(given) == converted


def seen(mass: torch.Tensor, moment: torch.Tensor | None = None) -> Seen:
    moment = torch.eye(8, dtype=torch.float64).expand(2, 8, 8) if moment is None else moment
    return Seen(moment.repeat_interleave(2, 0), torch.zeros(2, 8).double(), moment, mass, torch.zeros(4).double())


def test_the_mean_distance_is_counted_from_where_another_takes_over() -> None:
    mass = torch.zeros(4, 10, dtype=torch.float64)
    mass[0, 0], mass[1, 9], mass[2, [2, 6]] = 1.0, 0.5, 0.25
    assert seen(mass).reach().tolist() == [1, 9, 4, 1] and seen(mass).reach(3).tolist() == [1, 6, 3, 1]


def test_calibration_puts_times_where_the_teacher_looks() -> None:
    mass = torch.zeros(4, 40, dtype=torch.float64)
    mass[[0, 1, 2, 3], [8, 16, 0, 30]] = 1.0
    for decay, wanted in (("head", [8.0, 16.0, 1.5, 30.0]), ("key_head", [12.0, 15.75]), ("token", [12.0, 15.75])):
        form = LinAttnConfig(decay=decay).attention
        parameters = form.parameters(SIZES, True)
        form.calibrate(parameters, seen(mass))
        torch.testing.assert_close(-1 / parameters.at_rest()["log_decay"], torch.tensor(wanted), rtol=1e-4, atol=0)
    plain = LinAttnConfig().attention
    parameters = plain.parameters(SIZES, True)
    before = {name: number.clone() for name, number in parameters.at_rest().items()}
    plain.calibrate(parameters, seen(mass))
    assert all(torch.equal(number, before[name]) for name, number in parameters.at_rest().items())


def test_a_projection_of_directions_that_nothing_lies_in() -> None:
    """Their inverse roots are left out: what is fitted stays finite, and keeps all of what there is."""
    moment = torch.diag(torch.tensor([4.0, 1.0, 1e-3, 0, 0, 0, 0, 0], dtype=torch.float64)).expand(2, 8, 8)
    found = projection.fitted(seen(torch.zeros(4, 9).double(), moment), 2, 3)
    kept = found[projection.QUERY] @ found[projection.KEY].repeat_interleave(2, 0).mT
    assert found[projection.QUERY].shape == (4, 8, 3) and found[projection.KEY].shape == (2, 8, 3)
    torch.testing.assert_close(kept[:, :3, :3], torch.eye(3).double().expand(4, 3, 3), rtol=0, atol=1e-9)
    assert kept[:, 3:].abs().max() < 1e-9 and kept[:, :, 3:].abs().max() < 1e-9
