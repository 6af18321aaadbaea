"""How attention is timed on a GPU: medians of graph replays and of eager calls, beside the memory traffic that no kernel can avoid.

That traffic is q, k, v and o forward, and once more q, k, v, o, dO and the three gradients backward. Inputs come in several random sets,
which together outgrow the cache; times are of CUDA events.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]
Form = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs to time a form on: (B, H, N, D), and how keys differ from queries and values."""

    shape: Shape
    key_heads: int | None = None
    features: int | None = None  # the dim of queries and keys, where it is not that of values
    dtype: torch.dtype = torch.bfloat16

    def sizes(self) -> list[Shape]:
        """Of q, k, v and o."""
        batch, heads, length, dim = self.shape
        few, narrow = self.key_heads or heads, self.features or dim
        return [(batch, h, length, d) for h, d in ((heads, narrow), (few, narrow), (few, dim), (heads, dim))]

    def bytes_of(self, shape: Shape) -> int:
        batch, heads, length, dim = shape
        return self.dtype.itemsize * batch * heads * length * dim

    def floors_ms(self, bandwidth: float) -> tuple[float, float]:
        """Forward, and forward+backward, at `bandwidth` GB/s."""
        forward = sum(map(self.bytes_of, self.sizes())) / bandwidth / 1e6
        return forward, 3 * forward

    def sets(self, layout: str = "bhnd") -> list[tuple[list[Tensor], Tensor]]:
        """Sets of (q, k, v), dO, as many as outgrow the L2 cache; "bhnd", or "bnhd" as Transformers and FLA lay them out."""

        def made(shape: Shape) -> Tensor:
            batch, heads, length, dim = shape
            if layout == "bnhd":
                return torch.randn(batch, length, heads, dim, device="cuda", dtype=self.dtype).transpose(1, 2)
            return torch.randn(shape, device="cuda", dtype=self.dtype)

        *leaves, out = self.sizes()
        count = max(1, min(4, int(4e8 / self.bytes_of(out)) + 1))
        return [([made(size).requires_grad_() for size in leaves], made(out)) for _ in range(count)]


def median_ms(runs: list[Callable[[], object]], seconds: float = 0.25) -> float:
    """Median milliseconds of one call, the calls taken in turn so that their inputs rotate."""
    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    runs[-1]()
    torch.cuda.synchronize()
    repeats = max(3, min(50, int(seconds / (time.perf_counter() - start))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (before, after) in enumerate(events):
        before.record()
        runs[i % len(runs)]()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph, so that what the host does between kernels is not timed; `run` itself where it cannot be captured."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


def copy_gigabytes_per_second() -> float:
    """Device-to-device copy, bytes read plus bytes written."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / median_ms([lambda: target.copy_(source)]) / 1e6


def forward(form: Form, leaves: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return form(*leaves)


def both(form: Form, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(form(*leaves), leaves, grad)


def timed(name: str, runs: list[Callable[[], object]], floor_ms: float) -> dict[str, float]:
    """Eager calls first: what compiles or is tuned at its first call does so outside of a graph. Calls that take long are not captured."""
    eager_ms = median_ms(runs)
    if eager_ms > 100:
        return {f"{name}_ms": eager_ms, f"{name}_floors": eager_ms / floor_ms, f"{name}_eager_ms": eager_ms}
    replayed = [captured(run) for run in runs]
    ms = median_ms(replayed)
    graphs = {} if replayed != runs else {f"{name}_not_captured": True}
    return {f"{name}_ms": ms, f"{name}_floors": ms / floor_ms, f"{name}_eager_ms": eager_ms, **graphs}


def peak_tensors(form: Form, case: Case, leaves: list[Tensor], grad: Tensor) -> float:
    """The peak of what forward and backward add, in tensors of the case's shape."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both(form, leaves, grad)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / case.bytes_of(case.shape)


Sets = list[tuple[list[Tensor], Tensor]]


def forward_figures(form: Form, case: Case, sets: Sets, bandwidth: float) -> dict[str, float]:
    return timed("forward", [partial(forward, form, leaves) for leaves, _ in sets], case.floors_ms(bandwidth)[0])


def both_figures(form: Form, case: Case, sets: Sets, bandwidth: float) -> dict[str, float]:
    times = timed("both", [partial(both, form, leaves, grad) for leaves, grad in sets], case.floors_ms(bandwidth)[1])
    return times | {"peak_tensors": peak_tensors(form, case, *sets[0])}


def measure(form: Form, case: Case, bandwidth: float) -> dict[str, float]:
    """Times forward and forward+backward, as multiples of their floors too, and the peak of what the latter adds."""
    sets = case.sets()
    return forward_figures(form, case, sets, bandwidth) | both_figures(form, case, sets, bandwidth)


def refusal(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:160]}"


def guarded(form: Form, case: Case, bandwidth: float, layout: str = "bhnd", backward: bool = True) -> dict[str, float | str]:
    """The same of a peer: what it raises is its answer too, and stands where its times would."""
    row: dict[str, float | str] = {}
    sets = case.sets(layout)
    for name, figures in ({"forward": forward_figures} | ({"both": both_figures} if backward else {})).items():
        try:
            row |= figures(form, case, sets, bandwidth)
        except Exception as problem:
            row[f"{name}_refused"] = refusal(problem)
            break
    torch.cuda.empty_cache()
    return row
