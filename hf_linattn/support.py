"""What the plugin cannot serve is refused in one sentence, before it can give a wrong result."""

from __future__ import annotations

from typing import Any

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
