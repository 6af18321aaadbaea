"""The checkout's folder `kernels/` is not mistaken for Hugging Face's package of that name, be that installed or not."""

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
PROGRAM = """
import importlib.util, sys
import hf_linattn, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import is_kernels_available
config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = AutoModelForCausalLM.from_config(config, attn_implementation="linattn")
assert model(torch.arange(5)[None]).logits.isfinite().all()
model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
assert model(torch.arange(5)[None]).logits.isfinite().all()
assert not is_kernels_available(), "a folder was taken for the package"
print("ran", importlib.util.find_spec("kernels").origin)
"""
OTHER = '''"""Stands in for a package called kernels of a version that Transformers does not know."""\n__version__ = "0.0.1"\n'''


def run(*path):
    before = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *before])}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_folder_has_no_python():
    assert not list((CHECKOUT / "kernels").rglob("*.py"))


def test_without_the_package():
    done = run(CHECKOUT)
    assert done.returncode == 0 and "ran" in done.stdout, done.stderr


def test_with_a_package_of_that_name(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(OTHER)
    done = run(tmp_path, CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert str(package) in done.stdout
