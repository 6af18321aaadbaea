"""A GGUF file is unpacked into a checkpoint first: its weights dequantised, its tokenizer and settings beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from convert.errors import ConversionError, stage
from recipes.common.reading import not_outside, user_path


@contextmanager
def unpacked(source: str, dtype: str | None = None) -> Iterator[str]:
    """Gives ``source`` back, or for a GGUF file, or a folder of one, a temporary folder with its checkpoint.

    Args:
        source: what the user named.
        dtype: of the dequantised weights; None for bfloat16.

    Raises:
        ConversionError: the package gguf is missing, the folder holds several such files, or the file cannot be read.
    """
    file = _gguf_file(user_path(source))
    if file is None:
        yield source
        return
    if find_spec("gguf") is None:
        raise ConversionError(f"{source} is GGUF, which takes the package gguf to read: `pip install gguf`, then run the command again")
    with tempfile.TemporaryDirectory(prefix="linattn-gguf-") as room:
        alone, folder = Path(room) / "packed" / file.name, Path(room) / "unpacked" / file.stem
        alone.parent.mkdir()
        # Beside the file may lie what Transformers would read too, such as the configuration of an adapter.
        alone.symlink_to(file.resolve())
        with stage(f"reading {file}", "give a GGUF file of a causal language model that Transformers can read"):
            _unpack(alone, folder, getattr(torch, dtype or "bfloat16"))
        yield str(folder)


def _gguf_file(path: Path) -> Path | None:
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ConversionError(f"{path} holds {len(files)} GGUF files: give one of them, such as {files[0]}")
    return not_outside(path, files[0]) if files else None


def _unpack(file: Path, folder: Path, dtype: torch.dtype) -> None:
    # Without being told, newer versions of Transformers keep the weights packed, and such a model cannot be saved.
    config_class: Any = getattr(transformers, "GgufConfig", None)
    whole = {"quantization_config": config_class(gguf_file=file.name, dequantize=True)} if config_class else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, trust_remote_code=False, **whole
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False).save_pretrained(folder)
