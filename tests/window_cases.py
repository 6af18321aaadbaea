"""Inputs of attention over a window."""

import torch


def make_tensors(length, batch=2, heads=4, key_heads=2, head_dim=8, value_dim=6, *, dtype=torch.float64, seed=0, device="cpu", grad=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, head_dim), (key_heads, head_dim), (key_heads, value_dim)
    tensors = [torch.randn(batch, h, length, d, generator=generator, dtype=torch.float64) for h, d in shapes]
    return [x.to(device, dtype).requires_grad_(grad) for x in tensors]
