"""What commands and functions do where nothing is said: the README's tables and the settings' docstrings promise it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import convert.calibrate
import convert.distill
import convert.evaluate
import convert.linearize
import convert.select_layers
import convert.transfer
import recipes.lra.prepare
import recipes.lra.settings
import recipes.quickstart.__main__
import recipes.tinystories.evaluate
import recipes.tinystories.settings
from convert.evaluation.options import EvaluationOptions
from convert.options import LinearizeOptions
from convert.select_layers import SelectOptions
from recipes.lra.data import TASKS
from recipes.lra.model import LRAConfig

STAGE: dict[str, Any] = {
    "teacher": "", "data": [], "valid_data": [], "split": "train", "column": "text", "separator": "<|endoftext|>", "separate": False,
    "length": 1024, "batch_size": 16, "gradient_accumulation": 1, "tokens": 1_000_000, "learning_rate": 5e-4, "head_learning_rate": 0.03,
    "warmup": 0.05, "final_rate": 0.02, "clip": 1.0, "mixed_precision": "", "window_drop": 0.0, "gradient_checkpointing": False,
    "seed": 0, "log_every": 10, "validate_every": 100, "save_every": 100, "valid_rows": 32, "dtype": "float32",
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
# By parameter, wherever one of that name has a default: nothing is replaced, gone on with or allowed that was not asked for.
EVERYWHERE = {"overwrite": False, "resume": False, "debug": False, "large_state": False, "seed": 0}
SIGNATURES: dict[Callable[..., Any], dict[str, Any]] = {
    convert.linearize.main: {
        "kernel": None, "decay": None, "keep_softmax": "", "temperature": None, "dropout": None, "learnable": True, "dtype": None,
        "revision": None, "overwrite": False, "large_state": False, "check": True, "seed": 0,
    },
    convert.select_layers.main: {
        "count": 4, "candidates": 12, "rows": 6, "length": 1024, "distances": "400,900", "needles": 32, "window": 64, "sinks": 4,
        "recall_weight": 1.0, "attention_only": False, "batch_tokens": 0, "device": "", "dtype": "", "seed": 0, "overwrite": False,
    },
    convert.transfer.main: STAGE | {"train": "attention"},
    convert.calibrate.main: STAGE | {"train": "attention", "tokens": 65_536},
    convert.distill.main: STAGE | {
        "tokens": 20_000_000, "kl_weight": 1.0, "text_weight": 0.0, "lora": 0, "long_length": 0, "long_share": 0.2, "compile": False,
        "control": False, "repeat": 0,
    },
    convert.evaluate.main: {
        "rows": 24, "length": "1024", "window_control": "", "sinks": 4, "recall": "all", "distances": "40,150,400,900,1900",
        "needles": 100, "recall_length": 1024, "tasks": "none", "limit": None, "decode": "512,2048", "batch_tokens": 0, "device": "",
        "dtype": "", "seed": 0, "resume": False, "overwrite": False,
    },
    recipes.tinystories.evaluate.main: {
        "out": Path("out/evaluation"), "prompt": None,
        "stories": 500, "length": 512, "decode": "128,512,2048", "tokens": 80, "split": "validation", "column": "text",
        "separator": "<|endoftext|>", "batch_size": 16, "device": "", "dtype": "float32", "overwrite": False,
    },
    recipes.lra.prepare.prepare: {
        "source": None, "train": None, "valid": None, "test": None, "seed": 0, "processes": 0, "images": "png", "overwrite": False,
    },
    recipes.quickstart.__main__.main: {"model": None, "data": None, "out": Path("out"), "scale": 1.0, "debug": False},
    LRAConfig.__init__: {
        "vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
        "max_position_embeddings": 1024, "hidden_act": "gelu", "hidden_dropout": 0.1, "attention_dropout": 0.0, "layer_norm_eps": 1e-5,
        "initializer_range": 0.02, "pooling": "mean", "norm": "pre", "attention_size": None, "towers": 1, "pad_token_id": 0,
    },
}  # fmt: skip
SETTINGS: dict[type, dict[str, Any]] = {
    LinearizeOptions: {
        "kernel": None, "decay": None, "keep_softmax": (), "temperature": None, "dropout": None, "learnable": True, "dtype": None,
        "revision": None, "overwrite": False, "large_state": False, "check": True, "seed": 0,
    },
    SelectOptions: {
        "count": 4, "candidates": 12, "rows": 6, "length": 1024, "distances": (400, 900), "needles": 32, "window": 64, "sinks": 4,
        "recall_weight": 1.0, "attention_only": False, "batch_tokens": 0, "device": "", "dtype": "", "seed": 0,
    },
    EvaluationOptions: {
        "rows": 24, "lengths": (1024,), "windows": (), "sinks": 4, "distances": (40, 150, 400, 900, 1900), "needles": 100,
        "recall_length": 1024, "tasks": (), "limit": None, "decode": (512, 2048), "batch_tokens": 0, "device": "", "dtype": "", "seed": 0,
    },
    recipes.lra.settings.Settings: {
        "attn_implementation": "linattn", "linattn": {}, "dropout": "none", "attention_dropout": 0.1, "noise_schedule": "linear",
        "hidden_dropout": 0.1, "model": {}, "seeds": [0], "batch_size": 32, "learning_rate": 1e-4, "schedule": "linear",
        "warmup_steps": 1000, "steps": 5000, "max_minutes": None, "weight_decay": 0.0, "beta2": 0.999, "gradient_clip": 1.0,
        "eval_every": 500, "eval_batch_size": 64, "validation_examples": None, "log_every": 100, "save_every": 1000, "pad_multiple": 128,
        "blank_is_padding": False, "turn_pictures": False, "mixed_precision": "no", "compile": "none",
    },
    recipes.tinystories.settings.Settings: {
        "model": None, "model_type": None, "model_config": {}, "tokenizer": None, "attn_implementation": None, "linattn": {},
        "train_data": ["roneneldan/TinyStories"], "valid_data": [], "train_split": "train", "valid_split": "validation",
        "text_column": "text", "separator": "<|endoftext|>", "valid_stories": 500, "length": 512, "separate_stories": False,
        "steps": None, "epochs": 1.0, "batch_size": 8, "gradient_accumulation": 1, "learning_rate": 1e-3, "linattn_learning_rate": 0.1,
        "weight_decay": 0.01, "beta2": 0.95, "warmup": 0.05, "clip": 1.0, "noise": 0.0, "noise_schedule": "linear", "teacher": None,
        "teacher_weight": 1.0, "mixed_precision": None, "gradient_checkpointing": False, "seed": 0, "log_every": 10, "eval_every": 100,
        "eval_sequences": 64, "checkpoint_every": 100, "samples": 2, "sample_tokens": 60,
    },
}  # fmt: skip
ABOVE_ZERO = ("batch_size", "gradient_accumulation", "tokens", "log_every", "validate_every", "save_every", "valid_rows")
STAGE_BOUNDS: dict[str, tuple[Any, Any]] = dict.fromkeys(ABOVE_ZERO, (1, None)) | {
    "length": (2, None), "warmup": (0, 0.5), "final_rate": (0, 1), "window_drop": (0, 1), "seed": (0, 2**32 - 1),
}  # fmt: skip
BOUNDS: dict[Callable[..., Any], dict[str, tuple[Any, Any]]] = {
    convert.linearize.main: {},
    convert.select_layers.main: {
        "count": (1, None), "candidates": (1, None), "rows": (1, None), "length": (64, None), "needles": (1, None), "window": (1, None),
        "sinks": (0, None), "recall_weight": (0, None), "batch_tokens": (0, None), "seed": (0, None),
    },
    convert.evaluate.main: {
        "rows": (1, None), "sinks": (0, None), "needles": (1, None), "recall_length": (64, None), "limit": (1, None),
        "batch_tokens": (0, None), "seed": (0, None),
    },
    convert.transfer.main: STAGE_BOUNDS,
    convert.calibrate.main: STAGE_BOUNDS,
    convert.distill.main: STAGE_BOUNDS | {
        "kl_weight": (0, None), "text_weight": (0, None), "lora": (0, None), "long_length": (0, None), "long_share": (0, 1),
        "repeat": (0, 16),
    },
    recipes.tinystories.evaluate.main: {"stories": (1, None), "length": (2, None), "tokens": (1, None), "batch_size": (1, None)},
    recipes.lra.prepare.prepare: {"seed": (0, None)},
    recipes.quickstart.__main__.main: {"scale": (0.001, None)},
}  # fmt: skip
# How much of what a user gives is taken, and how much of it lies in memory at once: what is refused, and what a machine needs.
LIMITS: dict[str, dict[str, int]] = {
    "recipes.common.reading": {"MOST_BYTES": 2**26, "MOST_YAML_BYTES": 2**20, "MOST_YAML_VALUES": 100_000, "DEEPEST": 50},
    "recipes.common.documents": {"LONGEST_DOCUMENT": 2**18, "LONGEST_LINE": 2**26, "_ROWS": 100},
    "recipes.common.state": {"LONGEST_RECORD": 2**20, "LARGEST": 10**18},
    "recipes.common.checkpoint": {"MOST_LAYERS": 2048},
    "recipes.lra.data": {"LONGEST_LINE": 2**22},
    "recipes.lra.batches": {"BATCHES_SORTED_TOGETHER": 50},
    "recipes.lra.prepare": {"IMAGES_PER_FOLDER": 1000},
    "recipes.tinystories.evaluate": {"LONGEST": 2**24},
    "recipes.tinystories.evaluation": {"STEPS_TIMED": 24},
    "convert.options": {"MOST_LAYERS": 9999},
    "convert.costs": {"LARGEST_STATE": 2**30},
    "convert.evaluation.options": {"MOST": 2**24},
    "convert.evaluation.costs": {"STEPS": 24},
    "convert.evaluation.models": {"_LOOKED_AT": 2**20},
    "convert.evaluation.prompts": {"_FILLER_CHARACTERS": 2**20},
    "convert.evaluation.text": {"LONGEST": 2**16, "_CHARACTERS": 16},
    "convert.stages.divergence": {"NUMBERS_AT_ONCE": 2**26},
}


def every_function() -> Iterator[Callable[..., Any]]:
    """All functions and methods of convert and recipes."""
    for path in sorted(path for package in ("convert", "recipes") for path in (ROOT / package).rglob("*.py")):
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        for owner in (module, *(found for _, found in inspect.getmembers(module, inspect.isclass))):
            for _, function in inspect.getmembers(owner, inspect.isfunction):
                if function.__module__ == module.__name__:
                    yield function


def test_nothing_is_done_that_was_not_asked_for() -> None:
    met = set()
    for function in every_function():
        for name, parameter in inspect.signature(function).parameters.items():
            if name in EVERYWHERE and parameter.default is not parameter.empty:
                met.add(name)
                assert parameter.default == EVERYWHERE[name], f"{function.__module__}.{function.__qualname__}: {name}"
    assert met == set(EVERYWHERE)


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: f"{function.__module__}.{function.__qualname__}")
def test_the_defaults_of_a_command(function: Callable[..., Any]) -> None:
    found = {name: getattr(each.default, "value", each.default) for name, each in inspect.signature(function).parameters.items()}
    assert {name: found[name] for name in SIGNATURES[function]} == SIGNATURES[function]


@pytest.mark.parametrize("function", BOUNDS, ids=lambda function: f"{function.__module__}.{function.__qualname__}")
def test_the_bounds_of_a_command(function: Callable[..., Any]) -> None:
    annotations = function.__annotations__ if hasattr(function, "__signature__") else get_type_hints(function, include_extras=True)
    found = {name: (told.min, told.max) for name, hint in annotations.items() for told in getattr(hint, "__metadata__", ())}
    assert {name: bounds for name, bounds in found.items() if bounds != (None, None)} == BOUNDS[function]


@pytest.mark.parametrize("module", LIMITS)
def test_how_much_is_taken(module: str) -> None:
    found = vars(import_module(module))
    assert {name: found[name] for name in LIMITS[module]} == LIMITS[module]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: f"{settings.__module__}.{settings.__qualname__}")
def test_the_defaults_of_a_config_file(settings: Any) -> None:
    found = {each.name: each.default_factory() if callable(each.default_factory) else each.default for each in fields(settings)}
    assert {name: found[name] for name in SETTINGS[settings]} == SETTINGS[settings]


def test_the_tasks_of_the_arena_are_the_published_ones() -> None:
    """Symbols, tokens at most, classes, examples to train, validate and test on, pixels of a side, sequences (Tay et al. 2020)."""
    found = {name: (task.vocabulary, task.length, task.classes, task.sizes, task.side, task.towers) for name, task in TASKS.items()}
    pictures = (160_000, 20_000, 20_000)
    assert found == {
        "listops": (15, 2000, 10, (96_000, 2_000, 2_000), 0, 1),
        "text": (256, 4000, 2, (22_500, 2_500, 25_000), 0, 1),
        "retrieval": (256, 4000, 2, (147_086, 18_090, 17_437), 0, 2),
        "image": (256, 1024, 10, (45_000, 5_000, 10_000), 32, 1),
        "pathfinder": (256, 1024, 2, pictures, 32, 1),
        "pathfinder64": (256, 4096, 2, pictures, 64, 1),
        "pathx": (256, 16384, 2, pictures, 128, 1),
    }
