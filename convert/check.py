"""A written checkpoint is loaded again, compared with its source and run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from convert.errors import ConversionError, one_line
from convert.source import Source

PROBE_TOKENS = 24
_PROMPT_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class CheckReport:
    """What the check found.

    Attributes:
        tensors: how many source tensors were compared, all equal.
        ignored: source tensors that the model has no use for, such as stored rotary frequencies.
        tokens: length of the probe.
        step_error: largest difference between cached steps and the full forward pass, over the largest magnitude; None for a model
            that does not generate.
    """

    tensors: int
    ignored: list[str]
    tokens: int
    step_error: float | None


def check_converted(folder: Path, model_class: Any, source: Source, dtype: torch.dtype | None) -> CheckReport:
    """Loads ``folder`` and holds it against ``source``; ``dtype`` is what the source's tensors were cast to, None for no cast.

    Raises:
        ConversionError: a weight that is missing or differs, a result that is not finite, cached steps that differ from the full pass.
    """
    try:
        model, info = model_class.from_pretrained(folder, dtype="auto", trust_remote_code=False, output_loading_info=True)
    except Exception as error:
        raise ConversionError(f"the converted checkpoint does not load ({one_line(error)}); nothing was kept") from error
    missing = sorted(info["missing_keys"])
    if missing:
        count, name = len(missing), model_class.__name__
        raise ConversionError(f"{source.name} lacks {count} weights of {name}, such as {missing[0]}; nothing was kept")
    compared, ignored = _compare_weights(model, source, dtype, set(info["unexpected_keys"]))
    return CheckReport(compared, ignored, PROBE_TOKENS, _probe(model.eval()))


def _compare_weights(model: Any, source: Source, dtype: torch.dtype | None, unexpected: set[str]) -> tuple[int, list[str]]:
    loaded = model.state_dict()
    unclaimed = {key: value for key, value in loaded.items() if not any(key in keys for keys in source.keys)}
    compared, ignored = 0, []
    for shard, keys in zip(source.shards, source.keys, strict=True):
        with safe_open(shard, framework="pt") as tensors:
            for key in keys:
                tensor = tensors.get_tensor(key)
                if dtype is not None and tensor.is_floating_point():
                    tensor = tensor.to(dtype)
                # Transformers renames some weights on loading (embed_out to lm_head): such a one is found by what it holds.
                candidates = [loaded[key]] if key in loaded else list(unclaimed.values())
                if any(_same(tensor, candidate) for candidate in candidates):
                    compared += 1
                elif key not in loaded and (key in unexpected or _is_buffer(key)):
                    ignored.append(key)
                else:
                    raise ConversionError(f"the weight {key} is not what it is in {source.name} after loading; nothing was kept")
    return compared, ignored


def _is_buffer(key: str) -> bool:
    return key.endswith(("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"))


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.to(right.dtype), right)


@torch.no_grad()
def _probe(model: Any) -> float | None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (1, PROBE_TOKENS), generator=generator)
    if not model.can_generate():
        _require_finite(model(tokens)[0])
        return None
    full = model(tokens).logits
    _require_finite(full)
    cache, steps, at = None, [], 0
    for length in (_PROMPT_TOKENS, *[1] * (PROBE_TOKENS - _PROMPT_TOKENS)):
        out = model(tokens[:, at : at + length], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + length
        steps.append(out.logits)
    error = ((torch.cat(steps, 1) - full).abs().max() / full.abs().max().clamp(min=1)).item()
    tolerance = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)
    if not error <= tolerance:
        raise ConversionError(f"cached steps differ from the full forward pass by {error:.1e}, more than {tolerance:.0e}; nothing was kept")
    return error


def _require_finite(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ConversionError("the converted model gives results that are not finite numbers; nothing was kept")
