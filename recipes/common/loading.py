"""A causal language model from a checkpoint that was doubted first; safetensors only, pickled weights are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import hf_linattn  # noqa: F401  (registers the architectures of converted checkpoints)
from recipes.common.blame import naming_the_key
from recipes.common.checkpoint import check_fits, open_checkpoint, without_memory
from recipes.common.errors import RecipeError, sentence


def load_causal_lm(
    name: str,
    *,
    attn_implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
    change: Callable[[PretrainedConfig], None] = lambda config: None,
) -> PreTrainedModel:
    """The model in a checkpoint folder, or of a hub id.

    Args:
        attn_implementation: None keeps what the checkpoint says.
        dtype: of its weights.
        change: called with the configuration before a model is made of it.

    Raises:
        RecipeError: it is no whole checkpoint, or no model can be made of it.
    """
    checkpoint = open_checkpoint(name)
    folder, where = str(checkpoint.folder), checkpoint.folder / "config.json"

    def build() -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, trust_remote_code=False)

    with naming_the_key(checkpoint.config, where):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        change(config)
        check_fits(checkpoint, without_memory(build, where))
    model: PreTrainedModel
    info: dict[str, Any]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            folder,
            config=config,
            attn_implementation=attn_implementation,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and the hub client each raise their own
        raise RecipeError(f"{name}: its weights cannot be loaded ({sentence(error)}); give a whole checkpoint in safetensors") from None
    if missing := sorted(info["missing_keys"]):
        raise RecipeError(f"{name} lacks {len(missing)} of the model's weights, such as {missing[0]}; give a whole checkpoint")
    return model
