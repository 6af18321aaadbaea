"""A call with its rows copied to wider, aligned ones, zeros behind: the same scores, norms, sums and gradients, for kernels that are
fast at a few head dims. When that is done, `kernels/padded.h` says; `cuda` does it.

States are of the first degree here, (D + 1, Dv + 1). Their last row is that of the one in psi = [k, 1] and their last column the mass,
so zeros stand ahead of those.
"""

import torch
from torch import Size, Tensor

from .call import Call


def copy_rows(to: Tensor, rows: Tensor) -> Tensor:
    """`to`, which becomes `rows`: by eight bytes at a time where rows are made of those, which takes fewer steps than numbers of two."""
    each = 8 // rows.element_size()
    starts = [at for x in (to, rows) for at in (x.data_ptr() // x.element_size(), x.storage_offset(), *x.stride()[:-1], x.shape[-1])]
    if to.stride(-1) == rows.stride(-1) == 1 and not any(at % each for at in starts):
        to.view(torch.int64).copy_(rows.view(torch.int64))
        return to
    return to.copy_(rows)


def padded_rows(x: Tensor, dim: int) -> Tensor:
    """x (..., D) as (..., dim); x itself where it is that already, with rows that begin on 16 bytes."""
    begins = (x.data_ptr(), *(x.element_size() * stride for stride in x.stride()[:-1]))
    if x.shape[-1] == dim and x.stride(-1) == 1 and not any(begin % 16 for begin in begins):
        return x
    wide = x.new_zeros(*x.shape[:-1], dim)
    copy_rows(wide[..., : x.shape[-1]], x)
    return wide


def padded_state(state: Tensor | None, dim: int) -> Tensor | None:
    """(..., D + 1, Dv + 1) as (..., dim + 1, dim + 1)."""
    if state is None:
        return None
    for axis in (-2, -1):
        body, last = state.split([state.shape[axis] - 1, 1], axis)
        shape = list(state.shape)
        shape[axis] = dim + 1 - state.shape[axis]
        state = torch.cat([body, state.new_zeros(shape), last], axis)
    return state


def state_without_padding(state: Tensor | None, shape: Size | tuple[int, ...]) -> Tensor | None:
    """A padded state, or its gradient, as one of that shape."""
    if state is None:
        return None
    for axis in (-2, -1):
        state = torch.cat([state.narrow(axis, 0, shape[axis] - 1), state.narrow(axis, -1, 1)], axis)
    return state


def padded_call(call: Call, dim: int) -> Call:
    query, key, value = (padded_rows(x, dim) for x in (call.query, call.key, call.value))
    return call._replace(query=query, key=key, value=value, initial_state=padded_state(call.initial_state, dim))
