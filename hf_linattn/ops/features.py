"""f(s) = a + b s + c s^2 as an inner product of features: what lets a running sum stand for all earlier keys.

    f(q.k) = phi(q) . psi(k)      psi(k) = [k, 1, k_i k_j for i <= j]      phi(q) = [b q, a, c m_ij q_i q_j]

m_ij is 2 off the diagonal, where the pair stands for (i, j) and (j, i), and 1 on it. Degree 1 stops before the pairs. a, b, c and the
temperature (inside q) live on the query's side only, so that query heads with their own share the state of one key head.
"""

from functools import lru_cache

import torch
from torch import Tensor


def feature_count(head_dim: int, degree: int) -> int:
    """D + 1 for degree 1, D + 1 + D (D + 1) / 2 for degree 2."""
    return head_dim + 1 + (head_dim * (head_dim + 1) // 2 if degree == 2 else 0)


@lru_cache(maxsize=64)
def _pairs(head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    first, second = torch.triu_indices(head_dim, head_dim, device=device)
    return first, second, torch.where(first == second, 1, 2).to(dtype)


def key_features(key: Tensor, degree: int) -> Tensor:
    """psi(k): (..., D) to (..., F)."""
    parts = [key, torch.ones_like(key[..., :1])]
    if degree == 2:
        first, second, _ = _pairs(key.shape[-1], key.device, key.dtype)
        parts.append(key[..., first] * key[..., second])
    return torch.cat(parts, -1)


def key_features_backward(grad: Tensor, key: Tensor, degree: int) -> Tensor:
    """The gradient of `key` from that of `key_features(key)`."""
    dim = key.shape[-1]
    grad_key = grad[..., :dim].clone()
    if degree == 2:
        first, second, _ = _pairs(dim, key.device, key.dtype)
        pairs = grad[..., dim + 1 :]
        grad_key.index_add_(-1, first, pairs * key[..., second])
        grad_key.index_add_(-1, second, pairs * key[..., first])
    return grad_key


def query_features(query: Tensor, a: Tensor, b: Tensor, c: Tensor, degree: int) -> Tensor:
    """phi(q): (..., D) to (..., F); a, b, c broadcast against (..., 1)."""
    parts = [b * query, a.expand_as(query[..., :1])]
    if degree == 2:
        first, second, multiplicity = _pairs(query.shape[-1], query.device, query.dtype)
        parts.append(c * multiplicity * query[..., first] * query[..., second])
    return torch.cat(parts, -1)


def query_features_backward(grad: Tensor, query: Tensor, b: Tensor, c: Tensor, degree: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query (..., D) and, one a row (...), of a, b and c, from that of `query_features`."""
    dim = query.shape[-1]
    linear, grad_a = grad[..., :dim], grad[..., dim]
    grad_query, grad_b = b * linear, (linear * query).sum(-1)
    if degree == 1:
        return grad_query, grad_a, grad_b, torch.zeros_like(grad_b)
    first, second, multiplicity = _pairs(dim, query.device, query.dtype)
    pairs = grad[..., dim + 1 :] * multiplicity
    grad_c = (pairs * query[..., first] * query[..., second]).sum(-1)
    grad_query.index_add_(-1, first, c * pairs * query[..., second])
    grad_query.index_add_(-1, second, c * pairs * query[..., first])
    return grad_query, grad_a, grad_b, grad_c
