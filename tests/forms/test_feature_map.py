"""A learned feature map in the place of f: by ten lines in float64, in every kind of call, in converted checkpoints and in their check."""

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
from window_cases import make_tensors

import hf_linattn.forms.feature_map
import hf_linattn.forms.operators
import hf_linattn.forms.polynomial
from convert.check import check_converted
from convert.errors import ConversionError
from convert.linearize import LinearizeOptions, linearize
from convert.source import open_source
from hf_linattn import LinAttnConfig, cache_bytes
from hf_linattn.forms import Call, Form, Sizes
from hf_linattn.forms.polynomial import PolynomialParameters
from hf_linattn.models import config_class_for, model_class_for
from hf_linattn.ops import window_reference

MAPPED: dict[str, Any] = {"feature_map": "hedgehog"}
WINDOW: dict[str, Any] = {"form": "window", "window": 5, "sinks": 2}
DECAYS = ("none", "head", "key_head", "token")
FORMS: list[dict[str, Any]] = [
    {}, {"decay": "head"}, {"decay": "token", "input_gate": "token"}, WINDOW, {**WINDOW, "decay": "key_head", "gate": "token"}
]  # fmt: skip
LENGTH, SIZES = 40, Sizes(4, 2, 8, 6, 12)


def make_case(options: dict[str, Any], segments: Tensor | None = None) -> tuple[Form, PolynomialParameters, Call]:
    """A form, its parameters, none where it starts, and a call in float64."""
    form = LinAttnConfig(**MAPPED, **options).attention
    generator = torch.Generator().manual_seed(7)
    parameters: Any = form.parameters(SIZES, True)
    with torch.no_grad():
        for parameter in parameters.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(2, LENGTH, 12, generator=generator).double()
    return form, parameters.double(), Call(*make_tensors(LENGTH), segments, hidden=hidden)


def by_pairs(call: Call, numbers: dict[str, Any], lag: int = 0) -> Tensor:
    """The weights phi(q).phi(k) of all pairs, with a decay, normalised."""
    exps = [torch.exp(x @ numbers[f"{name}_map"]) for name, x in (("query", call.query), ("key", call.key))]
    q, k = (torch.cat([x, 1 / x], -1) / (x + 1 / x).sum(-1, keepdim=True) for x in exps)
    ids = torch.ones(2, LENGTH, dtype=torch.int32) if call.segments is None else call.segments.int()
    seen = ((ids[:, :, None] == ids[:, None]) & (ids > 0)[:, None]).tril()
    decay = numbers.get("log_decay", torch.zeros(4)).double()
    steps = (decay[None, :, None].expand(2, -1, LENGTH) if decay.dim() == 1 else decay).masked_fill((ids <= 0)[:, None], 0)
    total = steps.cumsum(-1).repeat_interleave(4 // steps.shape[1], 1)
    keys = numbers["log_input_gate"].double().exp().repeat_interleave(2, 1) if "log_input_gate" in numbers else torch.ones(1, 1, 1)
    weights = q @ k.repeat_interleave(2, 1).mT * (total[..., None] - total[:, :, None]).exp() * keys[..., None, :]
    weights = weights.masked_fill(~seen.tril(-lag)[:, None], 0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ call.value.repeat_interleave(2, 1)


@pytest.mark.parametrize("segments", [None, "left", "packed"])
@pytest.mark.parametrize("decay", DECAYS)
def test_weights_are_inner_products_of_features(decay: str, segments: str | None) -> None:
    form, parameters, call = make_case({"decay": decay}, None if segments is None else make_segments(segments, 2, LENGTH))
    numbers = form.numbers(call, parameters)
    out, expected = form.attend(call, numbers), by_pairs(call, numbers)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12 if decay == "none" else 1e-6)  # rates are float32
    torch.testing.assert_close(form.reference(call, numbers), expected, rtol=0, atol=1e-12)
    leaves = (call.query, call.key, call.value, parameters.query_map, parameters.key_map)
    found, wanted = (torch.autograd.grad((x * expected.detach().cos()).sum(), leaves, retain_graph=True) for x in (out, expected))
    for grad, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, right, rtol=0, atol=1e-10 if decay == "none" else 1e-5)


