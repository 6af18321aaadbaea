"""What a model is known by, so that a saved prompt is continued by no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .config import NAME, LinAttnConfig

OF_TRAINING = ("dropout", "dropout_kind")
"""Options of `config.linattn` that change nothing of a state."""


def described(model: PreTrainedModel) -> dict[str, Any]:
    """A model's kind, options of attention and sizes, as plain JSON: what its configuration has beyond every model's."""
    config = model.config.get_text_config(decoder=True)
    kind = {"model_type": type(config).model_type, "dtype": str(model.dtype), "attn_implementation": config._attn_implementation}
    linattn = {f"{NAME}.{name}": value for name, value in LinAttnConfig.of(config).to_dict().items() if name not in OF_TRAINING}
    common = {*PreTrainedConfig().to_dict(), NAME, "auto_map"}
    own = {name: value for name, value in sorted(config.to_dict().items()) if name not in common and not name.endswith("_token_id")}
    plain: dict[str, Any] = json.loads(json.dumps(kind | linattn | own | {"adapters": adapters(model)}, default=str))
    return plain


def adapters(model: Any) -> list[str]:
    """PEFT's adapters that have a say in what layers compute, each with how much: switched off they are among the weights all the same."""
    found = set()
    for module in model.modules():
        if hasattr(module, "active_adapters") and not getattr(module, "disable_adapters", True):
            scaling = getattr(module, "scaling", {})
            found |= {f"{name} * {scaling.get(name, 1)}" for name in module.active_adapters}
    return sorted(found)


def weights(model: Any) -> dict[str, Tensor]:
    """All weights by name, as they are called without torch.compile."""
    named: dict[str, Tensor] = getattr(model, "_orig_mod", model).state_dict()
    return named


def fingerprint(tensors: Mapping[str, Tensor], beside: Any = None) -> str:
    """SHA-256 of tensors' names, dtypes, shapes and bytes, and of plain JSON beside them.

    Raises:
        ValueError: a tensor is elsewhere than in memory.
    """
    digest = hashlib.sha256(json.dumps(beside, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.is_meta:
            raise ValueError(f"{name} is offloaded, and a saved prompt is known by the model's weights; load the model without offloading.")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refuse_another_model(path: str | Path, model: PreTrainedModel, saved: dict[str, Any], saved_weights: str) -> None:
    """Refuses a model that is not the one described in a file.

    Raises:
        ValueError: it differs by what `described` says, or by the `fingerprint` of its weights.
    """
    go_on = "load it with the model that processed the prompt, or process the prompt again."
    given = described(model)
    for name, value in saved.items():
        if name in given and given[name] != value:  # another version of Transformers may know of more
            raise ValueError(f"{path} was saved by a model with {name}={value!r:.80}, and this one has {given[name]!r:.80}; {go_on}")
    if saved_weights != fingerprint(weights(model)):
        raise ValueError(f"{path} was saved by a model of the same kind and size with other weights than this one's; {go_on}")
