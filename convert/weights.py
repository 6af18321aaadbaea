"""Weight files: the source's copied one at a time, and one small file more for the new parameters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from convert.source import INDEX, Source
from hf_linattn.forms import LinAttnParams
from recipes.common.checkpoint import check_fits, without_memory


def new_parameters(source: Source, model_class: Any, config: Any) -> dict[str, LinAttnParams]:
    """The parameters that conversion adds to a model of ``model_class``, by the name of their module, at their starting values.

    The model itself is built on the meta device and takes no memory.

    Raises:
        RecipeError: no model can be made of ``config``, or one of more numbers than the source's weight files hold.
    """

    def build() -> Any:
        config.validate()
        return model_class(config)

    model = without_memory(build, source.folder / "config.json")
    check_fits(source, model)
    added = {}
    for name, module in model.named_modules():
        if isinstance(module, LinAttnParams):
            started = module.to_empty(device="cpu")
            started.reset_parameters()
            added[name] = started
    return added


def stored_tensors(parameters: dict[str, LinAttnParams]) -> dict[str, Tensor]:
    """What is written of new parameters, by name: also what was learned since the start, which is 0, for who reads a layer off the disk."""
    return {f"{path}.{name}": value for path, module in parameters.items() for name, value in module.state_dict().items()}


def write_weights(
    source: Source, added: dict[str, Tensor], folder: Path, dtype: torch.dtype | None, on_shard: Callable[[Path], None] = lambda shard: None
) -> None:
    """Writes the source's shards and ``added`` as shards of ``folder``, with their index. At most one shard is in memory.

    Args:
        source: where the shards come from; their tensors keep their names.
        added: the new parameters; none of them means no file more.
        folder: an existing folder.
        dtype: what floating-point tensors of the source become; None copies the files byte for byte.
        on_shard: called with each file once it is written.
    """
    count = len(source.shards) + bool(added)
    files = [folder / f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    weight_map: dict[str, str] = {}
    total = 0
    for shard, keys, file in zip(source.shards, source.keys, files, strict=False):
        if dtype is None:
            shutil.copyfile(shard, file)
        else:
            save_file(_cast(shard, dtype), file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, file.name)
        total += _tensor_bytes(file)
        on_shard(file)
    if added:
        save_file(added, files[-1], metadata={"format": "pt"})
        weight_map |= dict.fromkeys(added, files[-1].name)
        total += _tensor_bytes(files[-1])
        on_shard(files[-1])
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def floating_dtype(source: Source) -> torch.dtype:
    """The dtype of the first floating-point tensor, float32 where there is none."""
    for shard, keys in zip(source.shards, source.keys, strict=True):
        with safe_open(shard, framework="pt") as tensors:
            for key in keys:
                tensor = tensors.get_slice(key)[:0] if tensors.get_slice(key).get_shape() else tensors.get_tensor(key)
                if tensor.is_floating_point():
                    return tensor.dtype
    return torch.float32


def _cast(shard: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    with safe_open(shard, framework="pt") as tensors:
        read = ((key, tensors.get_tensor(key)) for key in tensors.keys())  # noqa: SIM118 (safe_open is no dict)
        return {key: tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor for key, tensor in read}


def _tensor_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return file.stat().st_size - 8 - header
