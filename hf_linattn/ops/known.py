"""How calls were launched, kept for those of the same layout: they differ by where their tensors lie, and nothing else is worked out again.

What is kept is numbers, and bytes that nobody writes. So threads share it, and no tensor lives on by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ctypes import Structure
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import device
from .call import Call

# kernels/linattn.h: P are addresses, q is a number that forward leaves to backward, and all else goes by the layout
PROBLEM = Struct("48s P24s P24s P24s PP8s PP16s PPPPP")
FORWARD = Struct("P24s PP")
BACKWARD = Struct("P24s P24s PPP P24s P24s P24s PPPP q")

Layout = tuple[Any, ...]
MOST = 1024


class Known(NamedTuple):
    """A launch without its addresses.

    Attributes:
        run: the library's function.
        problem, results: what stands between the addresses.
        plan: the library's.
        workspace_bytes, segment_length: of the plan.
        keeps: whether the workspace holds what backward takes over.
        out: shape and strides of the output that is made.
    """

    run: Callable[..., int]
    problem: tuple[bytes, ...]
    results: tuple[bytes, ...]
    plan: bytes
    workspace_bytes: int
    keeps: bool
    segment_length: int
    out: tuple[torch.Size, tuple[int, ...]]

    @classmethod
    def of(cls, run: Callable[..., int], problem: Structure, form: Struct, results: Structure, plan: Any, out: Tensor) -> Known:
        between = _between(PROBLEM, problem), _between(form, results), bytes(plan)
        return cls(run, *between, plan.workspace_bytes, plan.kept_bytes > 0, plan.segment_length, (out.shape, out.stride()))

    def launch(self, call: Call, results: bytes) -> tuple[int, Tensor | None]:
        """The library's code, and the workspace, which the plan may have a use for."""
        query, key, value, coefficients, log_decay, query_segments, key_segments, initial_state, dropout_p, seed, *_ = call
        sizes, of_query, of_key, of_value, of_decay, of_segments = self.problem
        on = query.device
        with device.current(on):
            workspace = device.memory(self.workspace_bytes, on)
            problem = PROBLEM.pack(
                sizes, query.data_ptr(), of_query, key.data_ptr(), of_key, value.data_ptr(), of_value, coefficients.data_ptr(),
                at(log_decay), of_decay, at(query_segments), at(key_segments), of_segments, at(initial_state), at(dropout_p), at(seed),
                at(workspace), device.stream(on),
            )  # fmt: skip
            return self.run(problem, results, self.plan), workspace


def at(x: Tensor | None) -> int:
    """Its address, 0 for none."""
    return 0 if x is None else x.data_ptr()


def _between(form: Struct, structure: Structure) -> tuple[bytes, ...]:
    return tuple(x for x in form.unpack(bytes(structure)) if isinstance(x, bytes))


def layout(tensors: Iterable[Tensor | None], *others: Any) -> Layout:
    """All that a launch goes by but where its tensors lie; of that, whether rows begin on 16 bytes."""
    facts = [x if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in tensors]
    return *facts, others


class Launches(dict[Layout, Known]):
    """So many of them, then all are forgotten."""

    def keep(self, layout: Layout, known: Known) -> None:
        if torch._C._get_tracing_state():  # to torch.jit.trace sizes are tensors
            return
        if len(self) >= MOST:
            self.clear()
        self[layout] = known
