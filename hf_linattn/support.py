"""What the plugin cannot serve is refused in one sentence, before it can give a wrong result."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .architectures import refuse_class


def require_attention_interface(model: PreTrainedModel | type[PreTrainedModel] | PreTrainedConfig) -> None:
    """Refuses an architecture that computes its attention itself, past any `attn_implementation`.

    Transformers accepts every registered `attn_implementation` for every architecture; one without the interface would
    go on computing softmax.

    Raises:
        ValueError: the architecture does not call Transformers' attention interface.
    """
    if isinstance(model, PreTrainedConfig):
        classes = model_classes(type(model))
    else:
        classes = (type(model),) if isinstance(model, PreTrainedModel) else (model,)
    for cls in classes:
        refuse_class(cls)


def model_classes(config_class: type[PreTrainedConfig]) -> tuple[Any, ...]:
    """The base model classes that Transformers has for a class of configurations; none for one it does not know."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING  # late: it pulls in every model name

    found: Any = MODEL_MAPPING.get(config_class, ())
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def refuse_unknown_calls(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    """Refuses the calls whose meaning linear attention would silently change.

    Raises:
        ValueError: cross-attention, a growing key/value cache, or a relative position bias.
    """
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"{type(module).__name__} belongs to a model with cross-attention, which linear attention does not serve; "
            'load it with attn_implementation="sdpa".'
        )
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds a position bias to softmax scores, which linear attention has not; "
            'load the model with attn_implementation="sdpa".'
        )
    if key.shape[-2] != query.shape[-2]:
        raise ValueError(
            f"Linear attention was given {key.shape[-2]} keys for {query.shape[-2]} queries: the cache keeps keys and values. "
            "Make it from the model's config, DynamicCache(config=model.config), after the model got "
            'attn_implementation="linattn", and leave quantized caches out.'
        )
