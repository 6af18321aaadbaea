"""What generating costs: bytes of the cache and time of a token, by length, and from which length on a student's cache is the smaller."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_linattn.forms.kept import Kept

STEPS = 24
"""Tokens whose time is taken."""
QUIET = 2
"""On an idle machine nine tokens in ten take no more than so many times what the fastest takes, and one model of a form no more
than another."""


@torch.no_grad()
def measure_costs(model: Any, lengths: Sequence[int]) -> dict[str, Any]:
    """For one sequence of each length, ``by_length``: ``cache_bytes`` that are held then, and the time of one more token, of ``STEPS``.

    ``ms`` is the median, ``ms_spread`` the fastest and what nine tokens in ten do not exceed.
    """
    return {"by_length": [{"length": length, **_at(model, length)} for length in lengths]}


def break_even(student: dict[str, Any], teacher: dict[str, Any]) -> int | None:
    """The least length at which the student's cache is no larger than the teacher's, by lines through the two longest measured lengths.

    Returns:
        None where it never is, or where fewer than two lengths were measured.
    """
    lines = [_line(found["by_length"]) for found in (student, teacher)]
    if None in lines:
        return None
    (start, slope), (start_of_teacher, slope_of_teacher) = lines  # type: ignore[misc]
    if start <= start_of_teacher and slope <= slope_of_teacher:
        return 0
    if slope >= slope_of_teacher:
        return None
    return max(-int(-(start - start_of_teacher) // (slope_of_teacher - slope)), 0)


def is_spread(at: dict[str, Any]) -> bool:
    """Whether times of a token lie so far apart that other work must have been under way on the machine."""
    fastest, slow = at.get("ms_spread", (at["ms"], at["ms"]))
    return bool(slow > QUIET * fastest)


def held_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache holds, however deep, but those that are made of the model alone; each once."""
    tensors = {id(tensor): tensor for tensor in _tensors(getattr(cache, "layers", cache), set())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _at(model: Any, length: int) -> dict[str, Any]:
    ids = (torch.arange(length, device=model.device) % model.get_input_embeddings().weight.shape[0])[None]  # whatever they say
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    size, times = held_bytes(cache), []
    for _ in range(STEPS):
        began = time.perf_counter()
        cache = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).past_key_values
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        times.append(time.perf_counter() - began)
    fastest, slow = min(times), sorted(times)[STEPS * 9 // 10]
    return {"cache_bytes": size, "ms": _ms(statistics.median(times)), "ms_spread": [_ms(fastest), _ms(slow)]}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _line(by_length: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Where the line through the two longest begins, and its slope, in bytes and bytes a token."""
    if len(by_length) < 2:
        return None
    first, last = by_length[-2:]
    slope = (last["cache_bytes"] - first["cache_bytes"]) / (last["length"] - first["length"])
    return last["cache_bytes"] - slope * last["length"], slope


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen or isinstance(value, torch.nn.Module | Kept):  # a model, and what its numbers come to
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part, seen)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(vars(value), seen)
