"""What else `generate` offers, for students whose every number is learned: right beside what it gives without a cache, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from byte_models import TOKENS, byte_tokenizer
from learned import learned_model
from tiny_models import tiny_tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache, cache_utils

WINDOW = {"form": "window", "window": 5, "sinks": 2}
STUDENTS: dict[str, dict[str, Any]] = {
    "token": {"decay": "token", "input_gate": "token", "output_map": "norm_gate"},
    "feature map": {"feature_map": "hedgehog", "decay": "head"},
    "window": {**WINDOW, "kernel": "quadratic", "decay": "key_head", "features": 4, "gate": "token"},
    "hybrid": {**WINDOW, "feature_map": "hedgehog", "decay": "token", "softmax_layers": [1]},
}
NEW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=STUDENTS)
def model(request: Any) -> Any:
    return learned_model(**STUDENTS[request.param])


@pytest.fixture
def prompt() -> tuple[Tensor, Tensor]:
    """Two sequences of 23 and 19 tokens, padded on the left to 28."""
    ids, padded = tiny_tokens(), torch.zeros(2, 28, dtype=torch.long)
    padded[0, 5:], padded[1, 9:] = ids[0], ids[1, :19]
    return padded, (padded != 0).long()


def generate(model: Any, prompt: tuple[Tensor, Tensor], **kwargs: Any) -> Any:
    return model.generate(prompt[0], attention_mask=prompt[1], **NEW | kwargs)


def test_prompts_in_chunks_before_a_static_cache_has_begun(model: Any, prompt: tuple[Tensor, Tensor]) -> None:
    """`generate` makes the state ahead of the first token there."""
    expected = generate(model, prompt, use_cache=False)
    for size in (1, 6, 40):
        assert torch.equal(generate(model, prompt, prefill_chunk_size=size, cache_implementation="static"), expected)
    assert torch.equal(generate(model, prompt, num_beams=2, prefill_chunk_size=6, cache_implementation="static"),
                       generate(model, prompt, num_beams=2, use_cache=False))  # fmt: skip


def test_embeddings_in_the_place_of_tokens(model: Any, prompt: tuple[Tensor, Tensor]) -> None:
    embedded, expected = model.get_input_embeddings()(prompt[0]), generate(model, prompt, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(inputs_embeds=embedded, attention_mask=prompt[1], **NEW, **options), expected[:, 28:])


def test_guidance_by_another_prompt(model: Any, prompt: tuple[Tensor, Tensor]) -> None:
    """Which has a cache of its own."""
    options = {"guidance_scale": 1.7, "negative_prompt_ids": prompt[0].flip(0), "negative_prompt_attention_mask": prompt[1].flip(0)}
    assert torch.equal(generate(model, prompt, **options), generate(model, prompt, **options, use_cache=False))


def test_logits_and_hidden_states_are_those_of_the_whole_text(model: Any, prompt: tuple[Tensor, Tensor]) -> None:
    asked = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, "output_hidden_states": True}
    out, whole = generate(model, prompt, **asked), generate(model, prompt, **asked, use_cache=False)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(whole.logits), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(whole.scores), atol=1e-4, rtol=0)
    for one, other in zip(out.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(one[-1][:, -1], other[-1][:, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_conversation_of_several_turns(static: bool, model: Any, prompt: tuple[Tensor, Tensor]) -> None:
    """Each turn with the whole text, the last with its new tokens alone, behind padding."""
    cache = StaticCache(config=model.config, max_cache_len=80) if static else DynamicCache(config=model.config)
    text, mask = prompt
    for turn in range(3):
        said = generate(model, (text, mask), past_key_values=cache)
        text = torch.cat([said, tiny_tokens(2, 3, seed=turn)], 1)
        mask = torch.cat([mask, torch.ones(2, 8 + 3, dtype=torch.long)], 1)
    seen = int(cache.get_seq_length())
    last = generate(model, (text[:, seen:], mask), past_key_values=cache)
    assert torch.equal(last[:, -8:], generate(model, (text, mask), use_cache=False)[:, -8:])


def test_text_ends_at_a_string(model: Any) -> None:
    model, tokenizer = learned_model(**model.config.linattn), byte_tokenizer()
    model.resize_token_embeddings(TOKENS)
    ids = tokenizer("once upon a time", return_tensors="pt")["input_ids"]
    said = generate(model, (ids, torch.ones_like(ids)))[0, ids.shape[1] :]
    out = generate(model, (ids, torch.ones_like(ids)), stop_strings=[tokenizer.decode(said[3:4])], tokenizer=tokenizer, min_new_tokens=0)
    assert out[0, ids.shape[1] :].tolist() == said[: said.tolist().index(said[3]) + 1].tolist()


class _Stream:
    """In the place of a device's."""

    def __enter__(self) -> None: ...
    def __exit__(self, *args: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache(implementation: str, model: Any, prompt: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of softmax layers are away until they are fetched, in time though a state is neither; here they go nowhere, to show it."""

    def offload(layer: Any) -> None:
        layer.away, layer.keys, layer.values = (layer.keys, layer.values), None, None

    def prefetch(layer: Any) -> None:
        if getattr(layer, "away", None) is not None:
            (layer.keys, layer.values), layer.away = layer.away, None

    for kind in (cache_utils.DynamicLayer, cache_utils.StaticLayer):
        monkeypatch.setattr(kind, "offload", offload)
        monkeypatch.setattr(kind, "prefetch", prefetch)
    monkeypatch.setattr(torch, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: _Stream())
    assert torch.equal(generate(model, prompt, cache_implementation=implementation), generate(model, prompt, use_cache=False))


@pytest.mark.parametrize(("implementation", "sentence"), [
    ("quantized", "QuantizedCache. is only supported for models with only full attention layers"),
    ("paged", "Continuous batching keeps keys and values in pages, and linear attention keeps none"),
])  # fmt: skip
def test_caches_of_keys_are_refused(implementation: str, sentence: str, model: Any, prompt: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match=sentence):
        generate(model, prompt, cache_implementation=implementation)
