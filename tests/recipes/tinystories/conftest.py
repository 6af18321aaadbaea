"""A tiny corpus, tokenizer and softmax checkpoint, made once, and a config file that names them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.common.config import build
from recipes.quickstart.corpus import stories
from recipes.tinystories.settings import Settings

MARK = "<|endoftext|>"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """text: 200 stories; model: a softmax Llama with its tokenizer, in `folder`."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = list(stories(200, seed=1))
    (folder / "stories.txt").write_text(f"\n{MARK}\n".join(texts), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=[MARK], initial_alphabet=alphabet, show_progress=False)
    )
    # As many tokenizers do, it begins every text with a token of its own where it is not told to leave special tokens out.
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{MARK} $A", special_tokens=[(MARK, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=MARK, eos_token=MARK).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return SimpleNamespace(folder=folder, text=folder / "stories.txt", model=folder / "model", texts=texts)


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    """Every test without the hub, with a fresh accelerate."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def settings(tiny, tmp_path):
    """A function that makes Settings of a short run, with changes."""

    def make(**changes) -> Settings:
        values = {
            "output": str(tmp_path / "run"),
            "model": str(tiny.model),
            "train_data": [str(tiny.text)],
            "valid_stories": 20,
            "length": 32,
            "batch_size": 4,
            "steps": 6,
            "warmup": 0.0,
            "learning_rate": 0.01,
            "log_every": 1,
            "eval_every": 3,
            "eval_sequences": 8,
            "checkpoint_every": 2,
            "samples": 1,
            "sample_tokens": 4,
        }
        return build(Settings, {**values, **changes}, "test")

    return make


@pytest.fixture
def config_file(settings, tmp_path):
    """A function that writes such settings to a YAML file and returns its path."""

    def make(**changes):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(vars(settings(**changes))))
        return path

    return make
