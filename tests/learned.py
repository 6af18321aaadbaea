"""Tiny converted models that have learned something, and their logits in pieces."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_config, tiny_tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_linattn import LinAttnConfig, LinAttnParams
from hf_linattn.models import config_class_for


def learned_model(name: str = "llama", **options: Any) -> Any:
    """Every number of every layer differs from where it started, and depends on the token where it may."""
    stored = LinAttnConfig(**{"learnable": True, **options}).to_dict()
    config = config_class_for(name)(**tiny_config(name, **stored).to_diff_dict() | {"linattn": stored})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LinAttnParams):
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1))
    return model


def feed(model: Any, ids: Tensor, cache: Any, lengths: list[int], **kwargs: Any) -> Tensor:
    """Logits (B, N, V) of `ids` (B, N), given in pieces of `lengths` with a cache."""
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache, **kwargs).logits for part in ids.split(lengths, 1)], 1)


def check_pieces_give_the_whole(model: Any) -> dict[str, Tensor]:
    """Pieces and single tokens through both caches give what the whole gives; returns the state of the first layer behind them."""
    ids = tiny_tokens()
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        torch.testing.assert_close(feed(model, ids, cache, [8, 1, 1, 13]), full, atol=1e-5, rtol=0)
    return cache.layers[0].state


def check_tokens_are_taken_back(model: Any) -> None:
    """Other tokens in the place of some that were cropped give what they give without those."""
    ids, other = tiny_tokens(), tiny_tokens(seed=9)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    feed(model, ids, cache, [12, 1, 1, 9])
    cache.crop(-10)
    after = feed(model, other[:, 13:], cache, [4, 1, 5])
    with torch.no_grad():
        expected = model(torch.cat([ids[:, :13], other[:, 13:]], 1)).logits[:, 13:]
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=0)
