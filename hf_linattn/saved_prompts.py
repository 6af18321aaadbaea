"""A processed prompt on disk: what a model's cache holds of it, written by safetensors, to be continued in another process.

A state of linear attention is the same size for every text, so that a long prompt, once read, costs a small file and no time to go on
from, in as many continuations as one likes. It means something to one model alone: the file says to which, and no other takes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .cache import LinearStateLayer, StaticLinearStateLayer, below
from .kept_softmax import KeptStaticLayer
from .models import attention_modules
from .same_model import described, fingerprint, refuse_another_model, weights

FORMAT = "hf_linattn cache 1"
OVER_ALL = DynamicLayer, KeptStaticLayer
"""Layers of softmax over all tokens."""


def save_cache(cache: Cache, path: str | Path, model: PreTrainedModel, *, overwrite: bool = False) -> None:
    """Writes what a cache holds to a safetensors file, from which `load_cache` goes on: states, and of softmax layers keys and values.

    A prompt is processed, padding and all, by `generate(**prompt, max_new_tokens=1, return_dict_in_generate=True).past_key_values`, or by
    a call of the model. The file is written aside and moved into place. It names the model, its options and sizes, and digests of the
    weights and of all it holds itself; the weights are read for that, about a second a gigabyte. Of the tokens it holds how many there
    were and which were padding, not which they were: `generate` asks for them again, as in any continued conversation.

    Args:
        cache: a `DynamicCache` or `StaticCache` made for `model`.
        path: the file to write.
        model: the one that processed the prompt.
        overwrite: whether to replace a file that is there.

    Raises:
        FileExistsError: there is one, or a folder.
        FileNotFoundError: there is no folder to write it to.
        ValueError: the cache was not made for `model`, has seen nothing, or holds layers of other kinds than linear attention and softmax
            over all tokens or a sliding window; weights are offloaded.
    """
    path = Path(path)
    _refuse_what_is_there(path, overwrite)
    tensors = {f"{number}.{name}": x.detach().contiguous() for number, name, x in _tensors_of(cache, model)}
    tokens, model_digest = int(cache.get_seq_length()), fingerprint(weights(model))
    about = {"format": FORMAT, "tokens": str(tokens), "model": json.dumps(described(model)), "weights": model_digest}
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        aside.touch()
        usual = aside.stat().st_mode  # safetensors closes its files to everyone else
        save_file(tensors, aside, about | {"digest": fingerprint(tensors, about)})
        aside.chmod(usual)
        _refuse_what_is_there(path, overwrite)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def load_cache(path: str | Path, model: PreTrainedModel, *, copies: int = 1, max_cache_len: int | None = None) -> Cache:
    """The cache that `save_cache` wrote, as it was after the prompt, on the devices of the model's layers.

    Give it to the model or to `generate` with the prompt's tokens and new ones behind them:
    `model.generate(ids, attention_mask=mask, past_key_values=load_cache(path, model))`.

    Args:
        path: the file.
        model: the one that processed the prompt, or the same one loaded again.
        copies: how many continuations there will be of each sequence; they lie next to one another, as of `ids.repeat_interleave`.
        max_cache_len: makes a `StaticCache` of so many tokens, for compiled decoding; None: a `DynamicCache`. Either goes on from either.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: `copies` or `max_cache_len` is no whole number.
        ValueError: it was not written by `save_cache`, is damaged, or was saved by a model of another type, size, dtype, attention or
            other weights; `copies` is below 1; `max_cache_len` leaves no room for a new token, or a layer has a sliding window there.
    """
    for name, number in (("copies", copies), ("max_cache_len", max_cache_len)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise TypeError(f"{name} must be a whole number, not {number!r}.")
    if copies < 1:
        raise ValueError(f"copies={copies} leaves no sequence to continue; give 1 or more.")
    about, tensors = _read(Path(path))
    refuse_another_model(path, model, json.loads(about["model"]), about["weights"])
    tokens, config = int(about["tokens"]), model.config
    if max_cache_len is not None and max_cache_len <= tokens:
        raise ValueError(f"max_cache_len={max_cache_len} leaves no room behind the {tokens} tokens of {path}; give more.")
    cache = DynamicCache(config=config) if max_cache_len is None else StaticCache(config=config, max_cache_len=max_cache_len)
    devices = {module.layer_idx: next(module.parameters()).device for _, module in attention_modules(model)}
    for number, layer in enumerate(cache.layers):
        own = below(f"{number}.", tensors)
        device = devices.get(number, model.device)
        _restore(layer, number, {name: x.repeat_interleave(copies, 0).to(device) for name, x in own.items()}, tokens, model.dtype)
    return cache


def _tensors_of(cache: Cache, model: PreTrainedModel) -> Iterator[tuple[int, str, Tensor]]:
    """The number of a layer, a name and a tensor, for all that is to be written."""
    if not isinstance(cache, (DynamicCache, StaticCache)):
        raise ValueError(f"A {type(cache).__name__} cannot be saved; process the prompt with a DynamicCache or a StaticCache.")
    if [_kind(layer) for layer in cache.layers] != [_kind(layer) for layer in DynamicCache(config=model.config).layers]:
        raise ValueError(f"The cache was not made for this model; make it by {type(cache).__name__}(config=model.config).")
    tokens = int(cache.get_seq_length())
    if tokens == 0:
        raise ValueError("The cache has seen no token, so there is nothing to save; give it to the model with a prompt first.")
    for number, layer in enumerate(cache.layers):
        for name, tensor in _held(layer, number, tokens).items():
            yield number, name, tensor


def _kind(layer: Any) -> str:
    if isinstance(layer, LinearStateLayer):
        return str(None if layer.form is None else layer.form.named())
    return "window" if getattr(layer, "is_sliding", False) else "all"


def _held(layer: Any, number: int, tokens: int) -> dict[str, Tensor]:
    kind = type(layer)
    if kind in (LinearStateLayer, StaticLinearStateLayer):
        if layer.is_incomplete or layer.state is None:
            raise ValueError(f"Layer {number} has seen tokens both ways, for which no state can stand; process the prompt causally.")
        return dict(layer.to_tensors())
    if kind in OVER_ALL:
        return {"keys": layer.keys[:, :, :tokens], "values": layer.values[:, :, :tokens]}
    if kind is DynamicSlidingWindowLayer:
        first = max(0, layer.keys.shape[2] - layer.sliding_window + 1)  # while tokens may be taken back it holds more
        return {"keys": layer.keys[:, :, first:], "values": layer.values[:, :, first:]}
    raise ValueError(_other_layer(layer, number))


def _restore(layer: Any, number: int, tensors: dict[str, Tensor], tokens: int, dtype: torch.dtype) -> None:
    kind = type(layer)
    if kind in (LinearStateLayer, StaticLinearStateLayer):
        layer.from_tensors(tensors, tokens, dtype)
    elif kind in (*OVER_ALL, DynamicSlidingWindowLayer):
        layer.update(tensors["keys"], tensors["values"])
        if layer.is_sliding:
            layer.cumulative_length = tokens
    else:
        raise ValueError(_other_layer(layer, number))


def _other_layer(layer: Any, number: int) -> str:
    return (
        f"Layer {number} of the cache is a {type(layer).__name__}; saved and loaded are linear attention, softmax over all tokens, and in "
        "a DynamicCache softmax over a sliding window."
    )


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What the file says about itself, and its tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; give one that save_cache wrote.")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            names = file.keys() if about.get("format") == FORMAT else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}); give one that save_cache wrote.") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} holds no cache of the format {FORMAT!r}; give a file that save_cache of this version wrote.")
    if about.pop("digest", None) != fingerprint(tensors, about):
        raise ValueError(f"{path} was changed since it was written, or is damaged; process the prompt again.")
    return about, tensors


def _refuse_what_is_there(path: Path, overwrite: bool) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} to; make it first.")
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder, and a prompt is saved as one file; give another path.")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} exists already; give another path, or overwrite=True to replace it.")
