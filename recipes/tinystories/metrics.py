"""How well a model predicts text, as a metric of the `evaluate` library that needs no network."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import numpy as np


class Prediction(evaluate.Metric):
    """Nats a token and bits a byte over texts, each given as (nats, tokens, bytes) in total.

    `compute` returns nats_per_token, bits_per_byte, perplexity, and nats_per_token_error: the standard error of the first, the texts being
    the sample (a ratio's, by linearisation).
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"nats": datasets.Value("float64"), "tokens": datasets.Value("int64"), "bytes": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="Cross-entropy of a language model on texts.",
            citation="",
            inputs_description="nats, tokens and bytes: one number each a text",
            features=datasets.Features(features),
        )

    def _compute(self, nats: Any, tokens: Any, bytes: Any) -> dict[str, float]:
        loss, count = np.asarray(nats, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        mean = loss.sum() / count.sum()
        spread = np.std(loss - mean * count, ddof=1) if len(loss) > 1 else 0.0
        return {
            "nats_per_token": float(mean),
            "nats_per_token_error": float(spread * math.sqrt(len(loss)) / count.sum()),
            "bits_per_byte": float(loss.sum() / math.log(2) / np.sum(bytes)),
            "perplexity": float(math.exp(min(mean, 700.0))),
        }
