"""A written checkpoint is loaded again, compared with its source and run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.errors import ConversionError, stage
from convert.forcing import teacher_forced
from convert.options import LinearizeOptions
from convert.source import Source
from convert.truth import LayerTruth, layer_truths, precisions
from convert.usable import check_usable
from hf_linattn.config import LinAttnConfig
from hf_linattn.models import attention_modules

_CACHED_PIECES = (16, 4, *[1] * 4)  # a prompt, so much longer as the form reaches, several tokens after it, single ones
_WIDEST = 512
"""A wider window is checked as one of so many tokens: its probe must be longer, and the quadratic form takes its length squared."""
_STORED_BUFFERS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias", "attn.bias", "attn.masked_bias")
# The project's bar: twice the error of the same formula in the same dtype in plain PyTorch, and what that one may have by luck.
_BAR = 2
_FLOOR = {torch.float32: 2e-6, torch.float64: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
_NUMBERS_BAR = 5e-6


@dataclass(frozen=True)
class CheckReport:
    """What the check found. Errors are distances over the length of the exact result, the largest of all layers.

    Attributes:
        tensors: how many source tensors were compared, all equal.
        ignored: stored buffers that the model computes itself, such as rotary frequencies.
        tokens: length of the probe.
        layers: how many attention layers were held against the source's own in float64.
        error: that of a forward pass.
        step_error: that of cached pieces.
        plain_error: that of the same formula in the same dtype in plain PyTorch.
        bar: the largest error as a share of what it may be in its layer; 1 would be refused.
        tokenizer: its class, loaded; None where there is none, or it has code of its own, which is not run.
    """

    tensors: int
    ignored: list[str]
    tokens: int
    layers: int
    error: float
    step_error: float
    plain_error: float
    bar: float
    tokenizer: str | None


@torch.no_grad()
def check_converted(folder: Path, model_class: Any, source: Source, options: LinearizeOptions) -> CheckReport:
    """Loads ``folder`` and holds its weights and every attention layer against ``source``. One of the two is in memory at a time.

    Raises:
        ConversionError: a weight that is missing, differs or has no place in the model, a result that is not finite, a layer
            that is further from the truth than rounding explains.
    """
    dtype = getattr(torch, options.dtype) if options.dtype else "auto"
    original = _load_source(model_class, source, dtype)
    generator = torch.Generator().manual_seed(options.seed)
    linattn = _narrowed(options.linattn())
    pieces = (_CACHED_PIECES[0] + linattn.attention.reach(), *_CACHED_PIECES[1:])
    tokens = torch.randint(original.config.get_text_config().vocab_size, (1, sum(pieces)), generator=generator)
    digests, tensors = _digests(original), len({value.data_ptr() for value in original.state_dict().values()})
    truths = layer_truths(original, tokens, linattn)
    del original
    model = _load_converted(model_class, folder)
    _narrowed(LinAttnConfig.of(model.config)).store(model.config)
    _compare_weights(digests, _digests(model), source)
    _compare_numbers(model, truths)
    found = [_compare_layers(model, truths, tokens, pieces, precision) for precision in precisions(model.dtype)]
    worst = found[0] | {"bar": max(errors["bar"] for errors in found)}
    ignored = [key for keys in source.keys for key in keys if key.endswith(_STORED_BUFFERS) and key not in digests]
    return CheckReport(tensors, ignored, sum(pieces), len(truths), **worst, tokenizer=check_usable(folder, model))


def _narrowed(linattn: LinAttnConfig) -> LinAttnConfig:
    reach = linattn.attention.reach()
    return LinAttnConfig(**linattn.to_dict() | {"window": _WIDEST}) if reach > _WIDEST else linattn


def _load_source(model_class: Any, source: Source, dtype: Any) -> Any:
    base = model_class.__bases__[-1]
    with stage(f"loading {source.name} as {base.__name__}", "nothing was kept"):
        model, info = base.from_pretrained(
            source.folder, dtype=dtype, attn_implementation="eager", trust_remote_code=False, output_loading_info=True
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConversionError(f"{source.name} lacks {len(missing)} weights of {base.__name__}, such as {missing[0]}; nothing was kept")
    lost = sorted(key for key in info["unexpected_keys"] if not key.endswith(_STORED_BUFFERS))
    if lost:
        raise ConversionError(
            f"{source.name} holds {len(lost)} weights that a {base.__name__} of its config.json has no place for, such as {lost[0]}: "
            "they would be lost, so mend config.json; nothing was kept"
        )
    return model.eval()


def _load_converted(model_class: Any, folder: Path) -> Any:
    with stage("loading the converted checkpoint", "nothing was kept"):
        return model_class.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()


def _digests(model: PreTrainedModel) -> dict[str, str]:
    """A digest of the dtype, the shape and the bytes of every stored tensor, by name."""
    found = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ConversionError(f"the weight {name} holds numbers that are not finite; nothing was kept")
        content = hashlib.blake2b(value.contiguous().reshape(-1).view(torch.uint8).numpy(), digest_size=16)
        found[name] = f"{value.dtype} {tuple(value.shape)} {content.hexdigest()}"
    return found


def _compare_weights(wanted: dict[str, str], found: dict[str, str], source: Source) -> None:
    for name, digest in wanted.items():
        if found.get(name) != digest:
            raise ConversionError(f"the weight {name} is not what it is in {source.name} after loading; nothing was kept")
    strange = [name for name in found if name not in wanted and ".linattn." not in name]
    if strange:
        raise ConversionError(f"the converted model has a weight that {source.name} has not, {strange[0]}; nothing was kept")


def _compare_numbers(model: Any, truths: dict[str, LayerTruth]) -> None:
    for name, module in attention_modules(model):
        wanted = truths[name].numbers if name in truths else None
        stored_numbers = module.linattn.at_rest() if wanted and hasattr(module, "linattn") else {}
        for key, number in (wanted or {}).items() if stored_numbers else ():
            exact = torch.as_tensor(number, dtype=torch.float64)
            stored = torch.as_tensor(stored_numbers.get(key, 0.0), dtype=torch.float64)
            if not (stored - exact).abs().max() <= _NUMBERS_BAR * exact.abs().max():
                raise ConversionError(f"{name} starts with another {key} than it was to; nothing was kept")


def _compare_layers(
    model: Any, truths: dict[str, LayerTruth], tokens: Tensor, pieces: tuple[int, ...], dtype: torch.dtype
) -> dict[str, float]:
    """The errors of :class:`CheckReport` in ``dtype``; those of cached pieces without the first, which is a forward pass."""
    found = dict.fromkeys(("error", "step_error", "plain_error", "bar"), 0.0)
    for kind, lengths, rows in (("error", (sum(pieces),), slice(None)), ("step_error", pieces, slice(pieces[0], None))):
        given = teacher_forced(model, {name: truth.hidden for name, truth in truths.items()}, tokens, lengths, dtype)
        for name, truth in truths.items():
            exact = truth.exact[:, rows]
            error, plain = _distance(given[name][:, rows], exact), _distance(truth.plain[dtype][:, rows], exact)
            allowed = _BAR * plain + _FLOOR[dtype]
            if not error <= allowed:
                how = "in cached steps" if kind == "step_error" else "in a forward pass"
                raise ConversionError(
                    f"{name} in {str(dtype).removeprefix('torch.')}, {how}, is {error:.1e} away from the source's layer with the same "
                    f"numbers in float64, and rounding explains {allowed:.1e}: the converter or the plugin is at fault; nothing was kept"
                )
            found[kind], found["plain_error"] = max(found[kind], error), max(found["plain_error"], plain)
            found["bar"] = max(found["bar"], error / allowed)
    return found


def _distance(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()
