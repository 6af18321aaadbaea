"""Which key of a config.json it is that no model can be made of: the libraries' errors speak of the number that they stumbled over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from recipes.common.errors import RecipeError, stage

_NOT_THE_MODELS = ("model_type", "auto_map", "quantization_config", "attn_implementation", "_attn_implementation")


@contextmanager
def naming_the_key(config: dict[str, Any], where: str | Path) -> Iterator[None]:
    """Whatever fails inside fails as a sentence, which names the keys of `config` at fault where there are any.

    Args:
        config: the content of a config.json, of a model type that Transformers knows.
        where: what it was read from.

    Raises:
        RecipeError: in place of any other Exception.
    """
    try:
        with stage(f"making a model of {where}"):
            yield
    except RecipeError as error:
        keys = _keys_at_fault(config)
        if not keys:
            raise
        raise RecipeError(f"{error}; at fault is " + " or ".join(f"{key} = {config[key]!r:.100}" for key in keys)) from error


def _keys_at_fault(config: dict[str, Any]) -> list[str]:
    """The keys any one of which must be another for a model to be made, where with all as they are none can."""
    model_type = config.get("model_type", "")
    values = {key: value for key, value in config.items() if key not in _NOT_THE_MODELS}
    if _can_be_made(model_type, values):
        return []
    return [key for key in values if any(_can_be_made(model_type, other) for other in _without(values, key))]


def _without(values: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The values with the default of `key`; and with 1, since the default of a number of heads may not divide another's size."""
    rest = {name: value for name, value in values.items() if name != key}
    return [rest, {**rest, key: 1}] if isinstance(values[key], int | float) else [rest]


def _can_be_made(model_type: str, values: dict[str, Any]) -> bool:
    try:
        made = AutoConfig.for_model(model_type, **values)
        with torch.device("meta"):
            AutoModel.from_config(made, attn_implementation="eager", trust_remote_code=False)
    except Exception:  # of every type: that is what is asked
        return False
    return True
