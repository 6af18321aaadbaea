"""A decay in the one form that the operators take."""

import torch
from torch import Tensor

from . import checks


def canonical_decay(log_decay: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """float32 (float64 beside float64); raises where it does not fit."""
    checks.check_decay(log_decay, query.shape[0], query.shape[1], key.shape[1], key.shape[2])
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return log_decay if log_decay.dtype == dtype else log_decay.to(dtype)


def without_padding(rate: Tensor, segments: Tensor) -> Tensor:
    """(B, H, N), 0 at padding: a padded row decays as it does without its padding."""
    rate = rate[None, :, None].expand(len(segments), -1, segments.shape[1]) if rate.dim() == 1 else rate
    return rate.masked_fill((segments <= 0)[:, None], 0)
