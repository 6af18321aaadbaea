"""A learned feature map: weights phi(q).phi(k) of phi(x) = softmax([W x, -W x]), W a matrix of each head (Hedgehog, arXiv 2402.04347).

A softmax is positive, and so is each weight, whatever W is. There is no f beside it: W takes the place of its coefficients, of the
temperature and of unit length, and phi(q).phi(k) alone can be as spiky as softmax attention, which f of a cosine cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.beside import softmax_features
from .form import Call, Numbers, Sizes
from .kept import once

CHOICES = ("none", "hedgehog")
QUERY, KEY = "query_map", "key_map"
WEIGHTS: Numbers = {"a": 0.0, "b": 1.0, "c": 0.0, "temperature": 1.0, "normalize_qk": False}
"""Of the operators: the inner product of features, as it is."""
OF_F = {"kernel": "linear", "a": 1.0, "b": 1.0, "c": 0.0, "temperature": 1.0, "normalize_qk": True, "features": None}
"""Options that a feature map knows nothing of, where they are not given."""


def refuse_of_f(options: Any) -> None:
    """Raises ValueError where something of f is asked for beside a feature map, which has no f."""
    for name, unset in OF_F.items():
        if (given := getattr(options, name)) != unset:
            raise ValueError(
                f"linattn option {name}={given!r} is of f(s), and feature_map={options.feature_map!r} has features in the place of f; "
                "leave one of them out."
            )


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Of the matrices: (Hq, D, D), (Hk, D, D)."""
    return {name: (heads, sizes.head_dim, sizes.head_dim) for name, heads in ((QUERY, sizes.query_heads), (KEY, sizes.key_heads))}


def start(shape: tuple[int, ...]) -> Tensor:
    """Where a matrix starts: the identity."""
    return torch.eye(shape[-1], device="cpu").expand(shape)


def matrices_in(dtype: torch.dtype, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """The matrices in the dtype of queries."""
    return numbers[QUERY].to(dtype), numbers[KEY].to(dtype)


def mapped(call: Call, numbers: Numbers) -> tuple[Call, Numbers]:
    """The call with the features of queries and keys, and the numbers to weigh them with; both as they are where there is no map."""
    if QUERY not in numbers:
        return call, numbers
    dtype = call.query.dtype
    of_query, of_key = once(call.made, ("maps", dtype), lambda: matrices_in(dtype, numbers))
    rest = {name: number for name, number in numbers.items() if name not in (QUERY, KEY)}
    return call._replace(query=softmax_features(call.query, of_query), key=softmax_features(call.key, of_key)), rest | WEIGHTS
