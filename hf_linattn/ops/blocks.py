"""W queries at a time against the keys that they see: the window, block by block, in plain PyTorch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .frame import Frame

# Without cuDNN: a training went wrong with it where the incoming gradient lay in memory otherwise than the output (torch 2.11, H200); that
# was not looked into further.
TRUSTED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(query: Tensor, frame: Frame, scaling: float | None) -> Tensor:
    """(B, Hq, N, Dv) for queries (B, Hq, N, D) that lie as the frame's new tokens do."""
    batch, heads, length, _ = query.shape
    size = min(frame.window, length)
    count = -(-length // size)
    rest = count * size - length
    groups = heads // frame.key.shape[1]
    mask = _visible(frame, size, count, rest)
    # one mask for all sequences: blocks are the batch, and sequences are heads; else blocks of sequences are the batch
    is_common = mask.shape[0] == 1
    place = (lambda x: x.movedim(2, 0)) if is_common else (lambda x: x.transpose(1, 2))  # of (B, heads, blocks, ...)
    rows = F.pad(query, (0, 0, 0, rest)).unflatten(2, (count, size)).unflatten(1, (-1, groups)).transpose(2, 3)
    columns = torch.arange(count, device=query.device) * size + max(frame.front - 1, 0)
    keys, values = (
        torch.cat([place(part) for part in (sink, *_blocks(F.pad(x, (0, 0, 0, rest)), 2, size, count))], 3)
        for sink, x in zip(frame.sinks_of(columns), (frame.key, frame.value), strict=True)
    )
    fold = (lambda x: x.flatten(1, 2)) if is_common else (lambda x: x.flatten(0, 1))
    mask = mask.repeat(1, 1, groups, 1).flatten(0, 1)[:, None]
    out = sdpa(fold(place(rows).flatten(3, 4)), fold(keys), fold(values), mask, scaling)
    out = out.unflatten(1, (batch, -1)).transpose(0, 1) if is_common else out.unflatten(0, (batch, -1))
    out = out.unflatten(3, (groups, size)).permute(0, 1, 4, 2, 3, 5)  # (B, blocks, W, Hk, r, Dv), as Transformers wants it in memory
    return out.reshape(batch, count * size, heads, -1)[:, :length].transpose(1, 2)


def _blocks(x: Tensor, dim: int, size: int, count: int) -> list[Tensor]:
    """Dimension `dim` as `count` blocks of `size`, and the block ahead of each in front; as it is where there is one."""
    if count == 1:
        return [x.unsqueeze(dim)]
    blocks = x.unflatten(dim, (count + 1, size))
    return [blocks.narrow(dim, 0, count), blocks.narrow(dim, 1, count)]


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """scaled_dot_product_attention by the kernels whose gradients are trusted."""
    if torch.compiler.is_compiling():
        with sdpa_kernel(TRUSTED) if query.is_cuda else nullcontext():
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    was_enabled = query.is_cuda and torch.backends.cuda.cudnn_sdp_enabled()
    if was_enabled:  # by hand, for the context takes longer than all else here
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    finally:
        if was_enabled:
            torch.backends.cuda.enable_cudnn_sdp(True)


def _visible(frame: Frame, size: int, count: int, rest: int) -> Tensor:
    """Which of its S sinks and `front + size` keys each query sees, bool (1 or B, blocks, size, S + front + size); itself always."""
    front, window, device = frame.front, frame.window, frame.key.device
    first = (torch.arange(count, device=device) * size)[:, None, None]
    rows, columns = first + torch.arange(size, device=device)[:, None], first + torch.arange(front + size, device=device) - front
    near = (columns <= rows) & (columns > rows - window)
    sinks = torch.arange(frame.sinks, device=device)
    if frame.runs is None:
        return torch.cat([sinks <= rows - window, near & (columns >= 0)], -1)[None]
    runs = F.pad(frame.runs, (0, rest))
    row_runs = runs[:, front:].unflatten(1, (count, size))[..., None]
    is_token = row_runs > 0
    # where a query's sequence began before its window, it did so before its block: the last column before the block belongs to it
    lead = runs[:, first + max(front - 1, 0)]
    number = F.pad(frame.number[:, front:], (0, rest)).unflatten(1, (count, size))[..., None]
    far = (sinks <= number - window) & (row_runs == lead) & is_token
    same = (row_runs == torch.cat(_blocks(runs, 1, size, count), -1)[:, :, None]) & is_token
    return torch.cat([far, (near & same) | (columns == rows)], -1)