def test_an_input_gate_stands_beside_it() -> None:
    form, parameters, call = make_case({"input_gate": "token"})
    numbers = form.numbers(call, parameters)
    torch.testing.assert_close(form.attend(call, numbers), by_pairs(call, numbers), rtol=0, atol=1e-12)


def test_it_stands_beside_a_window() -> None:
    form, parameters, call = make_case(WINDOW)
    numbers = form.numbers(call, parameters)
    near, share = window_reference(call.query, call.key, call.value, window=5, sinks=2), numbers["gate"].double()[:, None, None]
    mixed = share * near + (1 - share) * by_pairs(call, numbers, lag=5)
    torch.testing.assert_close(form.attend(call, numbers), torch.cat([near[:, :, :5], mixed[:, :, 5:]], 2), rtol=0, atol=1e-7)


def test_at_first_a_matrix_is_the_identity() -> None:
    parameters = PolynomialParameters(SIZES, LinAttnConfig(**MAPPED).options)
    assert dict(parameters.named_parameters()).keys() == {"query_map", "key_map"} and not list(parameters.buffers())
    assert torch.equal(parameters.query_map, torch.eye(8).expand(4, 8, 8)) and torch.equal(parameters.key_map, torch.eye(8).expand(2, 8, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_softmax_is_of_float32_and_no_query_sees_nothing(dtype: torch.dtype) -> None:
    """Features of one token are far from those of the other: what is left of their product is still a weight."""
    form = LinAttnConfig(**MAPPED).attention
    query, key = torch.zeros(1, 1, 1, 8, dtype=dtype), torch.zeros(1, 1, 1, 8, dtype=dtype)
    query[..., 0], key[..., 1], value = 300.0, 300.0, torch.full((1, 1, 1, 4), 0.75, dtype=dtype)
    eye = {"query_map": torch.eye(8)[None], "key_map": torch.eye(8)[None]}
    torch.testing.assert_close(form.attend(Call(query, key, value), eye), value)
    x = torch.randn(1, 1, 200, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.cat([x, -x], -1).double().softmax(-1)
    given = hf_linattn.forms.feature_map.mapped(Call(x, x, x), eye)[0]
    assert given.key.dtype == dtype
    assert ((given.key.double() - y) / y).abs().max() <= torch.finfo(dtype).eps * (0.51 if dtype.itemsize < 4 else 8)


# ---- in a model


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_pieces_through_a_cache_give_the_whole(options: dict[str, Any]) -> None:
    assert check_pieces_give_the_whole(learned_model(**MAPPED, **options))["sums"].shape[-2] == 2 * 16 + 1


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_tokens_are_taken_back(options: dict[str, Any]) -> None:
    check_tokens_are_taken_back(learned_model(**MAPPED, **options))


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_every_matrix_learns_and_is_saved(options: dict[str, Any], tmp_path: Path) -> None:
    model, ids = learned_model(**MAPPED, **options), tiny_tokens()
    model.train()(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        assert all((parameter.grad != 0).any() for parameter in layer.self_attn.linattn.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert LinAttnConfig.of(loaded.config).attention.describe().count("feature_map=hedgehog") == 1


def test_a_compiled_forward_pass_is_one_graph() -> None:
    model, ids = learned_model(**MAPPED, decay="key_head"), tiny_tokens(1, 5)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=0)


# ---- converted


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    softmax_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"decay": "none"}, {"decay": "token"}, WINDOW], ids=str)
def test_a_checkpoint_is_converted_checked_costs_what_it_says_and_generates(
    options: dict[str, Any], dtype: str, source: Path, tmp_path: Path
) -> None:
    report = linearize(source, tmp_path / "out", LinearizeOptions(**MAPPED, **options, dtype=dtype))
    assert report["starting_values"].keys() <= {"log_decay", "gate"}
    assert "of phi(x) = softmax([W x, -W x]), W learned" in (tmp_path / "out" / "README.md").read_text()
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval(), tiny_tokens(1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert sum(layer.state["sums"].nbytes for layer in cache.layers) == 3 * (2 * 8 + 1) * 9 * 4 * (2 if "decay" in options else 4)
    if dtype == "float32":
        assert cache_bytes(cache) == report["costs"]["state"]
    told = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **told), model.generate(ids, **told, use_cache=False))


