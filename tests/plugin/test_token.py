"""What one decoded token asks of PyTorch beside its kernel: each operator called is some microseconds a layer on the host of a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_tokens
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_linattn.attention import linattn_attention
from hf_linattn.models import config_class_for
from hf_linattn.ops import operators, window_step

WINDOW = {"form": "window", "window": 4, "sinks": 2}
SECOND = {"kernel": "quadratic", "decay": "key_head"}
CALLED: list[tuple[dict[str, Any], int]] = [
    ({"decay": "head"}, 4), (SECOND, 4), ({**WINDOW, "beside": "none"}, 4), ({**WINDOW, **SECOND, "features": 8}, 4),
    ({**WINDOW, **SECOND, "gate": "token", "features": 8}, 10),
]  # fmt: skip


def model_of(options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = config_class_for("llama")(**tiny_config("llama", 1).to_diff_dict(), linattn={"learnable": True, **options})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(("options", "most"), CALLED, ids=str)
def test_operators_called_for_a_token(options: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the cache and the attention function, without the kernel's."""
    for kernels in (operators._STEP, window_step._KERNELS):
        monkeypatch.setitem(kernels, "cpu", lambda call, *rest: call.query.new_zeros(*call.query.shape[:3], call.value.shape[-1]))
    model = model_of(options)
    attention, cache = model.model.layers[0].self_attn, DynamicCache(config=model.config)
    query, (key, value) = torch.randn(1, 4, 1, 16), torch.randn(2, 1, 2, 1, 16)
    with torch.no_grad():
        model(tiny_tokens(1, 9), past_key_values=cache)
        for _ in range(2):  # the first makes what is kept
            if hasattr(attention, "linattn"):
                attention.linattn.leave_hidden_states(torch.randn(1, 1, 64))
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                linattn_attention(attention, query, *cache.update(key, value, 0), None)
    called = [event.name for event in seen.events() or () if event.cpu_parent is None]
    assert len(called) <= most, called


@pytest.mark.parametrize(
    "cache_of", [lambda config: DynamicCache(config=config), lambda config: StaticCache(config=config, max_cache_len=64)]
)
def test_a_few_tokens_go_on_in_place(cache_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drafted, or the end of a prompt in chunks, on the way of a single token; more tokens at once by the whole operator."""
    taken: list[int] = []
    step = operators._STEP["cpu"]
    monkeypatch.setitem(operators._STEP, "cpu", lambda call, state: taken.append(call.query.shape[2]) or step(call, state))
    model = model_of({"decay": "head"})
    cache, tokens = cache_of(model.config), tiny_tokens(1, 47)
    with torch.no_grad():
        model(tokens[:, :9], past_key_values=cache)
        taken.clear()  # a cache of fixed length cannot know that it was empty
        logits = [model(x, past_key_values=cache).logits for x in tokens[:, 9:].split([5, 1, 16, 16], 1)]
        expected = model(tokens).logits[:, 9:]
    layers = model.config.num_hidden_layers
    assert taken == [n for n in (5, 1, 16, 16) for _ in range(layers)]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-4)
    with torch.no_grad():
        model(tiny_tokens(1, 17), past_key_values=cache)
    assert len(taken) == 4 * layers


def test_a_few_tokens_ask_as_much_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operators._STEP, "cpu", lambda call, state: call.query.new_zeros(*call.query.shape[:3], call.value.shape[-1]))
    model = model_of(SECOND)
    attention, cache = model.model.layers[0].self_attn, DynamicCache(config=model.config)
    called = []
    with torch.no_grad():
        model(tiny_tokens(1, 9), past_key_values=cache)
        for length in (1, 1, 5):  # the first makes what is kept
            query, (key, value) = torch.randn(1, 4, length, 16), torch.randn(2, 1, 2, length, 16)
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                linattn_attention(attention, query, *cache.update(key, value, 0), None)
            called.append([event.name for event in seen.events() or () if event.cpu_parent is None])
    assert len(called[2]) <= len(called[1]) + 2, called


def test_a_model_that_refused_a_call_midway_is_copied() -> None:
    """What entered the layer is left behind there, with the graph that it came from."""
    model, tokens = model_of({"decay": "token"}), tiny_tokens(2)
    cache = DynamicCache(config=model.config)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    model(tokens, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="hides other tokens of the past"):
        model(tokens[:, :1], attention_mask=torch.ones(2, tokens.shape[1] + 1), past_key_values=cache)
    assert torch.equal(copy.deepcopy(model)(tokens).logits, model(tokens).logits)
