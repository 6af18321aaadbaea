"""Sums stay float32 under autocast."""

from collections.abc import Callable
from functools import wraps

import torch


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