def test_the_check_refuses_slips(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = LinearizeOptions(**MAPPED, check=False)
    linearize(source, tmp_path / "out", options)

    def check() -> None:
        check_converted(tmp_path / "out", model_class_for(config_class_for("llama")), open_source(str(source)), options)

    check()
    feature_map, operators = hf_linattn.forms.feature_map, hf_linattn.forms.operators
    attend, mapped, start = operators.linear_attention, feature_map.mapped, feature_map.start

    def one_sided(call: Call, numbers: Any) -> tuple[Call, Any]:
        """Of a single token the features of -W x left out."""
        made, rest = mapped(call, numbers)
        return (made if made.query.shape[2] > 1 else made._replace(key=made.key * (torch.arange(16) < 8))), rest

    slips: list[tuple[Any, str, Any, str]] = [
        (operators, "linear_attention", lambda *x, **given: attend(*x, **given | {"a": 1e-3}), "in a forward pass, is .* away"),
        (
            operators,
            "linear_attention",
            lambda *x, **given: attend(*x, **given | {"a": 2.0, "normalize_qk": True}),
            "in a forward pass, is .* away",
        ),
        (feature_map, "mapped", one_sided, "in cached steps, is .* away"),
    ]
    for owner, name, slip, said in slips:
        with monkeypatch.context() as patch, pytest.raises(ConversionError, match=said):
            patch.setattr(owner, name, slip)
            check()
    with monkeypatch.context() as patch:
        patch.setattr(feature_map, "start", lambda shape: 1.01 * start(shape))
        linearize(source, tmp_path / "other", options)
    with pytest.raises(ConversionError, match="starts with another query_map than it was to"):
        check_converted(tmp_path / "other", model_class_for(config_class_for("llama")), open_source(str(source)), options)


# ---- refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernel": "quadratic"}, "kernel='quadratic'"), ({"features": 4}, "features=4"), ({"temperature": 0.5}, "temperature=0.5"),
        ({"a": 2.0}, "a=2.0"), ({"b": 0.5}, "b=0.5"), ({"normalize_qk": False}, "normalize_qk=False"),
    ],
)  # fmt: skip
def test_what_is_of_f_is_refused_beside_it(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^linattn option {said} is of f.*feature_map='hedgehog' has features .*; leave one of them out"):
        LinAttnConfig(**MAPPED, **options)
    if not options.keys() & {"a", "b", "normalize_qk"}:
        with pytest.raises(ConversionError, match=f"^linattn option {said} is of f"):
            LinearizeOptions(**MAPPED, **options).linattn()


def test_a_map_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="feature_map='softmax' is unknown"):
        LinAttnConfig(feature_map="softmax")
    with pytest.raises(ConversionError, match="feature_map is 'softmax'; expected one of none, hedgehog"):
        LinearizeOptions(feature_map="softmax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of learned matrices, so it needs learnable=true"):
        PolynomialParameters(SIZES, LinAttnConfig(**MAPPED).options, False)
    with pytest.raises(ValueError, match="which only converted checkpoints have"):
        tiny_model("llama", **MAPPED)(tiny_tokens())
    with pytest.raises(ValueError, match='feature_map=.* beside="none" has none'):
        LinAttnConfig(form="window", beside="none", **MAPPED)
