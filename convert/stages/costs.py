"""What a training stage will take of memory, said before it begins."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import hf_linattn  # noqa: F401  (registers the architectures of converted checkpoints)
from convert.stages.divergence import NUMBERS_AT_ONCE
from recipes.common.checkpoint import open_checkpoint

_KEPT_A_CHANNEL = 60
"""Bytes that a layer keeps for each token and channel of the residual stream under autocast: norms and residuals in float32, projections,
attention and an MLP of about three times the width in half precision."""


def training_memory(student: str | Path, options: dict[str, Any]) -> str:
    """A sentence: about how much memory a device needs, from the sizes of the converted checkpoint `student` and a stage's options."""
    checkpoint = open_checkpoint(str(student))
    config, numbers = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False), checkpoint.numbers
    half = options["mixed_precision"] in ("bf16", "fp16")
    tokens, width, layers = options["batch_size"] * options["length"], config.hidden_size, config.num_hidden_layers
    states = 16 * numbers + (2 if half else 4) * numbers  # weights, gradients and two moments in float32; the teacher
    kept = (4 if options["gradient_checkpointing"] else _KEPT_A_CHANNEL * (1 if half else 1.6)) * tokens * width * layers
    logits = 6 * 4 * min(NUMBERS_AT_ONCE, tokens * config.vocab_size) if "kl_weight" in options else 4 * tokens * width * layers
    size, unit = (2**30, "GiB") if states + kept + logits >= 2**30 / 10 else (2**20, "MiB")
    many = f"{numbers / 10**6:,.0f}M" if numbers >= 10**6 else f"{numbers:,}"
    return (
        f"about {(states + kept + logits) / size:.1f} {unit} a device: {states / size:.1f} for {many} numbers of student, "
        f"optimizer and teacher, {math.ceil(1024 * kept / size) / 1024:.1f} for activations of {tokens:,} tokens, "
        f"{logits / size:.1f} to compare"
    )
