"""The operator's ten-line reference as an attention implementation of its own, for models to be held against."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hf_linattn.ops import reference

NAME = "ten_lines"


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs
) -> tuple[Tensor, None]:
    options = getattr(module.config, "linattn", {})
    decay = -1 / (1.5 * (512 / 1.5) ** torch.linspace(0, 1, query.shape[1], dtype=torch.float64)).to(query.dtype)
    unit_length = options.get("normalize_qk", True)
    out = reference(
        query, key, value, 1.0, options.get("b", 1.0), 0.5 if options.get("kernel") == "quadratic" else 0.0,
        causal=module.is_causal, normalize_qk=unit_length, temperature=1.0 if unit_length else scaling,
        log_decay=decay if options.get("decay") == "head" else None,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda **kwargs: None)


@contextmanager
def by_reference(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Lets `model` compute its attention by the reference; without padding, packing or cache."""
    model.set_attn_implementation(NAME)
    try:
        yield model
    finally:
        model.set_attn_implementation("linattn")
