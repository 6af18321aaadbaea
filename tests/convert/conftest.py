"""Tiny softmax checkpoints of every supported architecture, on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tiny_softmax import VOCABULARY, softmax_model

transformers.utils.logging.disable_progress_bar()


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
