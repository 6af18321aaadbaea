"""Fewer features: f of the cosine between learned projections of query and key, the key taken about a learned centre.

A state of the second degree has D + 1 + D (D + 1) / 2 rows, so that r of D features make it (D / r)^2 times smaller (Based, arXiv
2402.18668). Keys of a language model share a large mean, which tells nothing apart: the centre takes it away.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .form import Call, Numbers, Sizes

QUERY, KEY, CENTER = "query_projection", "key_projection", "key_center"


def shapes(sizes: Sizes, features: int) -> dict[str, tuple[int, ...]]:
    """Of the matrices: (Hq, D, r), (Hk, D, r), (Hk, D)."""
    return {
        QUERY: (sizes.query_heads, sizes.head_dim, features),
        KEY: (sizes.key_heads, sizes.head_dim, features),
        CENTER: (sizes.key_heads, sizes.head_dim),
    }


def start(name: str, shape: tuple[int, ...]) -> Tensor:
    """Where a matrix starts, float32: the centre at 0, and one random orthonormal basis for queries and keys of all heads.

    In such a basis q.k is kept on average, whatever the order in which rotary embedding lays out its pairs. The values are rounded to
    what bfloat16 holds, so that a checkpoint of any dtype starts from the same ones.
    """
    if name == CENTER:
        return torch.zeros(shape, device="cpu")
    heads, head_dim, features = shape
    random = torch.randn(head_dim, head_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    return torch.linalg.qr(random)[0][:, :features].bfloat16().float().expand(heads, -1, -1)


def projected(call: Call, numbers: Numbers) -> tuple[Call, Numbers]:
    """The call with projected queries and keys, and the numbers that are left; both as they are where nothing is projected."""
    if QUERY not in numbers:
        return call, numbers
    query_projection, key_projection, center = (numbers[name].to(call.query.dtype) for name in (QUERY, KEY, CENTER))
    query, key = call.query @ query_projection, (call.key - center[:, None]) @ key_projection
    rest = {name: number for name, number in numbers.items() if name not in (QUERY, KEY, CENTER)}
    return dataclasses.replace(call, query=query, key=key), rest
