"""What a model is: its attention in words, its size, what it was trained on, and the numbers that its linear layers have learned."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from convert import calibrate
from convert.evaluation.models import Loaded, positions
from convert.evaluation.options import Subject
from hf_linattn.config import LinAttnConfig
from hf_linattn.models import attention_modules
from recipes.common.errors import RecipeError
from recipes.common.reading import read_json, user_path


def describe(loaded: Loaded, subject: Subject, sinks: int) -> dict[str, Any]:
    """``attention`` in words, ``parameters``, ``layers``, ``positions``; ``trained_tokens``, by the stages that conversion.json tells of;
    ``learned``: by name, of each linear layer its number and the values of its heads."""
    model = loaded.model
    config = model.config.get_text_config(decoder=True)
    return {
        "attention": f"softmax, last {subject.window} tokens and first {sinks}, untrained" if subject.window else attention_of(config),
        "parameters": model.num_parameters(),
        "layers": config.num_hidden_layers,
        "positions": positions(model),
        "trained_tokens": trained_tokens(user_path(subject.path)) if subject.window is None else None,
        "learned": learned_numbers(model),
    }


def attention_of(config: Any) -> str:
    """The attention of a configuration in a few words."""
    if getattr(config, "linattn", None) is None:
        return "softmax"
    options = LinAttnConfig.of(config)
    kept = ", ".join(map(str, options.softmax_layers))
    return options.attention.describe(options.learnable) + (f"; softmax in layers {kept} of {config.num_hidden_layers}" if kept else "")


def trained_tokens(folder: Path) -> int | None:
    """Tokens of all stages that conversion.json of a checkpoint's folder lists, without calibration's, which nothing learns from by
    gradients; None where it lists none."""
    path = folder / "conversion.json"
    if not path.is_file():
        return None
    try:
        report = read_json(path)
    except RecipeError:
        return None  # it is not what is evaluated
    stages = report.get("stages") if isinstance(report, dict) else None
    listed = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    tokens = [stage.get("tokens") for stage in listed if stage.get("stage") != calibrate.COMMAND]
    return sum(count for count in tokens if isinstance(count, int)) or None


@torch.no_grad()
def learned_numbers(model: Any) -> dict[str, list[tuple[int, list[float]]]]:
    """By name, for each layer that has such numbers, the layer and one number a head, as it is for hidden states of zeros."""
    found: dict[str, list[tuple[int, list[float]]]] = {}
    for _, module in attention_modules(model):
        if hasattr(module, "linattn"):
            for name, values in copy.deepcopy(module.linattn).cpu().float().at_rest().items():
                if values.dim() == 1:  # and no matrix
                    found.setdefault(name, []).append((module.layer_idx, values.tolist()))
    return found
