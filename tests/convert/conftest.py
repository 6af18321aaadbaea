"""Tiny softmax checkpoints of every supported architecture, on disk; and what is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from byte_models import START, byte_model, byte_tokenizer
from tiny_softmax import VOCABULARY, softmax_model

from convert.linearize import linearize
from convert.options import LinearizeOptions
from recipes.quickstart.corpus import stories

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


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher/, student/ and text.txt. Tests must not write into it."""
    home = tmp_path_factory.mktemp("evaluated")
    byte_model().save_pretrained(home / "teacher")
    byte_tokenizer().save_pretrained(home / "teacher")
    linearize(home / "teacher", home / "student")
    words = ["the", "grey", "mill", "stood", "beside", "seven", "quiet", "wells", "while", "nobody", "counted", "höher", "steps"]
    generator = torch.Generator().manual_seed(0)
    documents = [" ".join(words[i] for i in torch.randint(len(words), (60,), generator=generator)) for _ in range(40)]
    (home / "text.txt").write_text(f"\n{START}\n".join(documents), encoding="utf-8")
    return home


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny softmax Llama with a tokenizer of bytes, a text, and the model converted, layer 1 of 3 left softmax."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "text.txt").write_text(f"\n{START}\n".join(stories(60, seed=1)), encoding="utf-8")
    byte_tokenizer().save_pretrained(folder / "teacher")
    byte_model(max_position_embeddings=64, tie_word_embeddings=True).save_pretrained(folder / "teacher")
    linearize(folder / "teacher", folder / "student", LinearizeOptions(keep_softmax=(1,)))
    return SimpleNamespace(folder=folder, text=folder / "text.txt", teacher=folder / "teacher", student=folder / "student")
