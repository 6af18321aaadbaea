"""A checkpoint's folder, doubted before any library reads it: names in it are no paths, no code is named that is not in it, and its
configuration asks for no more than its weight files hold.

`open_checkpoint` is the one door: conversion, training and evaluation go through it. Everything here raises RecipeError.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from recipes.common.errors import RecipeError, sentence
from recipes.common.reading import inside, not_outside, read_json, refuse_missing_folder, user_path

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPANIONS = (
    *("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.vocab"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""What stands beside the weights and is read, or copied into a converted checkpoint."""
MOST_LAYERS = 2048
"""Where no weights say how many there are."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LAYERS = re.compile(r"(num_.*|n_)layers?|n_layer")
_SIZES = re.compile(r"(num|n)_.*|.*_(size|dim)|d_(model|ff|kv)")
_RANGES = (
    (re.compile(r".*dropout(_prob)?|.*_pdrop"), lambda value: 0 <= value < 1, "at least 0 and less than 1"),
    (re.compile(r"max_position_embeddings|n_positions"), lambda value: value >= 1, "1 or more"),
)
# Tokenizer configurations of real checkpoints name the machine that wrote them here, and nothing opens it.
_HARMLESS = ("special_tokens_map_file", "name_or_path")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder that may be read.

    Attributes:
        name: what the user called it, a folder or a hub id.
        folder: where it lies.
        hub_id: its id on the hub, None for a local folder.
        config: config.json as it stands.
        shards: the weight files, in order.
        shapes: the tensors of each of the shards, by name.
    """

    name: str
    folder: Path
    hub_id: str | None
    config: dict[str, Any]
    shards: tuple[Path, ...]
    shapes: tuple[dict[str, tuple[int, ...]], ...]

    @property
    def keys(self) -> tuple[tuple[str, ...], ...]:
        """The names of the tensors in each of the shards."""
        return tuple(tuple(shapes) for shapes in self.shapes)

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.stat().st_size for shard in self.shards)

    @property
    def numbers(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shapes in self.shapes for shape in shapes.values())


def open_checkpoint(
    name: str, revision: str | None = None, suits: Callable[[dict[str, Any], str], None] = lambda config, name: None
) -> Checkpoint:
    """Finds the checkpoint `name` (a folder, or a hub id that is downloaded), reads its configuration and the headers of its weights.

    Args:
        revision: branch, tag or commit of a hub id.
        suits: raises what it likes where the configuration is none that the caller can use; called before weights are looked for.

    Raises:
        RecipeError: there is none; a name or link in it leads out of it; it names code to run; it asks for more than its weights hold.
    """
    folder, hub_id = locate(name, revision)
    config = read_config(folder, name)
    suits(config, name)
    check_names(folder)
    shards = _find_shards(folder, name)
    checkpoint = Checkpoint(name, folder, hub_id, config, shards, tuple(map(_read_shapes, shards)))
    _check_sizes(checkpoint)
    _check_ranges(checkpoint)
    return checkpoint


