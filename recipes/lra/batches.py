"""Batches of a split that lies on the device as bytes: a step moves a few indices and no data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .data import Split, Task

BATCHES_SORTED_TOGETHER = 50


def positions_of_a_square(side: int) -> np.ndarray:
    """The eight ways to turn and mirror a picture: which pixel each pixel of the result was, (8, side * side) int64."""
    pixels = np.arange(side * side).reshape(side, side)
    return np.stack([np.rot90(picture, turns).ravel() for picture in (pixels, pixels.T) for turns in range(4)])


def drawn_positions(count: int, seed: int, step: int) -> np.ndarray:
    """Of each example of a step one of the eight positions, (count,) int64."""
    return np.random.default_rng([seed, step, 8]).integers(8, size=count)


@dataclass(frozen=True)
class DeviceSplit:
    """A split on `device`. Tokens come out as token + 1 in int32, 0 at padding."""

    task: Task
    split: Split
    towers: tuple[tuple[Tensor, Tensor], ...]
    labels: Tensor
    blank_is_padding: bool
    pad_multiple: int
    positions: Tensor | None  # of a square, for tasks of pictures

    @classmethod
    def of(cls, task: Task, split: Split, device: torch.device, blank_is_padding: bool = False, pad_multiple: int = 128) -> DeviceSplit:
        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        towers = tuple((put(tower.tokens), put(tower.offsets)) for tower in split.towers)
        positions = put(positions_of_a_square(task.side)) if task.side else None
        return cls(task, split, towers, put(split.labels), blank_is_padding, pad_multiple, positions)

    def __len__(self) -> int:
        return len(self.split)

    @property
    def lengths(self) -> np.ndarray:
        """The longer of an example's sequences, (n,)."""
        return np.max([tower.lengths for tower in self.split.towers], axis=0)

    def batch(self, indices: np.ndarray, turned: np.ndarray | None = None) -> dict[str, Tensor | None]:
        """Arguments of LRAForSequenceClassification for some examples: ids (B, N) int32, masks (B, N) bool or None, labels (B,) int64.

        turned: the position, of eight, that each picture is brought to, (B,) int64."""
        if self.task.side:
            width = self.task.length
        else:
            longest = int(self.lengths_of(indices).max())
            width = min(-(-longest // self.pad_multiple) * self.pad_multiple, self.task.length)
        chosen = torch.from_numpy(indices).to(self.labels.device, non_blocking=True)
        pixels = torch.arange(width, device=self.labels.device)
        if turned is not None:
            assert self.positions is not None, "only pictures can be turned"
            pixels = self.positions[torch.from_numpy(turned).to(self.labels.device, non_blocking=True)]
        found: dict[str, Tensor | None] = {"labels": self.labels[chosen]}
        for names, (tokens, offsets) in zip((("input_ids", "attention_mask"), ("pair_ids", "pair_mask")), self.towers, strict=False):
            found[names[0]], found[names[1]] = self._gather(tokens, offsets, chosen, pixels)
        return found

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        return np.max([tower.offsets[indices + 1] - tower.offsets[indices] for tower in self.split.towers], axis=0)

    def _gather(self, tokens: Tensor, offsets: Tensor, chosen: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        start, end = offsets[chosen, None], offsets[chosen + 1, None]
        place = start + pixels
        symbols = tokens[place.clamp(max=len(tokens) - 1)]
        if self.task.side and not self.blank_is_padding:
            return symbols.int() + 1, None
        mask = symbols > 0 if self.task.side else place < end
        if self.task.side:
            mask = mask | ~mask.any(1, keepdim=True)
        return torch.where(mask, symbols.int() + 1, 0), mask


def training_order(lengths: np.ndarray, batch_size: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Batch after batch without end, from batch `start`: indices (batch_size,) int64. Every epoch has another order; what does not fill a
    batch is left out of that epoch. Of each 50 batches the examples are sorted by length and the batches shuffled, so that little is
    padding.

    Raises ValueError where the examples do not fill one batch."""
    per_epoch = len(lengths) // batch_size
    if not per_epoch:
        raise ValueError(f"{len(lengths)} examples do not fill a batch of {batch_size}")
    while True:
        epoch, within = divmod(start, per_epoch)
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths))[: per_epoch * batch_size]
        if lengths.min() < lengths.max():
            chunk = batch_size * BATCHES_SORTED_TOGETHER
            parts = [part[np.argsort(lengths[part], kind="stable")] for part in np.split(order, range(chunk, len(order), chunk))]
            order = np.concatenate(parts).reshape(per_epoch, batch_size)[rng.permutation(per_epoch)]
        yield from order.reshape(per_epoch, batch_size)[within:]
        start += per_epoch - within


def evaluation_order(lengths: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Every example once, longest first, so that a batch that does not fit in memory fails at once."""
    order = np.argsort(-lengths, kind="stable")
    yield from np.split(order, range(batch_size, len(order), batch_size))
