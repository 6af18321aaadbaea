"""Whether a student was converted from a teacher, as far as can be told from the two."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_linattn.config import PREFIX
from hf_linattn.models import attention_modules

_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_ROWS = 1024
_FAR = 0.5
"""Their difference by their length: packing to 4 bits makes a tenth, and unrelated ones are further apart than they are long."""


def stranger(student: Any, teacher: Any) -> str | None:
    """What of `teacher` says that `student` was not converted from it, such as "its head_dim is 64 and not 32"; None where nothing does.

    A student's embeddings come from what it was converted from, and training moves them little.
    """
    types = [model.config.model_type.removeprefix(PREFIX) for model in (student, teacher)]
    if types[0] != types[1]:
        return f"it is a {types[1]} and not a {types[0]}"
    for name in _SIZES:
        own, other = (getattr(model.config.get_text_config(), name, None) for model in (student, teacher))
        if own != other:
            return f"its {name} is {other} and not {own}"
    layers = [{name for name, _ in attention_modules(model)} for model in (student, teacher)]
    if layers[0] != layers[1]:
        return f"it has {len(layers[1])} attention layers, of which {len(layers[0] & layers[1])} are among the student's {len(layers[0])}"
    own, other = (_some_embeddings(model) for model in (student, teacher))
    if own.shape != other.shape or (own - other).norm() > _FAR * other.norm():
        return "its embeddings of tokens are others"
    return None


def _some_embeddings(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight.detach()
    return weight[:: max(1, len(weight) // _ROWS)].float().cpu()
