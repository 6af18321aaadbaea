"""Architectures that the converter takes: converted, checked, loaded by the Auto class and run; none is imported before it is used.

One of each kind, and the others as slow tests.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep.tiny import tiny_config
from tiny_softmax import MODEL_TYPES
from transformers import AutoModelForCausalLM, DynamicCache

import hf_linattn
from convert.linearize import LinearizeOptions, linearize
from hf_linattn.models import BASE_MODEL_TYPES
from recipes.common.errors import RecipeError

KINDS = (
    *("apertus", "gpt2", "gpt_bigcode", "opt", "phi3", "persimmon", "cohere2", "modernbert-decoder"),  # names and shapes of weights
    *("qwen2_moe", "jetmoe", "afmoe", "longcat_flash", "gpt_oss"),  # experts, sinks
    *("deepseek_v3", "diffllama"),  # latent attention, two readers of one cache
    *("lfm2", "granitemoehybrid", "zamba2", "kimi_linear", "qwen3_5_text", "olmo_hybrid"),  # layers of other kinds between or beside
    *("aria_text", "phi4_multimodal"),  # parts of models that see and hear
)
TRIED = [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in BASE_MODEL_TYPES if name not in MODEL_TYPES]


@pytest.mark.parametrize("model_type", TRIED)
def test_converted_checked_loaded_and_run(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config(model_type)
    config.eos_token_id = 2  # lists of them stay what they are, outside of the small vocabulary
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    report = linearize(tmp_path / "source", tmp_path / "out", LinearizeOptions(kernel="quadratic"))
    assert report["check"]["layers"] >= 1 and report["check"]["bar"] < 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "linattn_" + model_type
    assert report["costs"]["state"] == held(model)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 6)


def held(model: Any) -> int:
    """Bytes of the states of its linear layers."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    return sum(layer.nbytes() for layer in cache.layers if isinstance(layer, hf_linattn.LinearStateLayer))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "jetmoe", "mimo_v2_flash"])
def test_matrices_of_a_head_and_numbers_of_a_key_head_that_a_config_does_not_count(model_type: str, tmp_path: Path) -> None:
    """Keys of two parts; keys that each expert reads; layers with a window that have more of them."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(model_type)).save_pretrained(tmp_path / "source")
    options = LinearizeOptions(kernel="quadratic", features=4, decay="key_head", input_gate="token")
    report = linearize(tmp_path / "source", tmp_path / "out", options)
    assert report["costs"]["state"] == held(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_hidden_states_are_there_for_each_of_two_readers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("diffllama")).save_pretrained(tmp_path / "source")
    options = LinearizeOptions(form="window", window=4, decay="token", input_gate="token", output_map="gate")
    report = linearize(tmp_path / "source", tmp_path / "out", options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report["check"]["bar"] < 0.5 and report["costs"]["state"] == held(model)
    assert not any(module.entered for module in model.modules() if isinstance(module, hf_linattn.LinAttnParams))


def test_sinks_that_linear_layers_drop_are_said(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_config("gpt_oss")).save_pretrained(tmp_path / "source")
    report = linearize(tmp_path / "source", tmp_path / "out", LinearizeOptions(keep_softmax=(1,), check=False))
    assert {one["what"]: one["layers"] for one in report["dropped"]} == {"sliding_window": [0, 2], "attention sinks": [0, 2, 3]}
    assert "- `attention sinks` (learned) is dropped from layers 0, 2-3: " in (tmp_path / "out" / "README.md").read_text()


def test_layers_without_attention_are_none_that_become_linear_or_stay_softmax(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_config("qwen3_next")).save_pretrained(tmp_path / "source")
    for kept, told in (((0,), "names layer 0 of .*, which has no attention; those with it are 1, 3"), ((1, 3), "names every layer")):
        with pytest.raises(RecipeError, match=told):
            linearize(tmp_path / "source", tmp_path / "out", LinearizeOptions(keep_softmax=kept))
    report = linearize(tmp_path / "source", tmp_path / "out", LinearizeOptions(keep_softmax=(1,), check=False))
    assert report["linear_layers"] == [3] and "1 of 2 layers with attention are linear" in (tmp_path / "out" / "README.md").read_text()
    config = tiny_config("qwen3_next")
    config.linattn = {"softmax_layers": [0]}
    with pytest.raises(ValueError, match="names layer 0, which has no attention to keep; those that have are 1, 3"):
        AutoModelForCausalLM.from_config(config, attn_implementation="linattn")


def test_an_attention_that_serves_several_layers_keeps_none_of_them_softmax(tmp_path: Path) -> None:
    """As of a model that is not converted, which ran without what was asked for where it had no cache."""
    AutoModelForCausalLM.from_config(tiny_config("zamba2")).save_pretrained(tmp_path / "source")
    with pytest.raises(RecipeError, match="Zamba2Attention does not know its layer's index"):
        linearize(tmp_path / "source", tmp_path / "out", LinearizeOptions(keep_softmax=(1,)))
    config = tiny_config("zamba2")
    config.linattn = {"softmax_layers": [1]}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="linattn").eval()
    with pytest.raises(ValueError, match="does not know its layer's index"):
        model(torch.tensor([[5, 6, 7]]), use_cache=False)


def test_no_architecture_is_imported_with_the_package() -> None:
    script = "import sys, hf_linattn; print([name for name in sys.modules if 'modeling_llama' in name or 'modeling_gemma' in name])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
