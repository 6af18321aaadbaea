"""How many threads PyTorch computes with, in words."""

from __future__ import annotations

import torch


def threads() -> str:
    """ "1 thread", "2 threads"."""
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}"
