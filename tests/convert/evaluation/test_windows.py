"""The untrained window with sinks, against a mask written out, by eager attention."""

from __future__ import annotations

import pytest
import torch
from byte_models import byte_model
from transformers import AttentionInterface, DynamicCache, Gemma2Config, Gemma2ForCausalLM, GenerationConfig
from transformers.models.llama.modeling_llama import eager_attention_forward

from convert.errors import ConversionError
from convert.evaluation.windows import window_mask, windowed

IDS = torch.randint(1, 257, (2, 30), generator=torch.Generator().manual_seed(0))


def test_the_mask_written_out() -> None:
    mask = window_mask(5, 5, 1, 2)
    written = ["1", "11", "111", "11.1", "11..1"]
    assert [[bool(x) for x in row] for row in mask] == [[c == "1" for c in row.ljust(5, ".")] for row in written]
    assert torch.equal(window_mask(2, 5, 1, 2), mask[3:])


@pytest.mark.parametrize("layers", [None, {1}])
def test_it_is_softmax_over_what_the_mask_lets_through(layers: set[int] | None) -> None:
    model = byte_model()
    plain = model(IDS).logits

    def written_out(module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
        mask = torch.full((30, 30), float("-inf"))
        for i in range(30):
            for j in range(i + 1):
                if i - j < 5 or j < 2 or (layers is not None and module.layer_idx not in layers):
                    mask[i, j] = 0
        return eager_attention_forward(module, query, key, value, mask[None, None], **kwargs)

    AttentionInterface.register("written_out", written_out)
    under = windowed(model, 5, 2, layers)
    found = under(IDS).logits
    assert torch.equal(model(IDS).logits, plain)  # the model itself is as it was
    model.set_attn_implementation("written_out")
    torch.testing.assert_close(found, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 0.1
    assert {p.data_ptr() for p in under.parameters()} == {p.data_ptr() for p in model.parameters()}


def test_it_generates_what_it_would_find_without_a_cache() -> None:
    under = windowed(byte_model(), 5, 2)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    ids = under.generate(IDS, attention_mask=torch.ones_like(IDS), generation_config=config)
    logits = under(ids).logits
    assert torch.equal(logits[:, 29:-1].argmax(-1), ids[:, 30:])


@pytest.mark.parametrize("layers", [None, {1}])
@torch.no_grad()
def test_in_pieces_it_finds_what_it_finds_at_once(layers: set[int] | None) -> None:
    """Layers that no window was put on see all that the cache holds too."""
    under = windowed(byte_model(), 5, 2, layers)
    cache = DynamicCache(config=under.config)
    found = torch.cat([under(part, past_key_values=cache).logits for part in IDS.split([11, 1, 13, 5], 1)], 1)
    torch.testing.assert_close(found, under(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_window_is_put_on_softmax_over_all_tokens_alone() -> None:
    config = Gemma2Config(vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8)
    with pytest.raises(ConversionError, match="Gemma2ForCausalLM has another"):
        windowed(Gemma2ForCausalLM(config), 5, 2)
