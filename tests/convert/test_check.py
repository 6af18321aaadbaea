"""convert.check: a right conversion is never refused, and one with a small slip always is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from no_caches import no_caches
from tiny_softmax import softmax_model
from torch import Tensor
from transformers import LlamaForCausalLM

import hf_linattn.forms.operators
from convert.check import CheckReport, check_converted
from convert.errors import ConversionError
from convert.forcing import teacher_forced
from convert.linearize import LinearizeOptions, linearize
from convert.source import Source, open_source
from convert.truth import LayerTruth, layer_truths
from hf_linattn.forms.polynomial import PolynomialParameters
from hf_linattn.models import config_class_for, model_class_for

SEEDS = range(5)


class Conversion:
    """A tiny model and its unchecked conversion."""

    def __init__(self, folder: Path, model_type: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
        self.options, self.model_type, self.folder = options, model_type, folder / "out"
        softmax_model(model_type).to(dtype).save_pretrained(folder / "source")
        linearize(folder / "source", self.folder, LinearizeOptions(check=False, **options))
        self.source: Source = open_source(str(folder / "source"))

    @property
    def model_class(self) -> Any:
        return model_class_for(config_class_for(self.model_type))

    def check(self, seed: int = 0, **changes: Any) -> CheckReport:
        return check_converted(self.folder, self.model_class, self.source, LinearizeOptions(**self.options | changes, seed=seed))


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


def test_what_runs_in_one_pass_makes_no_cache(llama_float32: Conversion) -> None:
    base = llama_float32.model_class.__bases__[-1]
    model = base.from_pretrained(llama_float32.source.folder, attn_implementation="eager").eval()
    tokens, hidden = torch.arange(6)[None], {"model.layers.1.self_attn": torch.randn(1, 6, 32)}
    with no_caches():
        truths = layer_truths(model, tokens, LinearizeOptions().linattn())
        whole = teacher_forced(model, hidden, tokens, (6,), torch.float32)
    pieces = teacher_forced(model, hidden, tokens, (3, 2, 1), torch.float32)
    assert len(truths) == 3 and whole.keys() == pieces.keys() == hidden.keys()
    torch.testing.assert_close(pieces["model.layers.1.self_attn"], whole["model.layers.1.self_attn"], rtol=1e-4, atol=1e-5)


def test_the_bar_is_the_worst_of_all_precisions(llama: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    both = (torch.bfloat16, torch.float32)
    bars = {}
    for precisions in (both[:1], both[1:], both, both[::-1]):
        with monkeypatch.context() as patch:
            patch.setattr("convert.check.precisions", lambda dtype, precisions=precisions: precisions)
            bars[precisions] = llama.check().bar
    assert bars[both] == bars[both[::-1]] == max(bars.values()) > min(bars.values())


def test_errors_are_shares_of_the_exact_result_and_the_bar_is_twice_plain_pytorch(
    llama_float32: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain PyTorch off by a thousandth, or twice what is right: by how much it errs, and not by how much the right one would."""

    def truths(factor: float) -> Callable[..., dict[str, LayerTruth]]:
        def off(model: Any, tokens: Tensor, options: LinearizeOptions) -> dict[str, LayerTruth]:
            assert tokens.shape == (1, 24)
            found = layer_truths(model, tokens, options)
            return {name: replace(truth, plain=dict.fromkeys(truth.plain, factor * truth.exact)) for name, truth in found.items()}

        return off

    monkeypatch.setattr("convert.check.layer_truths", truths(1.001))
    report = llama_float32.check()
    assert report.plain_error == pytest.approx(1e-3, rel=1e-9)
    assert report.bar == pytest.approx(max(report.error, report.step_error) / 2.002e-3, rel=1e-9)
    monkeypatch.setattr("convert.check.layer_truths", truths(2))
    assert llama_float32.check().plain_error == pytest.approx(1, rel=1e-9)
    monkeypatch.undo()
    attend = hf_linattn.forms.operators.linear_attention
    monkeypatch.setattr(hf_linattn.forms.operators, "linear_attention", lambda *x, **options: 2 * attend(*x, **options))
    with pytest.raises(ConversionError, match=r"is 1\.0e\+00 away from the source's layer .* and rounding explains [1-9]\.\de-06:"):
        llama_float32.check()


