"""Tiny softmax models of every architecture that can be converted."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCABULARY = 97
LAYERS = 3
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "phi": {},
    "gpt_neox": {},
}
MODEL_TYPES = tuple(_EXTRA)


def softmax_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random softmax causal language model of the architecture, with 3 layers and 4 query heads of size 8."""
    torch.manual_seed(seed)
    config = transformers.CONFIG_MAPPING[model_type](**(_SIZES | _EXTRA[model_type] | changes))
    return AutoModelForCausalLM.from_config(config).eval()
