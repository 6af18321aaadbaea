"""convert.check: a right conversion is never refused, and one with a small slip always is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_softmax import softmax_model
from torch import Tensor

import hf_linattn.attention
from convert.check import CheckReport, check_converted
from convert.errors import ConversionError
from convert.linearize import LinearizeOptions, linearize
from convert.source import Source, open_source
from hf_linattn import LinAttnParams
from hf_linattn.models import config_class_for, model_class_for

SEEDS = range(5)


class Conversion:
    """A tiny model and its unchecked conversion."""

    def __init__(self, folder: Path, model_type: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
        self.options, self.model_type, self.folder = options, model_type, folder / "out"
        softmax_model(model_type).to(dtype).save_pretrained(folder / "source")
        linearize(folder / "source", self.folder, LinearizeOptions(check=False, **options))
        self.source: Source = open_source(str(folder / "source"))

    def check(self, seed: int = 0, **changes: Any) -> CheckReport:
        model_class = model_class_for(config_class_for(self.model_type))
        return check_converted(self.folder, model_class, self.source, LinearizeOptions(**self.options | changes, seed=seed))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return Conversion(tmp_path_factory.mktemp("llama"), "llama", keep_softmax=(1,))


@pytest.fixture(scope="module")
def llama_float32(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return Conversion(tmp_path_factory.mktemp("llama32"), "llama", torch.float32)


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return Conversion(tmp_path_factory.mktemp("neox"), "gpt_neox", kernel="quadratic")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return Conversion(tmp_path_factory.mktemp("gemma"), "gemma2", keep_softmax=(0,), decay="none", learnable=False)


@pytest.mark.parametrize("name", ["llama", "llama_float32", "neox", "gemma"])
def test_a_right_conversion_is_never_refused(name: str, request: pytest.FixtureRequest) -> None:
    reports = [request.getfixturevalue(name).check(seed) for seed in SEEDS]
    assert len({report.error for report in reports}) > 1  # the seed reaches the probe
    assert all(report.layers == 3 and report.error > 0 and report.step_error > 0 for report in reports)
    assert max(report.bar for report in reports) < 0.6
    assert min(report.bar for report in reports) > 0.06  # the bar is felt: ten times as much would be refused


def test_the_bar_is_the_worst_of_all_precisions(llama: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    both = (torch.bfloat16, torch.float32)
    bars = {}
    for precisions in (both[:1], both[1:], both, both[::-1]):
        with monkeypatch.context() as patch:
            patch.setattr("convert.check.precisions", lambda dtype, precisions=precisions: precisions)
            bars[precisions] = llama.check().bar
    assert bars[both] == bars[both[::-1]] == max(bars.values()) > min(bars.values())


def heads_flipped(attend: Any, query: Tensor, key: Tensor, value: Tensor, *state: Tensor, **options: Any) -> Any:
    out = attend(query, key, value, *state, **options)
    return (out[0].flip(1), *out[1:]) if isinstance(out, tuple) else out.flip(1)


def scaled(name: str, factor: float) -> Callable[..., Any]:
    return lambda attend, *tensors, **options: attend(*tensors, **options | {name: options[name] * factor})


def swapped(attend: Any, query: Tensor, key: Tensor, value: Tensor, *state: Tensor, **options: Any) -> Any:
    group = query.shape[1] // key.shape[1]
    return attend(key.repeat_interleave(group, 1), query[:, ::group].contiguous(), value, *state, **options)


def other_groups(attend: Any, query: Tensor, key: Tensor, value: Tensor, *state: Tensor, **options: Any) -> Any:
    return attend(query, key.flip(1), value.flip(1), *state, **options)


OPERATOR_SLIPS: dict[str, Callable[..., Any]] = {
    "head order": heads_flipped,
    "rate": scaled("log_decay", 1.02),
    "temperature": scaled("temperature", 0.98),
    "coefficient": scaled("b", 0.98),
    "q and k": swapped,
    "groups": other_groups,
}


@pytest.mark.parametrize("slip", OPERATOR_SLIPS)
@pytest.mark.parametrize("where", [("linear_attention", "linear_attention_step"), ("linear_attention_step",)], ids=["all", "steps"])
def test_a_slip_in_the_operator_is_refused(slip: str, where: Any, llama: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in where:
        attend = getattr(hf_linattn.attention, name)
        monkeypatch.setattr(hf_linattn.attention, name, lambda *x, attend=attend, **options: OPERATOR_SLIPS[slip](attend, *x, **options))
    with pytest.raises(ConversionError, match=r"self_attn in .* away from the source's layer"):
        llama.check(seed=len(slip))


@pytest.mark.parametrize("where", ["linear_attention", "linear_attention_step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_slip_of_ten_times_the_rounding_of_float32_is_refused(
    where: str, dtype: torch.dtype, llama: Conversion, llama_float32: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the weights are stored in: each output is moved by a share of 6e-6, where 4e-7 is measured."""
    conversion, attend = (llama_float32 if dtype == torch.float32 else llama), getattr(hf_linattn.attention, where)

    def moved(*tensors: Tensor, **options: Any) -> Any:
        out = attend(*tensors, **options)
        one = out[0] if isinstance(out, tuple) else out
        one.add_(6e-6 * one.roll(1, -1))
        return out

    conversion.check()
    monkeypatch.setattr(hf_linattn.attention, where, moved)
    with pytest.raises(ConversionError, match="in float32.* away from the source's layer"):
        conversion.check()


