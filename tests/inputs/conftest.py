"""A tiny checkpoint with a tokenizer and a text, and the real commands run on what a test has spoiled."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.common.config import dump

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "hill", "and", "then", "it", "was", "happy"]
ENDS = "<|endoftext|>"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, a softmax checkpoint of one layer, and `text.txt`. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("whole")
    vocabulary = {word: number for number, word in enumerate([ENDS, "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=ENDS, eos_token=ENDS).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(folder / "model")
    stories = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(3, 30)) for i in range(1, 16)]
    (folder / "text.txt").write_text(f"\n{ENDS}\n".join(stories), encoding="utf-8")
    return folder


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may spoil."""
    return Path(shutil.copytree(whole / "model", tmp_path / "in" / "model"))


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every test without the hub, with nothing on standard input, and a fresh accelerate."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail(f"a question was asked: {asked}"))
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """A function: module and arguments of a command -> its exit status and its last line on standard error, checked to be the only
    sentence where the status is 2."""

    def call(module: str, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert status in (0, 2) and len(errors) == (status == 2), (status, errors)
        return status, "".join(errors)

    return call


@pytest.fixture
def entry(run: Callable[..., tuple[int, str]], whole: Path, tmp_path: Path) -> Callable[[str, Path], tuple[int, str]]:
    """A function: one of ENTRIES and a checkpoint's folder -> status and error of that command on it; refused, it leaves nothing."""
    arguments: dict[str, Callable[[Path], list[object]]] = {
        "convert.linearize": lambda folder: [folder, tmp_path / "out"],
        "recipes.tinystories.evaluate": lambda folder: [
            folder, "--data", whole / "text.txt", "--out", tmp_path / "out", "--stories", 3, "--decode", 8, "--tokens", 2,
        ],
        "recipes.tinystories.train": lambda folder: ["--config", _train_config(tmp_path, folder, whole / "text.txt")],
    }  # fmt: skip

    def call(module: str, folder: Path) -> tuple[int, str]:
        status, error = run(module, *arguments[module](folder))
        assert (tmp_path / "out").exists() == (status == 0)
        return status, error

    return call


def _train_config(tmp_path: Path, folder: Path, text: Path) -> Path:
    settings = {"output": str(tmp_path / "out"), "model": str(folder), "train_data": [str(text)], "valid_stories": 3, "length": 16}
    settings |= {"batch_size": 2, "steps": 2, "log_every": 1, "eval_every": 1, "checkpoint_every": 1, "samples": 0}
    (tmp_path / "train.yaml").write_text(dump(settings), encoding="utf-8")
    return tmp_path / "train.yaml"
