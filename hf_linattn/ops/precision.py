"""Sums and learned numbers are float32, float64 beside float64, under autocast too."""

from collections.abc import Callable
from functools import wraps

import torch


def exact(dtype: torch.dtype) -> torch.dtype:
    """What sums and learned numbers are beside tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_full_precision(kernel: Callable) -> Callable:
    """Autocast has brought the inputs to its dtype before; the sums inside stay float32."""

    @wraps(kernel)
    def run(call, *rest):
        device = call.query.device.type
        if not torch.is_autocast_enabled(device):
            return kernel(call, *rest)
        with torch.autocast(device, enabled=False):
            return kernel(call, *rest)

    return run
