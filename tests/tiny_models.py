"""Tiny random models of every architecture the plugin is tested on: three layers, four heads, in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    ViTConfig,
)

import hf_linattn  # noqa: F401  (registers "linattn")

VOCABULARY = 97
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 2}
WINDOW = {"head_dim": 16, "sliding_window": 8}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**TEXT, **GROUPED),
    "mistral": lambda: MistralConfig(**TEXT, **GROUPED, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**TEXT, **GROUPED),
    "qwen3": lambda: Qwen3Config(**TEXT, **GROUPED, head_dim=16),
    "gemma2": lambda: Gemma2Config(**TEXT, **GROUPED, **WINDOW),
    "gemma3": lambda: Gemma3TextConfig(**TEXT, **GROUPED, **WINDOW),
    "phi": lambda: PhiConfig(**TEXT, num_key_value_heads=4),
    "gpt_neox": lambda: GPTNeoXConfig(**TEXT),
    "bert": lambda: BertConfig(**TEXT),
    "modernbert": lambda: ModernBertConfig(**TEXT, local_attention=8, cls_token_id=1, sep_token_id=2),
    "vit": lambda: ViTConfig(**SIZES, image_size=16, patch_size=4),
}
ENCODERS = ["bert", "modernbert", "vit"]
CAUSAL = [name for name in CONFIGS if name not in ENCODERS]


def tiny_config(name: str, layers: int = 3, **options: Any) -> PreTrainedConfig:
    """The tiny configuration of an architecture; `options` become `config.linattn`."""
    config = CONFIGS[name]()
    if layers != config.num_hidden_layers:
        config.num_hidden_layers = layers
    if options:
        config.linattn = options
    return config


def tiny_model(name: str, attn_implementation: str = "linattn", scale: float = 2.0, layers: int = 3, **options: Any) -> PreTrainedModel:
    """A tiny model in evaluation mode, its weights `scale` times the usual ones: attention that matters, logits that differ."""
    torch.manual_seed(0)
    auto = AutoModel if name in ENCODERS else AutoModelForCausalLM
    model = auto.from_config(tiny_config(name, layers, **options), attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def tiny_tokens(batch: int = 2, length: int = 23, seed: int = 1) -> torch.Tensor:
    """Random token ids (batch, length) without special tokens."""
    return torch.randint(3, VOCABULARY - 7, (batch, length), generator=torch.Generator().manual_seed(seed))
