"""A norm and a gate of the output: by their formula and in every kind of call, and at first they change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learned import check_pieces_give_the_whole, check_tokens_are_taken_back, learned_model
from operator_cases import make_segments
from tiny_models import tiny_model, tiny_tokens
from tiny_softmax import softmax_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM
from window_cases import make_tensors

import hf_linattn.forms.operators
from convert.errors import ConversionError
from convert.linearize import LinearizeOptions, linearize
from hf_linattn import LinAttnConfig, cache_bytes
from hf_linattn.forms import Call, Polynomial, Sizes, output_map
from hf_linattn.forms.polynomial import PolynomialOptions, PolynomialParameters
from hf_linattn.ops import reference

MAPS = ("norm", "gate", "norm_gate")
KINDS: list[dict[str, Any]] = [
    {"output_map": "norm"}, {"output_map": "gate", "decay": "token"}, {"output_map": "norm_gate", "kernel": "quadratic", "decay": "head"},
    {"output_map": "norm_gate", "decay": "key_head", "input_gate": "token"},
    {"output_map": "norm_gate", "form": "window", "window": 5, "sinks": 1, "gate": "token"},
    {"output_map": "norm_gate", "feature_map": "hedgehog", "decay": "key_head"},
]  # fmt: skip
SIZES = Sizes(4, 2, 8, 6, 12)


def moved_parameters(kind: dict[str, Any]) -> Any:
    """None of them where it starts."""
    parameters: Any = LinAttnConfig(**kind).attention.parameters(SIZES, True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return parameters


def by_formula(call: Call, parameters: Any, choice: str) -> Tensor:
    """o exp(s) / rms(o)^m and 2 sigmoid(w.x), read off the parameters."""
    f = {name: parameters(call.hidden)[name].double() for name in ("a", "b", "temperature")}
    out = reference(call.query, call.key, call.value, causal=call.causal, segment_ids=call.segments, **f)
    if "norm" in choice:
        power = torch.tanh(parameters.output_power_logit_offset.double())[:, None, None]
        scale = parameters.output_log_scale_offset.double().exp()[:, None, None]
        out = out * scale / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() ** power
    if "gate" in choice:
        out = out * 2 * torch.sigmoid(call.hidden.double() @ parameters.output_weight.double().mT).transpose(1, 2)[..., None]
    return out


@pytest.mark.parametrize("choice", MAPS)
@pytest.mark.parametrize("segments", [None, "left", "packed", "both ways"])
def test_the_output_is_what_the_formula_says_and_so_are_gradients(choice: str, segments: str | None) -> None:
    form, parameters = Polynomial(PolynomialOptions(output_map=choice)), moved_parameters({"output_map": choice}).double()
    hidden = torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(3)).double()
    ids = None if segments in (None, "both ways") else make_segments(segments, 2, 40)
    call = Call(*make_tensors(40, dtype=torch.float64), ids, segments != "both ways", hidden=hidden)
    numbers, expected = form.numbers(call, parameters), by_formula(call, parameters, choice)
    out = form.attend(call, numbers)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)  # what is learned, and read off hidden states, is float32
    torch.testing.assert_close(form.reference(call, numbers), out, rtol=0, atol=1e-12)
    own = [x for name, x in parameters.named_parameters() if name.startswith("output")]
    assert len(own) == {"norm": 2, "gate": 1, "norm_gate": 3}[choice]
    leaves = (call.query, call.key, call.value, *own)
    found, wanted = (torch.autograd.grad((x * expected.detach().cos()).sum(), leaves, retain_graph=True) for x in (out, expected))
    for grad, right in zip(found, wanted, strict=True):
        assert right.abs().max() > 1e-3
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-4)


def test_a_token_that_sees_nothing_keeps_its_output_of_nothing() -> None:
    numbers = {output_map.POWER: torch.ones(2), output_map.LOG_SCALE: torch.ones(2), output_map.GATE: torch.full((1, 2, 3), 2.0)}
    out = torch.zeros(1, 2, 3, 4, requires_grad=True)
    mapped = output_map.mapped(out, numbers)
    mapped.sum().backward()
    assert (mapped == 0).all() and out.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_state_takes_tokens_in_again_whatever_was_called_last(kind: dict[str, Any]) -> None:
    """More of them than the last call had, whose gates are not theirs."""
    form, parameters = LinAttnConfig(**kind).attention, moved_parameters(kind)
    hidden = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(3))
    call = Call(*make_tensors(9, dtype=torch.float32, grad=False), hidden=hidden)
    last = Call(*(x[:, :, :3] for x in (call.query, call.key, call.value)), hidden=hidden[:, :3])
    tokens = form.tokens(call, form.numbers(call, parameters)) | {"real": torch.ones(2, 1, 9, dtype=torch.bool)}
    again = form.advance(None, tokens, form.numbers(last, parameters), 4)
    _, state = form.attend_from(call, form.numbers(call, parameters), None)
    for name, x in state.items():
        torch.testing.assert_close(again[name], x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(2, 4, 9, 16, generator=generator).mul(30).to(dtype)
    numbers = {output_map.POWER: torch.rand(4), output_map.LOG_SCALE: torch.rand(4), output_map.GATE: 2 * torch.rand(2, 4, 9)}
    exact = output_map.mapped(out.double(), {name: x.double() for name, x in numbers.items()})
    found = output_map.mapped(out, numbers)
    assert found.dtype == dtype and (found.double() - exact).abs().max() <= 1.01 * (exact.to(dtype).double() - exact).abs().max()


def test_whatever_is_learned_the_factors_keep_their_bounds() -> None:
    parameters = moved_parameters({"output_map": "norm_gate"})
    with torch.no_grad():
        parameters.output_power_logit_offset.fill_(100.0)
        parameters.output_weight.mul_(1e4)
    numbers = parameters(torch.randn(2, 9, 12))
    assert (numbers["output_power"] <= 1).all() and numbers["output_gate"].min() >= 0 and 1.9 < numbers["output_gate"].max() <= 2


# ---- in a model


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pieces_through_a_cache_give_the_whole_from_a_state_as_large_as_without(kind: dict[str, Any]) -> None:
    plain = {**kind, "output_map": "none"}
    states = [check_pieces_give_the_whole(learned_model(**options)) for options in (kind, plain)]
    shapes = [{name: x.shape for name, x in state.items()} for state in states]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tokens_are_taken_back(kind: dict[str, Any]) -> None:
    check_tokens_are_taken_back(learned_model(**kind))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_padded_and_in_static_caches_a_text_goes_on_as_it_does_alone(kind: dict[str, Any]) -> None:
    model, ids = learned_model(**kind), tiny_tokens()[:1, :12]

    def generated(ids: Tensor, **kwargs: Any) -> Tensor:
        return model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **kwargs)[:1, -6:]

    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1), tiny_tokens(seed=5)[:1, :16]])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    assert torch.equal(generated(padded, attention_mask=mask), generated(ids))
    assert torch.equal(generated(ids, cache_implementation="static", disable_compile=True), generated(ids))
    assert torch.equal(generated(ids), generated(ids, use_cache=False))


@pytest.mark.parametrize("kind", [KINDS[2], KINDS[4]], ids=str)
def test_it_learns_and_is_saved(kind: dict[str, Any], tmp_path: Path) -> None:
    model, ids = learned_model(**kind), tiny_tokens()
    model.train()(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        own = dict(layer.self_attn.linattn.named_parameters())
        assert all((own[name].grad != 0).all() for name in ("output_power_logit_offset", "output_log_scale_offset", "output_weight"))
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert LinAttnConfig.of(loaded.config).attention.describe().endswith(", output norm and gate")


@pytest.mark.parametrize("kind", [KINDS[2], KINDS[4]], ids=str)
def test_a_compiled_forward_pass_is_one_graph(kind: dict[str, Any]) -> None:
    model, ids = learned_model(**kind), tiny_tokens(1, 9)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_exported_with_its_state() -> None:
    model, ids = learned_model(**KINDS[2]), tiny_tokens(1, 5)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    model.generation_config.cache_implementation, model.generation_config.use_cache = "static", True
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 8}
    wrapper = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=8, device="cpu")
    program = wrapper.export(input_ids=ids[:, :1], cache_position=torch.arange(1), strict=False).module()
    steps = [program(input_ids=ids[:, t : t + 1], cache_position=torch.arange(t, t + 1)) for t in range(5)]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids, use_cache=False).logits, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    softmax_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", [{}, {"form": "window", "window": 5, "sinks": 1}], ids=["polynomial", "window"])
def test_a_conversion_starts_as_it_does_without(form: dict[str, Any], source: Path, tmp_path: Path) -> None:
    ids, logits = tiny_tokens(1), []
    for name, given in (("mapped", {"output_map": "norm_gate"}), ("plain", {})):
        report = linearize(source, tmp_path / name, LinearizeOptions(**form, **given))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            logits.append(model(ids, past_key_values=cache).logits)
        assert cache_bytes(cache) == report["costs"]["state"]
    assert torch.equal(*logits)
    assert "times a gate learned per token and query head" in (tmp_path / "mapped" / "README.md").read_text()


@pytest.mark.parametrize(
    ("place", "name", "slip", "sentence"),
    [
        (output_map, "gate", lambda read: torch.sigmoid(read.float()), "starts with another output_gate"),
        (PolynomialParameters, "start", lambda self, name: torch.full_like(getattr(self, name), 0.5), "starts with another output_power"),
        (output_map, "mapped", lambda out, numbers: 1.001 * out if out.dtype != torch.float64 else out, "in float32, in a forward pass"),
    ],
    ids=["gate", "start", "map"],
)
def test_the_converters_check_sees_a_slip(
    place: Any, name: str, slip: Any, sentence: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(place, name)
    if name == "start":
        own = lambda self, number: slip(self, number) if number == "output_power_logit" else original(self, number)  # noqa: E731
        monkeypatch.setattr(place, name, own)
    elif name == "mapped":
        plain = hf_linattn.forms.operators.attention_reference
        monkeypatch.setattr(place, name, slip)
        monkeypatch.setattr(hf_linattn.forms.polynomial, "attention_reference", lambda *x, **given: _with(original, plain, *x, **given))
    else:
        monkeypatch.setattr(place, name, slip)
    with pytest.raises(ConversionError, match=sentence):
        linearize(source, tmp_path / "out", LinearizeOptions(output_map="norm_gate"))
    assert not (tmp_path / "out").exists()


def _with(mapped: Any, attend: Any, *args: Any, **given: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_map, "mapped", mapped)
        return attend(*args, **given)


@pytest.mark.parametrize("choice", MAPS)
def test_what_cannot_be_learned_is_refused(choice: str, source: Path, tmp_path: Path) -> None:
    form = Polynomial(PolynomialOptions(output_map=choice))
    with pytest.raises(ValueError, match=f'output_map="{choice}" is learned from .* needs learnable=true'):
        form.parameters(SIZES, False)
    if "gate" in choice:
        with pytest.raises(ValueError, match=f'output_map="{choice}" needs to know the width of the hidden states'):
            form.parameters(Sizes(4, 2, 8, 6), True)
        with pytest.raises(ValueError, match=f'output_map="{choice}" is computed from the hidden states .* none were seen to enter it'):
            form.parameters(SIZES, True)()
    with pytest.raises(ValueError, match=f'output_map="{choice}" is learned, which only converted checkpoints are'):
        tiny_model("llama", output_map=choice)(tiny_tokens())
    with pytest.raises(ConversionError, match=f'output_map="{choice}" is learned from .* needs learnable=true'):
        linearize(source, tmp_path / "out", LinearizeOptions(output_map=choice, learnable=False))


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="output_map='scale' is unknown; give one of 'none', 'norm', 'gate', 'norm_gate'"):
        LinAttnConfig(output_map="scale")
    with pytest.raises(ConversionError, match="output_map is 'scale'; expected one of none, norm, gate, norm_gate"):
        LinearizeOptions(output_map="scale")
    with pytest.raises(ValueError, match='output_map=.* beside="none" has none'):
        LinAttnConfig(form="window", beside="none", output_map="norm")
