"""The bounds of settings, each tried at the last value that is allowed and at the first that is not."""

from __future__ import annotations

from typing import Any

import pytest

from recipes.lra import settings as lra
from recipes.tinystories import settings as tinystories

MOST_SEED = 2**32 - 1
# By key: values that are allowed, and values that are not, with what else has to be set for them to be tried alone.
ARENA: dict[str, tuple[list[Any], list[Any]]] = {
    **{name: ([0.0, 0.9999], [-1e-9, 1.0]) for name in ("attention_dropout", "hidden_dropout")},
    **{name: ([1, 7], [0, -1]) for name in ("batch_size", "steps", "eval_every", "eval_batch_size", "pad_multiple")},
    "log_every": ([1, 500, 1000], [0, 300, 2000]),
    "save_every": ([100, 5000], [0, 50, 150]),
    "seeds": ([[0], [MOST_SEED], [3, 1]], [[], [1, 1], [-1], [MOST_SEED + 1], [0, MOST_SEED + 1]]),
    "learning_rate": ([1e-12], [0.0, -1e-12]),
    "warmup_steps": ([0], [-1]),
    "max_minutes": ([None, 1e-9], [0, -1e-9]),
    "task": (["text", "pathx"], ["chess", ""]),
    "turn_pictures": ([False], [True]),
    "dropout": (["none", "noise"], ["standard"]),
}
STORIES: dict[str, tuple[list[Any], list[Any]]] = {
    **{name: ([1, 7], [0, -1]) for name in ("batch_size", "gradient_accumulation", "eval_sequences", "valid_stories")},
    "steps": ([None, 1], [0, -1]),
    "length": ([2], [1, 0]),
    "log_every": ([1, 50, 100], [0, 30, 200]),
    "eval_every": ([10, 1000], [0, 5, 15]),
    "checkpoint_every": ([10, 1000], [0, 5, 15]),
    "seed": ([0, MOST_SEED], [-1, MOST_SEED + 1]),
    **{name: ([1e-12], [0.0, -1e-12, float("nan")]) for name in ("learning_rate", "linattn_learning_rate", "epochs", "clip")},
    **{name: ([0.0, 1.0], [-1e-9, 1.000001, float("nan")]) for name in ("warmup", "teacher_weight")},
    "noise": ([0.0, 0.999], [-1e-9, 0.99901]),
    "beta2": ([0.0, 0.9999], [-1e-9, 0.99991]),
    **{name: ([0, 3], [-1]) for name in ("weight_decay", "samples", "sample_tokens")},
    "model_type": ([None], ["llama"]),
    "model": (["x"], [None]),
    "train_data": ([["text"]], [[]]),
}


@pytest.mark.parametrize("key", ARENA)
def test_the_arenas(key: str) -> None:
    _tried(lra.Settings, {"task": "text", "data": "data", "output": "out"}, key, *ARENA[key])


@pytest.mark.parametrize("key", STORIES)
def test_the_stories(key: str) -> None:
    _tried(tinystories.Settings, {"output": "out", "model": "x"}, key, *STORIES[key])


def _tried(settings: type, least: dict[str, Any], key: str, allowed: list[Any], refused: list[Any]) -> None:
    for value in allowed:
        assert getattr(settings(**least | {key: value}), key) == value
    for value in refused:
        with pytest.raises(ValueError, match=key):
            settings(**least | {key: value})


def test_what_does_not_go_together() -> None:
    arena, stories = {"task": "pathfinder", "data": "data", "output": "out"}, {"output": "out", "model_type": "llama"}
    assert lra.Settings(**arena, turn_pictures=True, attn_implementation="sdpa", dropout="standard").turn_pictures
    with pytest.raises(ValueError, match="dropout: noise is linattn's"):
        lra.Settings(**arena, attn_implementation="sdpa", dropout="noise")
    assert tinystories.Settings(**stories, tokenizer="x").tokenizer == "x"
    with pytest.raises(ValueError, match="a model from scratch needs a tokenizer"):
        tinystories.Settings(**stories)


def test_what_a_run_reads_and_where_it_is() -> None:
    given = {"model": "m", "tokenizer": "t", "teacher": "T", "train_data": ["a", "b"], "valid_data": ["c"]}
    assert tinystories.Settings(output="out", **given).reads() == ["a", "b", "c", "m", "t", "T"]
    assert tinystories.Settings(output="out", model="m", train_data=["a"]).reads() == ["a", "m"]
    assert lra.Settings(task="text", data="data", output="out").folder(7).as_posix() == "out/seed-7"
