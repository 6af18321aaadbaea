"""What generating costs is told before it is converted, is what a cache then takes, and is bounded; decays start within windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_softmax import softmax_model
from transformers import AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

import hf_linattn
from convert.costs import LARGEST_STATE, Keys, _break_even, _duration, generating_costs
from convert.linearize import LinearizeOptions, app, linearize
from hf_linattn.config import sliding_windows
from hf_linattn.models import config_class_for
from recipes.common.errors import RecipeError

LENGTH = 40
FORMS = [("linear", "none"), ("linear", "head"), ("quadratic", "none"), ("quadratic", "head")]


def bytes_after(model: Any, length: int) -> int:
    tokens = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers = model(tokens, use_cache=True, past_key_values=DynamicCache(config=model.config)).past_key_values.layers
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values", "state")]
    return sum({id(tensor): tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor)}.values())


@pytest.mark.parametrize(("kernel", "decay"), FORMS)
@pytest.mark.parametrize(("model_type", "keep"), [("llama", ()), ("llama", (1,)), ("gemma3_text", ()), ("mistral", (0,))])
def test_what_is_told_is_what_a_cache_takes(kernel: str, decay: str, model_type: str, keep: tuple[int, ...], tmp_path: Path) -> None:
    source = softmax_model(model_type)
    source.save_pretrained(tmp_path / "in")
    told = []
    options = LinearizeOptions(kernel=kernel, decay=decay, keep_softmax=keep, check=False)
    report = linearize(tmp_path / "in", tmp_path / "out", options, on_costs=told.append)
    (costs,) = told
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    windows = [min(LENGTH, (window or LENGTH + 1) - 1) for window in sliding_windows(model.config)]
    kept = sum(tokens * costs.kept // max(len(keep), 1) for layer, tokens in enumerate(windows) if layer in keep)
    assert bytes_after(model, LENGTH) == costs.state + kept
    assert report["costs"]["state"] == costs.state == costs.forms[kernel + (" with decay" if decay == "head" else "")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert costs.traffic == 2 * costs.state == report["costs"]["traffic"] and report["costs"]["seconds"] == costs.traffic / 20e9
    assert f"{costs.state:,} bytes of state a sequence" in card and f"once, {costs.traffic:,} bytes, which takes" in card
    assert ("growing key-value cache" in card) == bool(keep)
    if costs.break_even is not None:
        linear = [layer for layer in range(3) if layer not in keep]
        assert source_bytes(source, costs.break_even, linear) >= costs.state > source_bytes(source, costs.break_even - 1, linear)
    else:
        assert source_bytes(source, 2000, [layer for layer in range(3) if layer not in keep]) < costs.state


RING, MORE = 2 * 7 * (8 + 8), 2 * 5  # numbers of 5 + 2 tokens' keys and values in 2 key heads of 8, and of 5 tokens' rates
STUDENTS: list[tuple[dict[str, Any], int]] = [  # and the bytes of a layer's state, each float32 but for the count of tokens
    ({"decay": "token"}, 2 * 9 * 9 * 4),
    ({"decay": "head", "input_gate": "token", "output_map": "norm_gate"}, 4 * 9 * 10 * 4),
    ({"kernel": "quadratic", "features": 4, "decay": "key_head"}, 2 * 15 * 9 * 4),
    ({"feature_map": "hedgehog", "decay": "key_head"}, 2 * 17 * 9 * 4),
    ({"form": "window", "window": 5, "sinks": 2, "beside": "none"}, 8 + RING * 4),
    ({"form": "window", "window": 5, "sinks": 2, "kernel": "quadratic", "decay": "key_head"}, 8 + (RING + 2 * 45 * 9) * 4),
    ({"form": "window", "window": 5, "sinks": 2, "decay": "token", "input_gate": "token"}, 8 + (RING + 2 * MORE + 2 * 9 * 10) * 4),
]


@pytest.mark.parametrize(("student", "state"), STUDENTS, ids=str)
def test_the_state_of_every_student_worked_out_by_hand(student: dict[str, Any], state: int) -> None:
    options = {"learnable": True, "softmax_layers": [1], **student}
    config = config_class_for("llama")(**softmax_model("llama").config.to_diff_dict(), linattn=options, dtype="float32")
    costs, model = generating_costs(config), AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.randint(3, 90, (1, LENGTH)), past_key_values=DynamicCache(config=config)).past_key_values
    assert costs.state == 2 * state and costs.kept == 2 * (8 + 8) * 4
    assert hf_linattn.cache_bytes(cache) == 2 * state + LENGTH * costs.kept
    assert costs.break_even == -(-state // (2 * (8 + 8) * 4))


@pytest.mark.parametrize(
    ("state", "windows", "length"),
    [
        *((119, [None], 12), (120, [None], 12), (121, [None], 13), (120, [None, None], 6)),
        *((120, [5, None], 8), (80, [5, 5], 4), (81, [5, 5], None)),
    ],
)
def test_break_even_is_the_least_length_that_holds_as_much(state: int, windows: list[int | None], length: int | None) -> None:
    """At 10 bytes a token and layer; a window keeps one token less than it sees."""
    assert _break_even(state, [Keys(10, window) for window in windows]) == length


def test_durations_in_words() -> None:
    assert [_duration(seconds) for seconds in (2.54, 0.1, 0.0994, 1.9e-6)] == ["2.5 s", "0.1 s", "99 ms", "0.0019 ms"]


def test_no_decay_starts_slower_than_2048_tokens(tmp_path: Path) -> None:
    """Whatever the model's positions; the check, which knows the bound by itself, agrees."""
    softmax_model("llama", max_position_embeddings=8192).save_pretrained(tmp_path / "in")
    linearize(tmp_path / "in", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (-1 / model.model.layers[0].self_attn.linattn()["log_decay"]).max().item() == pytest.approx(2048, rel=1e-5)


def test_a_float64_model_has_states_of_twice_the_size(tmp_path: Path) -> None:
    softmax_model("llama").double().save_pretrained(tmp_path / "in")
    report = linearize(tmp_path / "in", tmp_path / "out", LinearizeOptions(check=False))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert bytes_after(model, LENGTH) == report["costs"]["state"] == 2 * 3 * 4 * 9 * 9 * 4


def source_bytes(source: Any, length: int, layers: list[int]) -> int:
    """Bytes of keys and values that Transformers' own cache holds in `layers` after `length` tokens, without running the model."""
    cache = DynamicCache(config=source.config)
    heads, size = source.config.num_key_value_heads, getattr(source.config, "head_dim", 8)
    for layer in range(3):
        cache.update(torch.empty(1, heads, length, size), torch.empty(1, heads, length, size), layer)
    return sum(cache.layers[layer].keys.nbytes + cache.layers[layer].values.nbytes for layer in layers)


# Sizes of real models: state bytes worked out by hand as layers * heads * (1 + D + D (D + 1) / 2) * (D + 1) * 4.
LARGE = {
    "gemma-3-270m": (
        "gemma3_text",
        {"num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
        2_453_852_448,
    ),  # fmt: skip
    "llama-2-7b": (
        "llama",
        {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128},
        4_430_499_840,
    ),
    "pythia-1.4b": ("gpt_neox", {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 2048}, 1_661_437_440),
    "tinyllama-1.1b": (
        "llama",
        {"num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64},
        392_620_800,
    ),
}


# What reading and writing those bytes takes at 20 GB/s, worked out by hand.
TIMES = {"gemma-3-270m": "takes 0.25 s", "llama-2-7b": "takes 0.44 s", "pythia-1.4b": "0.17 s", "tinyllama-1.1b": "takes 39 ms"}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_state_has_to_be_asked_for(name: str) -> None:
    model_type, sizes, expected = LARGE[name]
    config: Any = config_class_for(model_type)(**sizes)
    config.dtype = "bfloat16"
    config.linattn = hf_linattn.LinAttnConfig(kernel="quadratic", decay="head").to_dict()
    if expected > LARGEST_STATE:
        with pytest.raises(RecipeError, match=r"\d s in plain PyTorch .*--large-state"):
            generating_costs(config)
    costs = generating_costs(config, large_state=True)
    assert costs.state == expected and TIMES[name] in costs.sentence()
    assert "at 20 GB/s (one core of a CPU; plain PyTorch there takes 4 to 10 times as long)" in costs.sentence()
    assert LARGEST_STATE == 2**30
    if model_type != "gemma3_text":  # whose windows bound its cache
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * (getattr(config, "head_dim", None) or 128) * 2
        assert costs.source == {str(length): token * length for length in (1024, 8192, 65536)}
    config.linattn = hf_linattn.LinAttnConfig(decay="head").to_dict()
    assert generating_costs(config).state < expected / 15


def test_the_command_says_it_before_and_refuses_what_was_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    softmax_model("llama").save_pretrained(tmp_path / "in")
    monkeypatch.setattr("convert.costs.LARGEST_STATE", 10_000)
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--kernel", "quadratic", "--no-check"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2 and "--large-state" in refused.stderr and not (tmp_path / "out").exists()
    monkeypatch.setattr("convert.costs.LARGEST_STATE", 19_439)
    assert CliRunner().invoke(app, arguments).exit_code == 2
    monkeypatch.setattr("convert.costs.LARGEST_STATE", 19_440)
    assert CliRunner().invoke(app, [*arguments[:1], str(tmp_path / "at the bound"), *arguments[2:]]).exit_code == 0
    monkeypatch.setattr("convert.costs.LARGEST_STATE", 10_000)
    done = CliRunner().invoke(app, [*arguments, "--large-state"], env={"COLUMNS": "30"})  # what may be copied stays on a line
    assert done.exit_code == 0
    assert done.stdout.startswith("Generating will take 19,440 bytes of state a sequence, as much as the source's cache after 51 tokens")
    assert "each new token reads and writes them once, 38,880 bytes, which takes 0.0019 ms at 20 GB/s" in done.stdout
    sizes = {"linear": "1,944", "linear with decay": "3,888", "linear with decay per key head": "1,944", "quadratic": "9,720"}
    for name, size in {**sizes, "quadratic with decay": "19,440"}.items():
        assert f"\n  {size:>13}  {name}\n" in done.stdout


WINDOWED = {
    "mistral": ({}, [8, 8, 8]),
    "gemma2": ({"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, [8, 128, 8]),
    "gemma3_text": ({"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}, [8, 8, 128]),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, [128, 16, 16]),
    "llama": ({}, [128, 128, 128]),
}


@pytest.mark.parametrize("model_type", WINDOWED)
def test_a_decay_starts_within_the_window_that_its_layer_had(model_type: str, tmp_path: Path) -> None:
    changes, expected = WINDOWED[model_type]
    softmax_model(model_type, **changes).save_pretrained(tmp_path / "in")
    linearize(tmp_path / "in", tmp_path / "out", LinearizeOptions(check=False))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    times = {layer: -1 / model.model.layers[layer].self_attn.linattn()["log_decay"].detach() for layer in range(3)}
    assert [round(times[layer].max().item()) for layer in range(3)] == expected
    assert all(abs(times[layer].min().item() - 1.5) < 1e-5 for layer in range(3))
    stored = json.loads((tmp_path / "out" / "conversion.json").read_text())["starting_values"]["log_decay"]
    rates = stored if isinstance(stored, dict) else dict.fromkeys("012", stored)
    assert [round(-1 / rates[str(layer)][-1]) for layer in range(3)] == expected
    assert isinstance(stored, dict) == (len(set(expected)) > 1)


transformers.utils.logging.disable_progress_bar()
