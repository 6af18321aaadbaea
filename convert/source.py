"""The checkpoint to convert: found, and checked without reading its weights into memory."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.models.auto import modeling_auto

from convert.errors import ConversionError
from hf_linattn.models import BASE_MODEL_TYPES, PREFIX

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_ENCODERS = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES}
_DECODER_HEADS = ("ForCausalLM", "LMHeadModel")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be converted.

    Attributes:
        name: what the user called it, a folder or a hub id.
        folder: where it lies.
        hub_id: its id on the hub, None for a local folder.
        config: config.json as it stands.
        shards: the weight files, in order.
        keys: the names of the tensors in each of the shards.
    """

    name: str
    folder: Path
    hub_id: str | None
    config: dict[str, Any]
    shards: tuple[Path, ...]
    keys: tuple[tuple[str, ...], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.stat().st_size for shard in self.shards)

    def parameters(self) -> int:
        """Numbers in all tensors of the weight files."""
        count = 0
        for shard, keys in zip(self.shards, self.keys, strict=True):
            with safe_open(shard, framework="pt") as tensors:
                count += sum(math.prod(tensors.get_slice(key).get_shape()) for key in keys)
        return count


def open_source(name: str, revision: str | None = None) -> Source:
    """Finds the checkpoint ``name`` (a folder, or a hub id that is downloaded) and checks it.

    Raises:
        ConversionError: there is none, or it is one that cannot be converted.
    """
    folder, hub_id = _locate(name, revision)
    config = _read_config(folder, name)
    _check_architecture(config, name)
    shards = _find_shards(folder, name)
    return Source(name, folder, hub_id, config, shards, tuple(_read_keys(shard) for shard in shards))


def _locate(name: str, revision: str | None) -> tuple[Path, str | None]:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, None
    if folder.exists():
        raise ConversionError(f"{name} is a file; give the folder that holds config.json and the weights, or a hub id")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ConversionError(f"there is no folder {name}, and this is no hub id such as EleutherAI/pythia-14m either")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES)), name
    except Exception as error:
        raise ConversionError(
            f"there is no folder {name}, and it could not be had from the Hugging Face Hub ({_first_line(error)}); check the name, "
            "the connection and, for a gated model, `hf auth login`"
        ) from error


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConversionError(f"{name} holds a PEFT adapter and no model: merge it into its base model and save that first")
        raise ConversionError(f"{name} is no checkpoint: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not readable as JSON ({_first_line(error)}): copy or download the checkpoint again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConversionError(f"{path} names no model_type, so the architecture is unknown")
    return config


def _check_architecture(config: dict[str, Any], name: str) -> None:
    model_type, architectures = config["model_type"], config.get("architectures") or []
    if model_type.startswith(PREFIX):
        raise ConversionError(f"{name} is converted already (model_type {model_type}): load it as it is")
    if config.get("quantization_config"):
        raise ConversionError(f"{name} holds quantised weights: convert the unquantised checkpoint")
    if model_type in BASE_MODEL_TYPES:
        return
    supported = ", ".join(BASE_MODEL_TYPES)
    if config.get("is_encoder_decoder") or _is_encoder(model_type, architectures):
        raise ConversionError(
            f"{name} is an encoder ({model_type}), and only decoders are converted ({supported}): "
            "load it with attn_implementation='linattn' instead"
        )
    raise ConversionError(f"{name} has the architecture {model_type}, which cannot be converted; supported are {supported}")


def _is_encoder(model_type: str, architectures: list[str]) -> bool:
    return model_type in _ENCODERS and not any(str(architecture).endswith(_DECODER_HEADS) for architecture in architectures)


def _find_shards(folder: Path, name: str) -> tuple[Path, ...]:
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if not (folder / INDEX).is_file():
        if any(any(folder.glob(pattern)) for pattern in _PICKLED):
            raise ConversionError(
                f"{name} holds pickled weights, which can run code when read: save it as safetensors first, for example with "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) where you trust the file"
            )
        raise ConversionError(f"{name} is no checkpoint: it has neither {WEIGHTS} nor {INDEX}")
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConversionError(f"{folder / INDEX} is not a readable index of weights: copy or download the checkpoint again") from error
    missing = [shard for shard in names if not (folder / shard).is_file()]
    if missing or not names:
        which = f"{len(missing)} of its {len(names)} weight files ({', '.join(missing)})"
        raise ConversionError(f"{name} lacks {which}: copy or download them again")
    present = {key for shard in names for key in _read_keys(folder / shard)}
    absent = sorted(set(weight_map) - present)
    if absent:
        which = f"{len(absent)} tensors that {INDEX} lists, such as {absent[0]}"
        raise ConversionError(f"the weight files of {name} lack {which}: copy or download them again")
    return tuple(folder / shard for shard in names)


def _read_keys(shard: Path) -> tuple[str, ...]:
    try:
        with safe_open(shard, framework="pt") as tensors:
            return tuple(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{shard} is truncated or no safetensors file ({_first_line(error)}): copy or download it again") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
