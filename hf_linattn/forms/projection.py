"""Fewer features: f of the cosine between learned projections of query and key, the key taken about a learned centre.

A state of the second degree has D + 1 + D (D + 1) / 2 rows, so that r of D features make it (D / r)^2 times smaller (Based, arXiv
2402.18668). Keys of a language model share a large mean, which tells nothing apart: the centre takes it away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.beside import of_each_head
from .form import Call, Numbers, Sizes
from .kept import once
from .seen import Seen

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


def fitted(seen: Seen, groups: int, features: int) -> dict[str, Tensor]:
    """The matrices that keep q.k best: the rank-r form of the least mean squared error over independent queries and keys.

    E (q^T (I - A B^T) k)^2 = |C_q^1/2 (I - A B^T) C_k^1/2|^2 with the second moments C, so that A B^T is the truncated singular value
    decomposition of C_q^1/2 C_k^1/2 between the inverse roots; each takes the root of the singular values. Query heads of a group share
    the mean of their moments, and so a key head's features.
    """
    moment = seen.query_moment.unflatten(0, (-1, groups)).mean(1)
    (query_root, query_inverse), (key_root, key_inverse) = _roots(moment), _roots(seen.key_moment)
    left, values, right = torch.linalg.svd(query_root @ key_root)
    scale = values[:, None, :features].sqrt()
    query = query_inverse @ left[:, :, :features] * scale
    key = key_inverse @ right.mT[:, :, :features] * scale
    return {QUERY: query.repeat_interleave(groups, 0), KEY: key, CENTER: seen.key_mean}


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of symmetric matrices (H, D, D), and its inverse with directions that nothing lies in left out."""
    values, vectors = torch.linalg.eigh(moment)
    roots = values.clamp(min=0).sqrt()
    small = roots <= 1e-6 * roots.amax(-1, keepdim=True)
    inverse = torch.where(small, 0, 1 / roots.masked_fill(small, 1))
    return (vectors * roots[:, None]) @ vectors.mT, (vectors * inverse[:, None]) @ vectors.mT


def matrices_in(dtype: torch.dtype, numbers: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices in the dtype of queries, the centre as a row of keys."""
    return numbers[QUERY].to(dtype), numbers[KEY].to(dtype), numbers[CENTER].to(dtype)[:, None]


def projected(call: Call, numbers: Numbers) -> tuple[Call, Numbers]:
    """The call with projected queries and keys, and the numbers that are left; both as they are where nothing is projected."""
    if QUERY not in numbers:
        return call, numbers
    of_query, of_key, center = once(call.made, ("projections", call.query.dtype), lambda: matrices_in(call.query.dtype, numbers))
    query, key = of_each_head(call.query, of_query), of_each_head(call.key - center, of_key)
    rest = {name: number for name, number in numbers.items() if name not in (QUERY, KEY, CENTER)}
    return call._replace(query=query, key=key), rest
