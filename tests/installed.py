"""`make wheel`: tries what a wheel installed, without nvcc and outside of the checkout: the command, the packages below hf_linattn, a
converted model that generates, and the compiled library where the wheel's name says that it has one.

    python tests/installed.py dist/*.whl
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from hf_linattn.convert.linearize import linearize
from hf_linattn.recipes.common.errors import RecipeError
from tiny_softmax import softmax_model
from transformers import AutoModelForCausalLM

import hf_linattn
from hf_linattn.ops import cuda


def main(wheel: str) -> None:
    """Raises whatever fails."""
    assert shutil.which("nvcc") is None
    compiled = not wheel.endswith("-any.whl")
    assert cuda.LIBRARY.exists() == compiled and bool(cuda.architectures()) == compiled, "the wheel's name and its library disagree"
    assert Path(hf_linattn.__file__).is_relative_to(sys.prefix), f"{hf_linattn.__file__} is not what was installed"
    with tempfile.TemporaryDirectory() as place:
        softmax_model("llama").save_pretrained(f"{place}/source")
        for arguments in (["--help"], ["env"], ["convert", "source", "converted"]):
            subprocess.run([f"{sys.prefix}/bin/linattn", *arguments], cwd=place, check=True)
        model = AutoModelForCausalLM.from_pretrained(f"{place}/converted")
        assert model.config.model_type == "linattn_llama"
        told = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=8, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
        assert told.sequences.shape == (1, 11) and hf_linattn.cache_bytes(told.past_key_values) > 0
        try:
            linearize(f"{place}/source", f"{place}/converted")
        except RecipeError as error:
            print(f"as it should: {error}")
        else:
            raise AssertionError("a folder that exists was written over")


if __name__ == "__main__":
    main(sys.argv[1])