def locate(name: str, revision: str | None = None, weights: bool = True) -> tuple[Path, str | None]:
    """The folder of `name`, and its id if that is one of the hub, from which it is then downloaded."""
    folder = user_path(name)
    if folder.is_dir():
        return folder, None
    if folder.exists():
        raise RecipeError(f"{name} is a file; give the folder that holds config.json and the weights, or a hub id")
    refuse_missing_folder(name)
    wanted = [*COMPANIONS, "*.py", "README.md", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted)), name
    except Exception as error:  # of the hub's client, the network and the disk
        raise RecipeError(
            f"there is no folder {name}, and it could not be had from the Hugging Face Hub ({sentence(error)}); check the name, "
            "the connection and, for a gated model, `hf auth login`"
        ) from error


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """config.json of a folder."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise RecipeError(
                f"{name} holds a PEFT adapter and no model: merge it into its base model first, with "
                f"`model = peft.AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload()` and "
                "`model.save_pretrained('merged')`, and give that folder"
            )
        if (folder / "model" / "config.json").is_file():
            raise RecipeError(f"{name} is the folder of a run, whose model lies below it; give {Path(name) / 'model'}")
        raise RecipeError(f"{name} is no checkpoint: it has no config.json")
    config = _with_floats(read_json(not_outside(folder, path)))
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise RecipeError(f"{path} names no model_type, so the architecture is unknown")
    # An attention named OWNER/NAME is code of that repository, which Transformers would fetch and run.
    for key, named in ((key, value) for item in _objects(config) for key, value in item.items() if "_implementation" in key):
        for _, value in _strings(named):
            if "/" in value or "|" in value:
                raise RecipeError(f"{path}: {key} {value!r:.100} names code to be fetched and run, which is refused; take that key out")
    return config


def _with_floats(value: Any) -> Any:
    """The same with the floats that JSON has not, which Transformers writes as {"__float__": "Infinity"}, as Mamba's time_step_limit."""
    if isinstance(value, list):
        return [_with_floats(part) for part in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {key: _with_floats(part) for key, part in value.items()}


def open_tokenizer(name: str) -> Path:
    """The folder of a tokenizer, a checkpoint or a hub id that may be read. Transformers reads the model's configuration too."""
    folder, _ = locate(name, weights=False)
    check_names(folder)
    config = read_config(folder, name) if (folder / "config.json").is_file() else {}
    for key, value in _numbers(config):
        if _LAYERS.fullmatch(key) and value > MOST_LAYERS:
            raise RecipeError(f"{folder / 'config.json'}: {key} is {value:,}, and {MOST_LAYERS:,} are the most")
    return folder


def check_names(folder: Path) -> None:
    """Doubts what stands beside the weights: links, and the names that JSON files of a tokenizer hold.

    Raises:
        RecipeError: a link leads out of the folder; a file or a module of code is named that is not in it; a chat template has a path
            for a name; a base model is named in an adapter.
    """
    for path in companions(folder):
        if path.name == "adapter_config.json":
            raise RecipeError(f"{folder} holds a PEFT adapter beside its model: merge it into the model and save that first")
        if path.name.endswith("_config.json") and path.name != "generation_config.json":
            _check_tokenizer_config(folder, path)
    templates = folder / "additional_chat_templates"
    for path in sorted(templates.glob("*.jinja")) if templates.is_dir() else ():
        not_outside(folder, path)


def companions(folder: Path) -> list[Path]:
    """The files beside the weights that COMPANIONS names, none of them a link out of the folder."""
    found = sorted({path for pattern in COMPANIONS for path in folder.glob(pattern)})
    return [not_outside(folder, path) for path in found if path.is_file() or path.is_symlink()]


def _check_tokenizer_config(folder: Path, path: Path) -> None:
    config = read_json(path)
    if not isinstance(config, dict):
        raise RecipeError(f"{path} holds no JSON object; copy or download it again")
    for key, value in _strings(config.get("auto_map")):
        module = value.rpartition(".")[0]
        if "--" in value or not module.isidentifier():
            raise RecipeError(f"{path}: {key} {value!r:.100} names code outside this folder, which is refused; take it out of auto_map")
    for key, value in config.items():
        if key not in _HARMLESS and isinstance(value, str) and _is_file(folder / value):
            inside(folder, value, path)
    names = [item.get("name") for item in _objects(config.get("chat_template")) if "name" in item]
    names += list(config["chat_template"]) if isinstance(config.get("chat_template"), dict) else []
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w .-]+", name) or name.startswith("."):
            raise RecipeError(f"{path}: the chat template's name {name!r:.100} is no plain word, and a file is called that; rename it")


def _find_shards(folder: Path, name: str) -> tuple[Path, ...]:
    if (folder / WEIGHTS).is_file():
        return (not_outside(folder, folder / WEIGHTS),)
    if not (folder / INDEX).is_file():
        if any(any(folder.glob(pattern)) for pattern in _PICKLED):
            raise RecipeError(
                f"{name} holds pickled weights, which can run code when read: save it as safetensors first, for example with "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) where you trust the file"
            )
        raise RecipeError(f"{name} is no checkpoint: it has neither {WEIGHTS} nor {INDEX}")
    index = read_json(not_outside(folder, folder / INDEX))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise RecipeError(f"{folder / INDEX} is not a readable index of weights: copy or download the checkpoint again")
    shards = {file: inside(folder, file, folder / INDEX) for file in sorted(set(weight_map.values()))}
    missing = [file for file, path in shards.items() if not path.is_file()]
    if missing or not shards:
        which = f"{len(missing)} of its {len(shards)} weight files ({', '.join(missing)[:200]})"
        raise RecipeError(f"{name} lacks {which}: copy or download them again")
    present = Counter(key for path in shards.values() for key in _read_shapes(path))
    if twice := sorted(key for key, times in present.items() if times > 1):
        raise RecipeError(f"two weight files of {name} hold {twice[0]:.200}, and which is meant is not said: copy or download them again")
    if absent := sorted(set(weight_map) - set(present)):
        which = f"{len(absent)} tensors that {INDEX} lists, such as {absent[0]:.200}"
        raise RecipeError(f"the weight files of {name} lack {which}: copy or download them again")
    return tuple(shards.values())


