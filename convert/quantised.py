"""Quantised weights are no weights without their scales: they are refused, whatever names them."""

from __future__ import annotations

from safetensors import safe_open

from convert.errors import ConversionError
from recipes.common.checkpoint import Checkpoint

_PLAIN = ("F64", "F32", "F16", "BF16", "BOOL", "I64")
_SETTINGS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_BUFFERS = (".bias", ".masked_bias")  # of old GPT checkpoints: causal masks, as bytes


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Looks for packed tensors and for what quantising libraries leave.

    Raises:
        ConversionError: with the first sign of it.
    """
    remedy = "convert the unquantised checkpoint, or dequantise it with the library that quantised it and save that"
    for name in _SETTINGS:
        if (checkpoint.folder / name).exists():
            raise ConversionError(f"{checkpoint.name} holds quantised weights, as its {name} says: {remedy}")
    for shard, shapes in zip(checkpoint.shards, checkpoint.shapes, strict=True):
        with safe_open(shard, framework="pt") as tensors:
            for key, shape in shapes.items():
                dtype = tensors.get_slice(key).get_dtype() if len(shape) > 1 else "F32"
                if dtype not in _PLAIN and not key.endswith(_BUFFERS):
                    raise ConversionError(f"{checkpoint.name} holds quantised weights, such as {key} in {dtype}: {remedy}")
