"""Negative controls: the comparisons of the other files fail once the thing they test is taken away."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens
from transformers import DynamicCache

from hf_linattn import attention

NAMES = ["llama", "gpt_neox", "qwen3"]


@pytest.fixture(params=NAMES)
def case(request):
    model, ids = tiny_model(request.param, scale=6.0), tiny_tokens()
    with torch.no_grad():
        return model, ids, model(ids, use_cache=False).logits


def difference(actual, expected):
    return (actual - expected).abs().max().item()


@torch.no_grad()
def test_the_first_token_moves_the_last_logits(case):
    model, ids, full = case
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 90 + 3
    assert difference(model(other).logits[:, -1], full[:, -1]) > 1e-3


@torch.no_grad()
def test_padding_that_is_not_masked_shows(case):
    model, ids, full = case
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    assert difference(model(padded, attention_mask=mask).logits[:, 5:], full) < 1e-4
    assert difference(model(padded, attention_mask=torch.ones_like(mask)).logits[:, 5:], full) > 1e-3


@torch.no_grad()
def test_packing_that_is_ignored_shows(case, monkeypatch):
    model, ids, full = case
    packed = torch.cat([ids[:1, :9], ids[1:, :14]], 1)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    assert difference(model(packed, position_ids=positions).logits[0, 9:], full[1, :14]) < 1e-4
    monkeypatch.setattr(attention, "sequence_starts", lambda *args: None)
    assert difference(model(packed, position_ids=positions).logits[0, 9:], full[1, :14]) > 1e-3


@torch.no_grad()
def test_a_state_that_is_emptied_shows(case):
    model, ids, full = case
    cache, out = DynamicCache(config=model.config), []
    for token in ids.split(1, 1):
        out.append(model(token, past_key_values=cache).logits)
        for layer in cache.layers:
            layer.state["sums"].zero_()
    assert difference(torch.cat(out, 1), full) > 1e-3


@torch.no_grad()
def test_a_crop_that_does_nothing_shows(case, monkeypatch):
    model, ids, full = case
    cache = DynamicCache(config=model.config)
    model(tiny_tokens(seed=9), past_key_values=cache)
    for layer in cache.layers:
        layer.cumulative_length = 0  # the length alone goes back, the state stays
    assert difference(model(ids, past_key_values=cache, position_ids=torch.arange(23)[None]).logits, full) < 1e-4
    cache = DynamicCache(config=model.config)
    model(tiny_tokens(seed=9)[:, :11], past_key_values=cache)
    for layer in cache.layers:
        layer.cumulative_length = 1
    assert difference(model(ids[:, 1:], past_key_values=cache).logits, full[:, 1:]) > 1e-3
