"""An input gate: keys weigh exp(u) of their tokens' hidden states, by the formula and in every kind of call, and at first they weigh 1."""

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

from convert.linearize import LinearizeOptions, linearize
from hf_linattn import LinAttnConfig, cache_bytes
from hf_linattn.forms import Call, Form, Polynomial, Sizes
from hf_linattn.forms.polynomial import PolynomialOptions, PolynomialParameters

GATED: dict[str, Any] = {"input_gate": "token"}
KINDS: list[dict[str, Any]] = [
    {}, {"kernel": "quadratic", "decay": "head"}, {"kernel": "quadratic", "decay": "token", "features": 3}
]  # fmt: skip


def make_case(kind: dict[str, Any], length: int = 40, segments: Tensor | None = None, **call: Any) -> tuple[Form, Call, dict[str, Any]]:
    """A form, a call of it in float64 and the numbers of its parameters, none where it starts."""
    form = Polynomial(PolynomialOptions(**GATED, **kind))
    generator = torch.Generator().manual_seed(7)
    parameters: Any = form.parameters(Sizes(4, 2, 8, 6, 12), True)
    with torch.no_grad():
        for parameter in parameters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(2, length, 12, generator=generator).double()
    made = Call(*make_tensors(length, dtype=torch.float64), segments, hidden=hidden, **call)
    return form, made, form.numbers(made, parameters.double())


def by_pairs(form: Form, call: Call, numbers: dict[str, Any]) -> Tensor:
    """The weights of all pairs, each times its key's exp(u), and normalised again."""
    names = torch.eye(call.key.shape[2], dtype=torch.float64).expand(*call.key.shape[:2], -1, -1)  # values that tell which key it was
    weights = form.reference(call._replace(value=names), {k: v for k, v in numbers.items() if k != "log_input_gate"})
    weights = weights * numbers["log_input_gate"].double().exp().repeat_interleave(2, 1)[:, :, None]
    mass = weights.sum(-1, keepdim=True)
    return weights @ call.value.repeat_interleave(2, 1) / mass.masked_fill(mass == 0, 1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("segments", [None, "left", "packed"])
def test_keys_weigh_what_their_tokens_say(kind: dict[str, Any], segments: str | None) -> None:
    form, call, numbers = make_case(kind, segments=None if segments is None else make_segments(segments, 2, 40))
    out, expected = form.attend(call, numbers), by_pairs(form, call, numbers)
    assert numbers["log_input_gate"].abs().max() > 3
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-7 if "decay" in kind else 1e-13)  # rates are float32
    torch.testing.assert_close(form.reference(call, numbers), expected, rtol=0, atol=1e-13)
    leaves = (call.query, call.key, call.value)
    found, wanted = (torch.autograd.grad((x * expected.detach().cos()).sum(), leaves, retain_graph=True) for x in (out, expected))
    for grad, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, right, rtol=0, atol=1e-5)


def test_seen_both_ways() -> None:
    form, call, numbers = make_case({"decay": "head"}, causal=False)
    torch.testing.assert_close(form.attend(call, numbers), by_pairs(form, call, numbers), rtol=0, atol=1e-7)


def test_no_key_weighs_beyond_its_bound() -> None:
    form, call, _ = make_case({})
    parameters: Any = form.parameters(Sizes(4, 2, 8, 6, 12), True)
    torch.nn.init.constant_(parameters.input_weight, 1000.0)
    assert parameters(call.hidden.float())["log_input_gate"].abs().max() == 5.0


def test_noise_is_on_the_quotient() -> None:
    form, call, numbers = make_case({}, noise={"dropout_p": 0.3, "dropout_kind": "paper"})
    torch.manual_seed(0)
    noisy = torch.stack([form.attend(call, numbers).detach() for _ in range(200)])
    out = form.attend(call._replace(noise={}), numbers)
    torch.testing.assert_close(noisy.std(0), 0.7 * 0.3**0.5 * out.abs(), rtol=0.3, atol=1e-3)
    with pytest.raises(ValueError, match="knows of no input gate"):
        form.attend(call._replace(noise={"dropout_p": 0.3, "dropout_kind": "moment"}), numbers)


