"""How well a model predicts held-out text, and how near it is to its teacher, by position in the row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convert.evaluation.text import Rows

EDGES = (0, 64, 256)
"""Where spans of positions begin; from 512 on each is as long as all before it."""


@torch.no_grad()
def measure_loss(model: Any, teacher: Any | None, rows: Rows, batch: int) -> dict[str, Any]:
    """Cross-entropy and bits a byte and, beside a teacher, KL(teacher, model) and how often both find the same token likeliest.

    Teacher and model see each batch one after the other, and are compared row by row in float32, so that the logits of one batch of each
    are the most there is in memory. Every token but a row's first is predicted.

    Args:
        model: what is measured, on its device.
        teacher: None: the model is the teacher.
        rows: of text.
        batch: rows at a time.

    Returns:
        ``nats`` and ``kl`` a token, ``agreement`` in [0, 1], each with the standard error of rows as ``..._error``; ``bits_per_byte``;
        ``tokens``; ``row_nats`` for comparing two models row by row; ``by_position`` with spans ``from`` to ``to`` (not included) of the
        number of tokens before the one predicted.
    """
    found: dict[str, list[Tensor]] = {"nats": [], "kl": [], "agreement": []}
    for together in rows.ids.split(batch):
        ids = together.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        truth = None if teacher is None else teacher(input_ids=ids, use_cache=False).logits
        for index, row in enumerate(ids):
            for key, one in _of_row(logits[index], None if truth is None else truth[index], row).items():
                found[key].append(one.double().cpu())
    values = {key: torch.stack(parts) for key, parts in found.items() if parts}
    out: dict[str, Any] = {"text": rows.name, "tokens": values["nats"].numel(), "row_nats": values["nats"].mean(1).tolist()}
    for key, each in values.items():
        out[key], out[f"{key}_error"] = each.mean().item(), standard_error(each.mean(1).tolist())
    out["bits_per_byte"] = values["nats"].sum().item() / math.log(2) / max(sum(rows.nbytes), 1)
    spans = _spans(rows.ids.shape[1])
    out["by_position"] = [
        {"from": low, "to": high, **{key: each[:, max(low - 1, 0) : high - 1].mean().item() for key, each in values.items()}}
        for low, high in spans
    ]
    return out


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 for one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _of_row(logits: Tensor, truth: Tensor | None, ids: Tensor) -> dict[str, Tensor]:
    """By predicted token, (N - 1,) each; logits (N, V)."""
    log_p = logits[:-1].float().log_softmax(-1)
    found = {"nats": -log_p.gather(1, ids[1:, None])[:, 0]}
    if truth is not None:
        log_t = truth[:-1].float().log_softmax(-1)
        found["kl"] = (log_t.exp() * (log_t - log_p)).sum(-1)
        found["agreement"] = (log_t.argmax(-1) == log_p.argmax(-1)).float()
    return found


def _spans(length: int) -> list[tuple[int, int]]:
    """(0, 64), (64, 256), (256, 512), (512, 1024) ... up to ``length``."""
    edges = [*EDGES, *(2**k for k in range(9, 40))]
    edges = [edge for edge in edges if edge < length] + [length]
    # A row's first token is not predicted, so a span must hold a position from 1 on.
    return [(low, high) for low, high in zip(edges, edges[1:], strict=False) if high > 1]
