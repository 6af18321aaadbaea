"""Accuracy as a metric of the `evaluate` library that needs no network; `evaluate.load("accuracy")` would fetch its code."""

from __future__ import annotations

from typing import Any

import numpy as np


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """The share of predictions, integers (n,), that equal their reference; the same number by NumPy where `evaluate` is not installed."""
    try:
        metric = metric_class()()
    except ImportError:
        return float(np.mean(predictions == references))
    return metric.compute(predictions=predictions.tolist(), references=references.tolist())["accuracy"]


def metric_class() -> type[Any]:
    """The metric as a class of `evaluate`. Raises ImportError where evaluate is not installed."""
    import datasets
    import evaluate

    class Accuracy(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            return evaluate.MetricInfo(
                description="The share of predictions that equal their reference.",
                citation="",
                inputs_description="predictions and references: one class each an example",
                features=datasets.Features(features),
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
            return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}

    return Accuracy