def test_a_slip_in_the_stored_numbers_is_refused(llama: Conversion, neox: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LinAttnParams.forward
    for conversion, slips in ((llama, ("temperature", "log_decay")), (neox, ("b", "c", "temperature", "log_decay"))):
        for slip in slips:
            monkeypatch.setattr(
                LinAttnParams, "forward", lambda self, slip=slip: {k: v * (1.00002 if k == slip else 1) for k, v in forward(self).items()}
            )
            with pytest.raises(ConversionError, match=f"starts with another {slip}"):
                conversion.check()


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},  # which the source has not
        {"linattn": {"softmax_layers": [2]}},
        {"linattn": {"softmax_layers": []}},
        {"linattn": {"kernel": "quadratic", "c": 0.5}},
        {"rope_parameters": {"rope_theta": 9000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
    ],
    ids=str,
)
def test_a_slip_in_the_config_is_refused(change: dict[str, Any], llama: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    path = llama.folder / "config.json"
    text = path.read_text()
    config = json.loads(text)
    changed = {key: config[key] | value if isinstance(value, dict) else value for key, value in change.items()}
    path.write_text(json.dumps(config | changed))
    try:
        with pytest.raises(ConversionError):
            llama.check()
    finally:
        path.write_text(text)


def test_rotary_left_out_is_refused(llama: Conversion, neox: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    for conversion in (llama, neox):
        model_class = model_class_for(config_class_for(conversion.model_type))
        init = model_class.__init__

        def without(self: Any, *args: Any, init: Any = init, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            rotary = self.base_model.rotary_emb
            turn = rotary.forward
            rotary.forward = lambda *x, **kw: tuple(part * 0 + one for part, one in zip(turn(*x, **kw), (1, 0), strict=True))

        monkeypatch.setattr(model_class, "__init__", without)
        with pytest.raises(ConversionError, match="away from the source's layer"):
            conversion.check()


def test_weights_that_the_config_has_no_place_for(tmp_path: Path) -> None:
    """A layer, a head, biases and quantised companions: lost without a word if the model is loaded as config.json says."""
    biased = softmax_model("llama", attention_bias=True)
    cases = {
        "layers": (softmax_model("llama"), {"num_hidden_layers": 2}, "model.layers.2."),
        "biases": (biased, {"attention_bias": False}, "self_attn.k_proj.bias"),
        "head": (softmax_model("llama"), {"architectures": ["LlamaModel"]}, "lm_head.weight"),
    }
    for name, (model, changes, lost) in cases.items():
        model.save_pretrained(tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        with pytest.raises(ConversionError, match=f"has no place for, such as .*{lost}"):
            linearize(tmp_path / name, tmp_path / "out")
        assert not (tmp_path / "out").exists()