def _read_shapes(shard: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(shard, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{shard} is truncated or no safetensors file ({sentence(error)}): copy or download it again") from error


def _check_sizes(checkpoint: Checkpoint) -> None:
    """A layer has a tensor, and a size is the side of one: what asks for more would be built for hours before anything is compared."""
    tensors = sum(map(len, checkpoint.shapes))
    for key, value in _numbers(checkpoint.config):
        most, what = (tensors, "tensors") if _LAYERS.fullmatch(key) else (checkpoint.numbers, "numbers")
        if _SIZES.fullmatch(key) and value > most:
            where = checkpoint.folder / "config.json"
            raise RecipeError(f"{where}: {key} is {value:,}, and the weight files hold {most:,} {what}; they do not belong together")


def _check_ranges(checkpoint: Checkpoint) -> None:
    """What a model can be built with and nothing be computed from."""
    for key, value in _numbers(checkpoint.config):
        for keys, fits, expected in _RANGES:
            if keys.fullmatch(key) and not fits(value):
                raise RecipeError(f"{checkpoint.folder / 'config.json'}: {key} is {value}; expected {expected}")


def without_memory(build: Callable[[], torch.nn.Module], where: str | Path) -> torch.nn.Module:
    """What `build` makes, on the meta device.

    Raises:
        RecipeError: `build` raised anything; `where` names the configuration.
    """
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # strict configs, overflowing sizes and missing keys come in many types
        told = " ".join(str(error).split())[:300].rstrip(".")
        if told.startswith("linattn option"):  # it names what is wrong, and that is not the file
            raise RecipeError(f"{told} (the model: {where})") from error
        raise RecipeError(f"{where}: no model can be made of it ({told})") from error


def check_fits(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Refuses a `model` (on the meta device) of more numbers than the weight files hold; packed, quantised ones are let be.

    Raises:
        RecipeError: it has more.
    """
    asked = _numbers_of(model)
    if asked > checkpoint.numbers and not checkpoint.config.get("quantization_config"):
        held = {key for keys in checkpoint.keys for key in keys}
        lost = next((f", such as {name}" for name, _ in model.named_parameters() if name not in held and ".linattn." not in name), "")
        raise RecipeError(
            f"{checkpoint.name} lacks weights{lost}: its config.json asks for {asked:,} numbers, and the weight files hold "
            f"{checkpoint.numbers:,}; give a whole checkpoint"
        )


def check_size(layers: Any, build: Callable[[], torch.nn.Module], where: str) -> None:
    """Bounds a model from scratch by MOST_LAYERS layers and this machine's memory.

    Raises:
        RecipeError: it is larger, or cannot be built.
    """
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise RecipeError(f"{where}: {layers:,} layers are asked for, and {MOST_LAYERS:,} are the most")
    nbytes = 4 * _numbers_of(without_memory(build, where))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if nbytes > memory:
        raise RecipeError(f"{where}: its weights take {nbytes / 1e9:,.1f} GB, and this machine has {memory / 1e9:,.1f} GB; ask for less")


def _numbers_of(model: torch.nn.Module) -> int:
    """Numbers of the parameters, without those that conversion adds."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".linattn." not in name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in `value`."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in `value` with the key that it, or the list around it, stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)


def _numbers(value: Any) -> Iterator[tuple[str, int | float]]:
    """Every number of the objects in `value`, by its key."""
    for item in _objects(value):
        yield from ((key, x) for key, x in item.items() if isinstance(x, (int, float)) and not isinstance(x, bool))
