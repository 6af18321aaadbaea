"""Random inputs for a model that says only what its main input is called: what comes first is likeliest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from sweep.tiny import TEXT_TOKENS
from torch import Tensor
from transformers import PreTrainedConfig

BATCH, LENGTH = 3, 23
GRID = torch.tensor([[1, 4, 4], [1, 8, 4]])  # frames, rows, columns of patches: two pictures in one row of patches


def candidates(config: PreTrainedConfig, main_input: str, parameters: list[str]) -> Iterator[dict[str, Any]]:
    """Inputs to try one after the other until the model takes them."""
    if "grid_thw" in parameters or "image_grid_thw" in parameters:
        yield from _packed_pictures(config, parameters)
    if {"spatial_shapes", "pixel_position_ids"} & set(parameters):
        yield from _padded_patches(config, parameters)
    if not isinstance(main_input, str):
        return
    if main_input in ("input_ids", "inputs"):
        for made in _texts(config, parameters):
            yield {main_input if name == "input_ids" else name: tensor for name, tensor in made.items()}
    elif main_input in ("input_features", "audio_mel"):
        yield from _spectra(config, main_input)
    elif main_input == "input_values":
        yield from _sounds(config)
    elif main_input.startswith("pixel_values"):
        yield from ({main_input: picture} for picture in _pictures(config))
    elif main_input == "past_values":
        yield {"past_values": torch.randn(BATCH, _number(config, "context_length", 32))}
        yield {"past_values": torch.randn(BATCH, _number(config, "context_length", 32), _number(config, "num_input_channels", 1))}
        series = torch.randn(BATCH, _number(config, "context_length", 64))
        yield {"past_values": series, "past_values_padding": torch.zeros_like(series).long(), "freq": torch.zeros(BATCH, 1).long()}
    if "inputs_embeds" in parameters:
        yield {"inputs_embeds": torch.randn(BATCH, LENGTH, _number(config, "hidden_size", 64))}
    if "pixel_values" in parameters and main_input != "pixel_values":
        yield from ({"pixel_values": picture} for picture in _pictures(config))


def _texts(config: PreTrainedConfig, parameters: list[str]) -> Iterator[dict[str, Tensor]]:
    low, high = TEXT_TOKENS
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    text = {"input_ids": torch.randint(low, high if not isinstance(vocabulary, int) else min(high, vocabulary), (BATCH, LENGTH))}
    if config.is_encoder_decoder and "decoder_input_ids" in parameters:
        yield {**text, "decoder_input_ids": text["input_ids"].roll(1, 0)}
    yield text
    yield {**text, "bbox": torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)}
    if "pixel_values" in parameters:
        yield from ({**text, "pixel_values": picture} for picture in _pictures(config))


def _spectra(config: PreTrainedConfig, name: str) -> Iterator[dict[str, Tensor]]:
    """Frames in either order, and as many as the model was made for."""
    fields = ("num_mel_bins", "feature_size", "input_feat_size", "input_size", "n_mels", "feature_projection_input_dim")
    bands = {_number(part, field, 0) for part in _parts(config) for field in fields}
    frames = [2 * _number(config, "max_source_positions", 64), 64, 256, 2 * _number(config, "n_window", 64)]
    for mel, length in itertools.product(sorted(bands - {0}) or [80], frames):
        yield {name: torch.randn(BATCH, mel, length)}
        yield {name: torch.randn(BATCH, length, mel)}
        whole = torch.ones(BATCH, length, dtype=torch.bool)
        for mask in ("input_features_mask", "attention_mask", "audio_mel_mask", "feature_attention_mask"):
            yield {name: torch.randn(BATCH, length, mel), mask: whole}
            yield {name: torch.randn(BATCH, length, mel), mask: whole.long()}
            yield {name: torch.randn(BATCH, mel, length), mask: whole.long()}


def _sounds(config: PreTrainedConfig) -> Iterator[dict[str, Tensor]]:
    yield {"input_values": torch.randn(BATCH, _number(config, "max_length", 64), _number(config, "num_mel_bins", 32))}
    for samples in (16000, 4000):
        yield {"input_values": torch.randn(BATCH, samples)}
        yield {"input_values": torch.randn(BATCH, 1, samples)}


def _pictures(config: PreTrainedConfig) -> Iterator[Tensor]:
    """Squares of the size that the configuration or one of its parts names, else of usual sizes; then films of them."""
    parts = _parts(config)
    sizes = [size for part in parts for size in [getattr(part, "image_size", None), getattr(part, "img_size", None)] if size]
    sides = [(s, s) if isinstance(s, int) else (*s, s[-1])[:2] for s in sizes] + [(32, 32), (64, 64), (224, 224)]
    channels = next((n for part in parts for n in [_number(part, "num_channels", 0) or _number(part, "in_channels", 0)] if n), 3)
    frames = _number(config, "num_frames", 0) or _number(config, "frames_per_clip", 4)
    for height, width in dict.fromkeys(sides):
        yield torch.randn(BATCH, channels, height, width)
    for height, width in dict.fromkeys(sides):
        yield torch.randn(BATCH, frames, channels, height, width)


def _packed_pictures(config: PreTrainedConfig, parameters: list[str]) -> Iterator[dict[str, Tensor]]:
    """Patches of several pictures in one row, told apart by a grid."""
    grid = "grid_thw" if "grid_thw" in parameters else "image_grid_thw"
    first = next((name for name in ("hidden_states", "pixel_values") if name in parameters), parameters[0])
    patches = int(GRID.prod(-1).sum())
    for part in _parts(config):
        patch, channels = _number(part, "patch_size", 0), _number(part, "in_channels", 0) or _number(part, "num_channels", 3)
        for times in (_number(part, "temporal_patch_size", 1), 1, 2):
            if patch:
                flat = {first: torch.randn(patches, channels * times * patch * patch), grid: GRID}
                yield {**flat, "merge_sizes": torch.ones(len(GRID), dtype=torch.long)} if "merge_sizes" in parameters else flat
                yield {first: torch.randn(patches, channels, patch, patch), grid: GRID}


def _padded_patches(config: PreTrainedConfig, parameters: list[str]) -> Iterator[dict[str, Tensor]]:
    """A row of patches a picture, told apart by their places."""
    patch, rows, columns = _number(config, "patch_size", 4), 6, 6
    picture = {"pixel_values": torch.randn(BATCH, rows * columns, 3 * patch * patch)}
    if "spatial_shapes" in parameters:
        whole = torch.ones(BATCH, rows * columns, dtype=torch.long)
        yield {**picture, "pixel_attention_mask": whole, "spatial_shapes": torch.tensor([[rows, columns]] * BATCH)}
    else:
        yield {**picture, "pixel_position_ids": torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).expand(BATCH, -1, -1)}


def _parts(config: PreTrainedConfig) -> list[Any]:
    return [config, *(getattr(config, name, None) for name in config.sub_configs)]


def _number(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else default
