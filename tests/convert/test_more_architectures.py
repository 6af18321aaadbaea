"""Architectures that the converter takes: converted, checked, loaded by the Auto class and run; none is imported before it is used.

One of each kind, and the others as slow tests.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sweep.tiny import tiny_config
from tiny_softmax import MODEL_TYPES
from transformers import AutoModelForCausalLM

from convert.linearize import LinearizeOptions, linearize
from hf_linattn.models import BASE_MODEL_TYPES

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
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 6)


def test_no_architecture_is_imported_with_the_package() -> None:
    script = "import sys, hf_linattn; print([name for name in sys.modules if 'modeling_llama' in name or 'modeling_gemma' in name])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
