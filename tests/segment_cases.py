"""Segments of every kind, and the runs that are made of them, said in words."""

from collections.abc import Iterator

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8)


def segment_cases(batch: int, length: int) -> Iterator[Tensor]:
    """(batch, length): packed, and padded on either side, all over and between; integers of every kind, masks, and strange strides."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.arange(length)
    random = lambda: torch.rand(batch, length, generator=generator)  # noqa: E731
    packed = (random() < 4 / length).int().cumsum(-1)
    kept = (tokens >= length // 2, tokens < length // 2, tokens >= length - 1, tokens < 0, random() < 0.7, tokens >= 0)
    for i, real in enumerate(kept):
        ids = (packed + i % 3) * real
        for dtype in INTEGERS:
            yield ids.to(dtype)
        yield ids.t().contiguous().t()
        yield ids[:1].expand(batch, -1)
        yield ids > 0


def said_in_words(ids: Tensor) -> list[list[int]]:
    """A token is of the run of its number; padding of that before it, or else of the first to come; 1 where there is no token at all."""
    rows = []
    for row in ids.int().tolist():
        run, runs = next((number for number in row if number > 0), 1), []
        for number in row:
            run = number or run
            runs.append(number or -run)
        rows.append(runs)
    return rows