# ---- in a model


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pieces_through_a_cache_give_the_whole(kind: dict[str, Any]) -> None:
    assert check_pieces_give_the_whole(learned_model(**GATED, **kind))["sums"].shape[-1] == 16 + 2


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tokens_are_taken_back(kind: dict[str, Any]) -> None:
    check_tokens_are_taken_back(learned_model(**GATED, **kind))


def test_padded_in_beams_and_static_caches_a_text_goes_on_as_it_does_alone() -> None:
    model, ids = learned_model(**GATED, decay="key_head"), tiny_tokens()[:1, :12]

    def generated(ids: Tensor, **kwargs: Any) -> Tensor:
        return model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **kwargs)[:1, -6:]

    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1), tiny_tokens(seed=5)[:1, :16]])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    assert torch.equal(generated(padded, attention_mask=mask), generated(ids))
    assert torch.equal(generated(ids, cache_implementation="static", disable_compile=True), generated(ids))
    assert torch.equal(generated(ids, num_beams=3), generated(ids, num_beams=3, use_cache=False))


def test_the_gate_learns_and_is_saved(tmp_path: Path) -> None:
    model, ids = learned_model(**GATED), tiny_tokens()
    model.train()(ids, labels=ids).loss.backward()
    assert all((layer.self_attn.linattn.input_weight.grad != 0).all() for layer in model.model.layers)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert LinAttnConfig.of(loaded.config).attention.describe() == "linear, input gate per token"


def test_a_compiled_forward_pass_is_one_graph() -> None:
    model, ids = learned_model(**GATED, decay="key_head"), tiny_tokens(1, 5)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_exported_with_its_state() -> None:
    model, ids = learned_model(**GATED, decay="key_head"), tiny_tokens(1, 5)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    model.generation_config.cache_implementation, model.generation_config.use_cache = "static", True
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 8}
    wrapper = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=8, device="cpu")
    program = wrapper.export(input_ids=ids[:, :1], cache_position=torch.arange(1), strict=False).module()
    steps = [program(input_ids=ids[:, t : t + 1], cache_position=torch.arange(t, t + 1)) for t in range(5)]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids, use_cache=False).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", [{}, {"form": "window", "window": 5, "sinks": 1}], ids=["polynomial", "window"])
def test_a_conversion_starts_as_it_does_without(form: dict[str, Any], tmp_path: Path) -> None:
    softmax_model("llama").save_pretrained(tmp_path / "in")
    ids, logits = tiny_tokens(1), []
    for name, given in (("gated", GATED), ("plain", {})):
        report = linearize(tmp_path / "in", tmp_path / name, LinearizeOptions(**form, **given))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            logits.append(model(ids, past_key_values=cache).logits)
        assert cache_bytes(cache) == report["costs"]["state"]
    torch.testing.assert_close(*logits, atol=1e-6, rtol=0)
    assert "exp(u) learned per token and key head" in (tmp_path / "gated" / "README.md").read_text()


@pytest.mark.parametrize(
    ("sizes", "learnable", "sentence"),
    [({"hidden_size": 5}, False, "it needs learnable=true"), ({}, True, "needs to know the width of the hidden states")],
)
def test_a_gate_that_cannot_be_learned_is_refused(sizes: dict[str, int], learnable: bool, sentence: str) -> None:
    with pytest.raises(ValueError, match='input_gate="token" .*' + sentence):
        Polynomial(PolynomialOptions(**GATED)).parameters(Sizes(4, 2, 8, 8, **sizes), learnable)


def test_what_cannot_be_gated_is_refused() -> None:
    with pytest.raises(ValueError, match='input_gate="token" is learned, which only converted checkpoints are'):
        tiny_model("llama", **GATED)(tiny_tokens())
    with pytest.raises(ValueError, match="input_gate='head' is unknown"):
        LinAttnConfig(input_gate="head")
    with pytest.raises(ValueError, match='input_gate=.* beside="none" has none'):
        LinAttnConfig(form="window", beside="none", input_gate="token")
    with pytest.raises(ValueError, match="none were seen to enter it"):
        PolynomialParameters(Sizes(4, 2, 8, 8, 5), PolynomialOptions(**GATED))()
