"""The normal noise that stands in for dropout: a counter-based stream, so that backward makes it again and nothing is stored.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). One call of it makes four values of one row:
counter (j // 4, n mod 2^32, n // 2^32, b Hq + h) for token n of batch entry b and head h, key (seed mod 2^32, seed // 2^32),
and the four words give, two by two through the Box-Muller transform, the columns j = 4 (j // 4) + 0 .. 3.
"""

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds over 32-bit words held in int64 tensors that broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, yet their low 64 bits are right: the masks below read the two unsigned halves off them
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _WORD) ^ c1 ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def standard_normal(seed: Tensor, batch: int, heads: int, start: int, stop: int, width: int) -> Tensor:
    """psi of tokens start .. stop - 1: float32 (batch, heads, stop - start, width). `seed`: int64, no dimensions."""
    device = seed.device
    column = torch.arange((width + 3) // 4, device=device)
    token = torch.arange(start, stop, device=device)[:, None]
    row = torch.arange(batch * heads, device=device)[:, None, None]
    words = philox((column, token & _WORD, token >> 32, row), (seed & _WORD, (seed >> 32) & _WORD))
    uniform = [((word >> 8).float() + 0.5) * 2.0**-24 for word in words]  # 24 bits: exact in float32, never 0 nor 1
    normals = []
    for radius, angle in (uniform[:2], uniform[2:]):
        length = (-2 * radius.log()).sqrt()
        normals += [length * (2 * math.pi * angle).cos(), length * (2 * math.pi * angle).sin()]
    return torch.stack(normals, -1).flatten(-2)[..., :width].unflatten(0, (batch, heads))


def paper_factor(dropout_p: Tensor, normal: Tensor) -> Tensor:
    """(1 - p) (1 + psi), psi ~ N(0, p): what multiplies the output (Towards Making Linear Attention Usable, eq. 28)."""
    return (1 - dropout_p) * (1 + dropout_p.sqrt() * normal)