@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("decay", ["head", "none"])
def test_any_start_is_the_one_that_is_promised(decay: str, learnable: bool, tmp_path: Path) -> None:
    """A temperature within two hundredths of its bound stays where it is only if it is not stored; no decay is slower than 2,048 tokens."""
    softmax_model("llama", max_position_embeddings=4096).save_pretrained(tmp_path / "source")
    options = LinearizeOptions(decay=decay, learnable=learnable, temperature=0.99)
    started = linearize(tmp_path / "source", tmp_path / "out", options)["starting_values"]
    stored = learnable or decay == "head"
    assert started["temperature"] == ([0.98] * 4 if stored else 0.99)
    assert all(number == round(number, 6) != round(number, 5) for number in started.get("log_decay", [])[1:])
    assert "log_decay" not in started or -1 / started["log_decay"][-1] == pytest.approx(2048, rel=2e-3)  # six digits are reported


def test_what_cannot_be_loaded_is_named(llama: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("boom")

    for owner, doing in (
        (LlamaForCausalLM, "loading .*source as LlamaForCausalLM"),
        (llama.model_class, "loading the converted checkpoint"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ConversionError, match=rf"^{doing} failed \(boom\); nothing was kept$"):
            patch.setattr(owner, "from_pretrained", fail)
            llama.check()
    with (
        monkeypatch.context() as patch,
        pytest.raises(ConversionError, match=r"^running the converted model failed \(boom\); nothing was kept$"),
    ):
        patch.setattr(llama.model_class, "forward", fail)
        llama.check()


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


def slip_in(where: str, slip: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`slip(attend, query, key, value, *state, **options)` in place of the operator for many tokens ("passes") or for one ("steps")."""
    if where == "passes":
        attend = hf_linattn.forms.operators.linear_attention
        monkeypatch.setattr(hf_linattn.forms.operators, "linear_attention", lambda *x, **options: slip(attend, *x, **options))
        return
    step = hf_linattn.forms.polynomial.attention_step

    def slipped(call: Any, numbers: dict[str, Any], sums: Tensor) -> Any:
        def attend_once(query: Tensor, key: Tensor, value: Tensor, state: Tensor, **options: Any) -> Tensor:
            return step(call._replace(query=query, key=key, value=value), options, state)

        return slip(attend_once, call.query, call.key, call.value, sums, **numbers)

    monkeypatch.setattr(hf_linattn.forms.polynomial, "attention_step", slipped)


@pytest.mark.parametrize("slip", OPERATOR_SLIPS)
@pytest.mark.parametrize("where", [("passes", "steps"), ("steps",)], ids=["all", "steps"])
def test_a_slip_in_the_operator_is_refused(slip: str, where: Any, llama: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in where:
        slip_in(place, OPERATOR_SLIPS[slip], monkeypatch)
    how = "in cached steps" if len(where) == 1 else "in a forward pass"
    with pytest.raises(ConversionError, match=rf"self_attn in .*, {how}, is .* away from the source's layer"):
        llama.check(seed=len(slip))


@pytest.mark.parametrize("where", ["passes", "steps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_slip_of_ten_times_the_rounding_of_float32_is_refused(
    where: str, dtype: torch.dtype, llama: Conversion, llama_float32: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the weights are stored in: each output is moved by a share of 6e-6, where 4e-7 is measured."""
    conversion = llama_float32 if dtype == torch.float32 else llama

    def moved(attend: Any, *tensors: Tensor, **options: Any) -> Any:
        out = attend(*tensors, **options)
        one = out[0] if isinstance(out, tuple) else out
        one.add_(6e-6 * one.roll(1, -1))
        return out

    conversion.check()
    slip_in(where, moved, monkeypatch)
    with pytest.raises(ConversionError, match="in float32.* away from the source's layer"):
        conversion.check()


def test_a_slip_in_the_stored_numbers_is_refused(llama: Conversion, neox: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = PolynomialParameters.forward
    for conversion, slips in ((llama, ("temperature", "log_decay")), (neox, ("b", "c", "temperature", "log_decay"))):
        for slip in slips:
            monkeypatch.setattr(
                PolynomialParameters,
                "forward",
                lambda self, hidden=None, slip=slip: {k: v * (1.00002 if k == slip else 1) for k, v in forward(self, hidden).items()},
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
