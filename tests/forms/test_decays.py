"""A decay per key head lets a group share a state; a decay per token is computed from the hidden states that enter the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learned import check_pieces_give_the_whole, check_tokens_are_taken_back, learned_model
from tiny_models import tiny_model, tiny_tokens
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_linattn import LinAttnConfig, parameter_groups
from hf_linattn.forms import Sizes
from hf_linattn.forms.polynomial import PolynomialParameters
from hf_linattn.ops import reference

KERNELS = ("linear", "quadratic")


def by_the_formula(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Logits where each layer attends by the ten lines, its rates worked out here from the hidden states and the stored parameters."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        stored, hidden = module.linattn, module.entered
        start = stored.rate_logit + stored.rate_logit_offset
        rates = -torch.log1p(torch.exp(start + hidden @ stored.rate_weight.T)).transpose(1, 2)
        numbers = {name: value for name, value in stored(hidden).items() if name != "log_decay"}
        return reference(query, key, value, **numbers, log_decay=rates).transpose(1, 2).contiguous(), None

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        module.entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    hooks = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in model.modules() if hasattr(m, "linattn")]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "linattn", attend)
    with torch.no_grad():
        out = model(ids, use_cache=False).logits
    monkeypatch.undo()
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_decay_per_token_is_what_its_formula_says(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = learned_model(name, kernel=kernel, decay="token"), tiny_tokens()
    expected = by_the_formula(model, ids, monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("decay", ["key_head", "token"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_pieces_through_a_cache_give_the_whole(decay: str, kernel: str) -> None:
    state = check_pieces_give_the_whole(learned_model(kernel=kernel, decay=decay))
    assert state["sums"].shape[1] == 2  # one state for the two query heads of each key head


@pytest.mark.parametrize("decay", ["key_head", "token"])
def test_tokens_are_taken_back(decay: str) -> None:
    check_tokens_are_taken_back(learned_model(decay=decay))


@pytest.mark.parametrize("decay", ["key_head", "token"])
def test_padding_on_the_left_changes_nothing(decay: str) -> None:
    model, ids = learned_model(decay=decay), tiny_tokens(batch=2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits[0, 5:]
        alone = model(ids[:1, 5:]).logits[0]
    torch.testing.assert_close(padded, alone, atol=2e-5, rtol=0)


def test_a_decay_per_token_is_learned_at_a_rate_of_its_own() -> None:
    model, ids = learned_model(decay="token").train(), tiny_tokens()
    model(ids, labels=ids).loss.backward()
    for module in model.modules():
        if isinstance(module, PolynomialParameters):
            assert all((parameter.grad != 0).any() for parameter in module.parameters())
    rates = {id(x): group["lr"] for group in parameter_groups(model, 1e-3, 0.1) for x in group["params"]}
    layer = model.model.layers[0].self_attn.linattn
    assert rates[id(layer.rate_weight)] == 4e-3 and rates[id(layer.rate_logit_offset)] == 0.1
    assert rates[id(model.model.layers[0].self_attn.q_proj.weight)] == 1e-3


def test_hidden_states_are_let_go_after_each_call() -> None:
    model = learned_model(decay="token")
    with torch.no_grad():
        model(tiny_tokens())
    assert all(not module.entered for module in model.modules() if isinstance(module, PolynomialParameters))


def test_rates_of_key_heads_start_as_those_of_query_heads_do() -> None:
    """From 1.5 tokens to the longest, whether constant or per token."""
    for decay in ("key_head", "token"):
        numbers = PolynomialParameters(Sizes(6, 3, 8, 8, hidden_size=5, longest=600.0), LinAttnConfig(decay=decay).options).at_rest()
        torch.testing.assert_close(-1 / numbers["log_decay"], torch.tensor([1.5, 30.0, 600.0]), rtol=1e-4, atol=0)


def test_one_step_of_the_operator_takes_a_rate_of_the_token() -> None:
    """The compiled whole, hidden states and all, is one graph."""
    model, ids = learned_model(decay="token"), tiny_tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("sizes", "learnable", "sentence"),
    [
        ({"hidden_size": 5}, False, "it needs learnable=true"),
        ({}, True, "needs to know the width of the hidden states"),
    ],
)
def test_a_decay_per_token_that_cannot_be_learned_is_refused(sizes: dict[str, int], learnable: bool, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PolynomialParameters(Sizes(4, 2, 8, 8, **sizes), LinAttnConfig(decay="token").options, learnable)


def test_a_model_without_parameters_has_no_decay_per_token() -> None:
    with pytest.raises(ValueError, match='decay="token" is learned, which only converted checkpoints are'):
        tiny_model("llama", decay="token")(tiny_tokens())


def test_hidden_states_that_were_not_seen_are_missed() -> None:
    module = PolynomialParameters(Sizes(4, 2, 8, 8, hidden_size=5), LinAttnConfig(decay="token").options)
    with pytest.raises(ValueError, match="none were seen to enter it"):
        module()
    assert module(torch.zeros(1, 3, 5))["log_decay"].shape == (1, 2, 3)
    torch.testing.assert_close(F.softplus(module.number("rate_logit")), -module.at_rest()["log_decay"])


@pytest.mark.parametrize("temperature", [0.5, 0.75, 0.9])
def test_models_whose_numbers_differ_compile_one_after_another(temperature: float) -> None:
    """Dynamo takes a number that it has seen differ for dynamic, and must still be able to trace the options."""
    model, ids = learned_model(decay="key_head", temperature=temperature), tiny_tokens(1, 9)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-5, rtol=0)
