"""Tiny softmax checkpoints of every supported architecture, on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

transformers.utils.logging.disable_progress_bar()

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


def softmax_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random softmax causal language model of the architecture, with 3 layers and 4 query heads of size 8."""
    torch.manual_seed(seed)
    config = transformers.CONFIG_MAPPING[model_type](**(_SIZES | _EXTRA[model_type] | changes))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def softmax_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function: model type -> folder of its softmax checkpoint, written once a session. Tests must not write into it."""
    written: dict[str, Path] = {}

    def make(model_type: str = "llama") -> Path:
        if model_type not in written:
            written[model_type] = tmp_path_factory.mktemp(model_type) / "softmax"
            softmax_model(model_type).save_pretrained(written[model_type])
        return written[model_type]

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """(2, 13) token ids without special ones."""
    return torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(1))
