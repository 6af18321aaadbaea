"""Rows of equal length out of a file of tokens, in an order that depends on seed and step alone: a resumed run goes on with the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from recipes.common.errors import RecipeError
from recipes.common.tokens import Tokens


class Windows:
    """The text cut every `length` tokens; what is left at the end is dropped.

    Args:
        length: tokens a row.
        separate: whether documents that share a row are hidden from one another.
        chosen: numbers of the rows that belong to it, (n,); None: all.

    Raises:
        RecipeError: the text is shorter than one row.
    """

    def __init__(self, tokens: Tokens, length: int, separate: bool = False, chosen: np.ndarray | None = None) -> None:
        self.tokens, self.length, self.separate = tokens, length, separate
        if len(tokens) < length:
            raise RecipeError(
                f"the text is {len(tokens)} tokens, shorter than one sequence of {length}; give more text or a smaller length"
            )
        self.chosen = np.arange(len(tokens) // length) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows by their index, (B, N) int64."""
        table = self.tokens.ids[: len(self.tokens) // self.length * self.length].reshape(-1, self.length)
        return table[self.chosen[indices]].astype(np.int64)

    def batch(self, indices: np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What a model is given: input_ids (B, N) int64 and, with `separate`, position_ids (B, N) that restart at every document.

        Positions that restart tell the attention that the documents are separate: none sees another.
        """
        return on_device(self.rows(indices), device, self.tokens.start if self.separate else None)


def on_device(rows: np.ndarray, device: torch.device | str, start: int | None) -> dict[str, Tensor]:
    """Rows (B, N) as a batch; with `start`, the token in front of every document, positions restart there."""
    ids = torch.from_numpy(rows)
    if torch.device(device).type == "cuda":
        ids = ids.pin_memory().to(device, non_blocking=True)  # an ordinary copy would wait for the steps before
    if start is None:
        return {"input_ids": ids}
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    first = torch.where(ids == start, position, 0).cummax(dim=1).values
    return {"input_ids": ids, "position_ids": position - first}


def training_order(size: int, batch: int, seed: int, begin: int = 0) -> Iterator[np.ndarray]:
    """Batch after batch without end, from number `begin`: indices below `size`, (batch,) int64. Every epoch has another order, and leaves
    out what does not fill a batch.

    Raises:
        ValueError: `size` does not fill one.
    """
    if size < batch:
        raise ValueError(f"{size} rows do not fill a batch of {batch}")
    epoch, within = divmod(begin, size // batch)
    while True:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).numpy()
        for number in range(within, size // batch):
            yield order[number * batch : (number + 1) * batch]
        epoch, within = epoch + 1, 0


def own_batches(count: int, batch: int, process: int, processes: int) -> Iterator[tuple[np.ndarray, int]]:
    """This process's batches of rows 0 to count - 1: their indices, and how many of them count.

    Every process gets as many batches, since all take part in the computation of each; a row that stands in for none counts nothing.
    """
    for begin in range(0, count, batch * processes):
        own = np.arange(begin + process * batch, begin + (process + 1) * batch)
        counted = int(np.clip(count - own[0], 0, batch))
        yield (own[:counted], counted) if counted else (np.zeros(1, dtype=np.int64), 0)
