"""The checkpoint to convert: found, doubted, and of an architecture that can be converted."""

from __future__ import annotations

from typing import Any

from transformers.models.auto import modeling_auto

from convert.errors import ConversionError
from convert.quantised import refuse_quantised
from hf_linattn.models import BASE_MODEL_TYPES, PREFIX, those_supported
from recipes.common.checkpoint import INDEX, Checkpoint, open_checkpoint

__all__ = ["INDEX", "Source", "open_source"]

Source = Checkpoint
_ENCODERS = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES}
_ENCODER_DECODERS = {*modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
_DECODER_HEADS = ("ForCausalLM", "LMHeadModel")


def open_source(name: str, revision: str | None = None) -> Source:
    """Finds the checkpoint ``name`` (a folder, or a hub id that is downloaded) and checks it.

    Raises:
        ConversionError: there is none, or it is one that cannot be converted.
    """
    source = open_checkpoint(name, revision, check_architecture)
    refuse_quantised(source)
    return source


def check_architecture(config: dict[str, Any], name: str) -> None:
    model_type, architectures = config["model_type"], config.get("architectures") or []
    if model_type.startswith(PREFIX):
        raise ConversionError(f"{name} is converted already (model_type {model_type}): load it as it is")
    if config.get("quantization_config"):
        raise ConversionError(f"{name} holds quantised weights: convert the unquantised checkpoint")
    if model_type in BASE_MODEL_TYPES:
        return
    if config.get("is_encoder_decoder", model_type in _ENCODER_DECODERS):
        raise ConversionError(
            f"{name} is an encoder-decoder ({model_type}), which linear attention does not serve, for its decoder has cross-attention; "
            "give a decoder"
        )
    if _is_encoder(model_type, architectures):
        raise ConversionError(
            f"{name} is an encoder ({model_type}), and only decoders are converted: load it with attn_implementation='linattn' instead"
        )
    raise ConversionError(
        f"{name} has the architecture {model_type}, which is not among those that can be converted; {those_supported(model_type)}"
    )


def _is_encoder(model_type: str, architectures: list[str]) -> bool:
    return model_type in _ENCODERS and not any(str(architecture).endswith(_DECODER_HEADS) for architecture in architectures)
