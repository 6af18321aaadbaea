"""Tokens taken back out of the state leave what was there before them."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens
from transformers import DynamicCache

from hf_linattn import cache_bytes, rollback

OPTIONS = [{}, {"decay": "head"}, {"kernel": "quadratic"}]


@pytest.fixture(params=OPTIONS, ids=str)
def model(request):
    return tiny_model("llama", **request.param)


def feed(model, ids, cache, lengths, mask=None):
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(lengths, 1)], 1)


def recording_cache(model):
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    return cache


def test_crop_then_other_tokens_equals_never_having_seen_them(model):
    ids, other = tiny_tokens(), tiny_tokens(seed=9)
    cache = recording_cache(model)
    feed(model, ids, cache, [12, 1, 1, 9])
    cache.crop(-10)
    assert cache.get_seq_length() == 13
    after = feed(model, other[:, 13:], cache, [4, 1, 5])
    expected = feed(model, torch.cat([ids[:, :13], other[:, 13:]], 1), DynamicCache(config=model.config), 23)[:, 13:]
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)


def test_crops_follow_one_another(model):
    ids = tiny_tokens()
    cache = recording_cache(model)
    full = feed(model, ids, cache, 23)
    for count in (3, 1, 5):
        cache.crop(-count)
    cache.crop(0)
    torch.testing.assert_close(feed(model, ids[:, 14:], cache, [1, 8]), full[:, 14:], atol=1e-4, rtol=0)


def test_everything_can_be_cropped(model):
    ids = tiny_tokens()
    cache = recording_cache(model)
    full = feed(model, ids, cache, 23)
    cache.crop(-23)
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(feed(model, ids, cache, 23), full, atol=1e-4, rtol=0)


def test_what_is_kept_is_bounded(model, monkeypatch):
    monkeypatch.setattr(rollback, "KEPT_TOKENS", 5)
    ids = tiny_tokens(length=40)
    cache = recording_cache(model)
    full = feed(model, ids, cache, [19, *[1] * 21])
    assert cache.layers[0]._recent.count <= 10
    held = [x for layer in cache.layers for state in (layer.state, layer._recent.state, layer._recent.tokens) for x in state.values()]
    assert cache_bytes(cache) == sum(x.nbytes for x in held)
    cache.crop(-5)
    torch.testing.assert_close(feed(model, ids[:, 35:], cache, 5), full[:, 35:], atol=1e-4, rtol=0)


def test_recording_can_start_in_the_middle(model):
    ids = tiny_tokens()
    cache = DynamicCache(config=model.config)
    feed(model, ids[:, :10], cache, 10)
    cache.activate_past_recording()
    full = feed(model, ids[:, 10:], cache, [1, 12])
    cache.crop(-12)
    torch.testing.assert_close(feed(model, ids[:, 11:], cache, 12), full[:, 1:], atol=1e-4, rtol=0)
    with pytest.raises(RuntimeError, match="cannot take 14 tokens back"):
        cache.crop(-14)


def test_a_crop_to_where_recording_began_can_be_made_again(model):
    """A step writes the state in place, and must not write what the next crop goes back to."""
    ids, other = tiny_tokens(), tiny_tokens(seed=9)
    cache = DynamicCache(config=model.config)
    feed(model, ids[:, :10], cache, 10)
    cache.activate_past_recording()
    full = feed(model, ids[:, 10:], cache, 13)
    for _ in range(2):
        cache.crop(-13)
        feed(model, other[:, 10:], cache, [1, 12])
    cache.crop(-13)
    torch.testing.assert_close(feed(model, ids[:, 10:], cache, [1, 12]), full, atol=1e-4, rtol=0)


def test_a_reset_forgets_what_was_recorded(model):
    ids, other = tiny_tokens(), tiny_tokens(seed=9)
    cache = recording_cache(model)
    feed(model, other, cache, [12, 11])
    cache.reset()
    with pytest.raises(RuntimeError, match="has recorded the last 0"):
        cache.crop(-1)
    full = feed(model, ids, cache, 23)
    cache.crop(-9)
    torch.testing.assert_close(feed(model, ids[:, 14:], cache, 9), full[:, 14:], atol=1e-4, rtol=0)


def test_crop_after_a_padded_prefill(model):
    ids = tiny_tokens()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    cache = recording_cache(model)
    with torch.no_grad():
        full = model(ids, attention_mask=mask, past_key_values=cache).logits
    cache.crop(-9)
    with torch.no_grad():
        again = model(ids[:, 14:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(again, full[:, 14:], atol=1e-4, rtol=0)


def test_crop_follows_reordered_sequences(model):
    ids = tiny_tokens()
    cache = recording_cache(model)
    full = feed(model, ids, cache, 23)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-4)
    torch.testing.assert_close(feed(model, ids.flip(0)[:, 19:], cache, 4), full.flip(0)[:, 19:], atol=1e-4, rtol=0)


def test_nothing_recorded_nothing_cropped():
    model, ids = tiny_model("llama"), tiny_tokens()
    cache = DynamicCache(config=model.config)
    feed(model, ids, cache, 23)
    cache.crop(0)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)


def test_a_length_is_no_number_of_tokens_to_remove():
    model, ids = tiny_model("llama"), tiny_tokens()
    cache = recording_cache(model)
    feed(model, ids, cache, 23)
    with pytest.raises(ValueError, match="minus the number of tokens"):
        cache.crop(10)


def test_recording_that_ends_forgets():
    model, ids = tiny_model("llama"), tiny_tokens()
    cache = recording_cache(model)
    feed(model, ids[:, :20], cache, 20)
    for layer in cache.layers:
        layer.record_past = False  # what generate does before it hands a cache back
    feed(model, ids[:, 20:], cache, 3)
    assert all(layer._recent is None for layer in cache.layers)
