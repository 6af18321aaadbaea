"""`make wheel`: tries what a wheel installed, outside of the checkout: the command, and the packages below hf_linattn."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from hf_linattn.convert.linearize import linearize
from hf_linattn.recipes.common.errors import RecipeError
from tiny_softmax import softmax_model
from transformers import AutoModelForCausalLM

import hf_linattn


def main() -> None:
    """Raises whatever fails."""
    assert Path(hf_linattn.__file__).is_relative_to(sys.prefix), f"{hf_linattn.__file__} is not what was installed"
    with tempfile.TemporaryDirectory() as place:
        softmax_model("llama").save_pretrained(f"{place}/source")
        for arguments in (["--help"], ["env"], ["convert", "source", "converted"]):
            subprocess.run([f"{sys.prefix}/bin/linattn", *arguments], cwd=place, check=True)
        model = AutoModelForCausalLM.from_pretrained(f"{place}/converted")
        assert model.config.model_type == "linattn_llama"
        try:
            linearize(f"{place}/source", f"{place}/converted")
        except RecipeError as error:
            print(f"as it should: {error}")
        else:
            raise AssertionError("a folder that exists was written over")


if __name__ == "__main__":
    main()
