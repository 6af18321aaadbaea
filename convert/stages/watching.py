"""What a softmax model's attention does on some text, layer by layer, as `Seen` by the forms that are to start from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_linattn.attention import softmax_attention
from hf_linattn.forms.seen import SINKS, Seen

_WATCHED = "linattn_watched"


class Sums:
    """Of one layer, over the batches so far."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None, softcap: float | None = None) -> None:
        """Takes queries (B, Hq, N, D) and keys (B, Hk, N, D) in, and the softmax of their products where `mask` (B or 1, 1, N, N) shows
        them, None: of all tokens before."""
        batch, _, length, _ = query.shape
        self.tokens += batch * length
        if mask is None:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
        # (H, N, D): one text's matrix of all pairs at a time
        for row_query, row_key, row_mask in zip(query.float(), key.float(), mask.expand(batch, -1, -1, -1), strict=True):
            mass = self._mass(row_query, row_key, scaling, row_mask, softcap)
            self._take("query", row_query.mT @ row_query)
            self._take("key", row_key.sum(1))
            self._take("keys", row_key.mT @ row_key)
            self._take("sinks", mass[:, :, :SINKS].sum((1, 2)))
            mass[:, :, :SINKS] = 0
            self._take("distance", _by_distance(mass))

    def share(self, accelerator: Accelerator) -> None:
        """Adds up what all processes have seen."""
        self.sums = {name: accelerator.reduce(value, "sum") for name, value in self.sums.items()}
        self.tokens *= accelerator.num_processes

    def seen(self) -> Seen:
        """The means."""
        means = {name: value / self.tokens for name, value in self.sums.items()}
        center = means["key"]
        moment = means["keys"] - center[:, :, None] * center[:, None]
        return Seen(means["query"], center, moment, means["distance"], means["sinks"])

    def _take(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value.double() if name in self.sums else value.double()

    @staticmethod
    def _mass(query: Tensor, key: Tensor, scaling: float, mask: Tensor, softcap: float | None) -> Tensor:
        key = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
        scores = query @ key.mT * scaling
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def _by_distance(mass: Tensor) -> Tensor:
    """Sums of weights (H, N, N) over pairs that are n tokens apart: (H, N)."""
    heads, length, _ = mass.shape
    padded = torch.nn.functional.pad(mass.flip(-1), (0, length)).flatten(1)
    # rows of one number less than they were written with: row i moves by i, and all of one distance come to stand in a column
    skewed = padded[:, : length * (2 * length - 1)].view(heads, length, 2 * length - 1)
    return skewed[:, :, length - 1 :].sum(1)


@contextmanager
def watched_attention(model: PreTrainedModel) -> Iterator[dict[int, Sums]]:
    """Runs `model` with its softmax attention watched: sums by the index of the layer."""
    found: dict[int, Sums] = {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, dropout: float = 0.0,
        is_causal: bool | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        found.setdefault(module.layer_idx, Sums()).add(query, key, scale, mask, kwargs.get("softcap"))
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return softmax_attention(module, query, key, value, mask, None, scaling, dropout, causal, kwargs)

    AttentionInterface.register(_WATCHED, attend)
    AttentionMaskInterface.register(_WATCHED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(_WATCHED)
    try:
        yield found
    finally:
        model.set_attn_implementation(before)
