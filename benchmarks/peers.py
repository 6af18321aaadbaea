"""Other people's kernels beside ours, where their packages are installed: one function a library, which names what it offers.

    pip install fla-core einops helion flashinfer-python
    export HELION_EXAMPLES=<a checkout of pytorch/helion>/examples/linear

None computes just what ours does: they do not normalise where that is not said, and FlashInfer's is the gated delta rule. A library runs in
a process of its own (peer_rows.py), so that what it sets, tunes or breaks there is not ours.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from gpu_timing import Form, Shape
from torch import Tensor

Step = Callable[[Tensor], object]
SHORT: tuple[Shape, ...] = ((8, 32, 2048, 64), (8, 16, 2048, 128))  # for what compiles anew for each shape
WIDE: tuple[Shape, ...] = ((8, 16, 2048, 128), (1, 16, 65536, 128))  # for what takes D = 128 alone
TUNED = (*SHORT, (1, 32, 32768, 64), (1, 32, 131072, 64), (1, 16, 65536, 128))  # for what is tuned long for each head dim


class Peer(NamedTuple):
    """What one function computes, and how it is called at a shape."""

    name: str
    form: Callable[[Shape], Form]
    decays: bool = False
    shapes: tuple[Shape, ...] | None = None  # that it is asked for, where they are not all
    backward: tuple[Shape, ...] | None = None  # and where it is asked to differentiate
    layout: str = "bnhd"

    def differentiates(self, shape: Shape) -> bool:
        return self.backward is None or shape in self.backward


def log_decay(shape: Shape, kind: str) -> Tensor:
    """Of a head, (H,), or of a token, (B, N, H)."""
    batch, heads, length, _ = shape
    return -0.1 * torch.rand((heads,) if kind == "head" else (batch, length, heads), device="cuda")


def fla() -> list[Peer]:
    """flash-linear-attention; its layout is (B, N, H, D)."""
    with suppress(ImportError):  # Triton before 3.5
        tune_sooner(*(2, 0) if os.environ.get("FLA_CACHE_RESULTS") == "0" else ())
    linear, gla = (importlib.import_module(f"fla.ops.{name}") for name in ("linear_attn", "simple_gla"))

    def form(run: Callable[..., Any], gate: str, options: dict[str, Any], shape: Shape) -> Form:
        given = options | ({gate: log_decay(shape, "head" if gate == "g_gamma" else "token")} if gate else {})

        def called(*leaves: Tensor) -> Tensor:
            return run(*(x.transpose(1, 2).contiguous() for x in leaves), **given)[0].transpose(1, 2)

        return called

    def peer(name: str, run: Callable[..., Any], gate: str = "", **options: Any) -> Peer:
        return Peer(name, partial(form, run, gate, options), bool(gate), TUNED)

    return [
        peer("fused", linear.fused_chunk_linear_attn, normalize=False)._replace(shapes=None),
        peer("chunk", linear.chunk_linear_attn, normalize=False),
        # its backward pass refuses to run under some versions of Triton, the same everywhere
        peer("chunk, a decay a token", gla.chunk_simple_gla, "g")._replace(backward=SHORT[:1]),
        peer("fused, a decay a token", gla.fused_chunk_simple_gla, "g"),
        peer("fused, a decay a head", gla.fused_chunk_simple_gla, "g_gamma"),
        peer("chunk, a decay a head", gla.chunk_simple_gla, "g_gamma"),
        peer("normalised", linear.chunk_linear_attn, normalize=True),
        peer("recurrent, a decay a token", gla.fused_recurrent_simple_gla, "g")._replace(shapes=SHORT[:1]),
    ]


@cache
def tune_sooner(threads: int = 8, ms: int = 12) -> None:
    """Has Triton's autotuners compile by several threads, not one kernel after the other, and time each for `ms`, not at all for 0."""
    testing: Any = importlib.import_module("triton.testing")
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    together = importlib.import_module("triton.runtime._async_compile").AsyncCompileMode
    bench, pool = tuner._bench, ThreadPoolExecutor(threads)

    def compile_then_bench(self: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if name != "warmup"}
        configs = self.prune_configs(kwargs)
        if config is configs[0]:
            with together(pool, ignore_errors=True):
                for each in configs:
                    self.fn.warmup(*args, **given, **each.all_kwargs())
        return bench(self, *args, config=config, **kwargs)

    def not_timed(call: Callable[[], object], **options: object) -> list[float]:
        return [0.0] * 3

    tuner._bench = compile_then_bench
    testing.do_bench = partial(testing.do_bench, warmup=ms // 4, rep=ms) if ms else not_timed


def helion() -> list[Peer]:
    """Helion's examples/linear, in the folder that HELION_EXAMPLES names, by the configurations for H100 that stand there; no tuning.

    Where a call has none, it takes that of the nearest which has.
    """
    os.environ.update(HELION_AUTOTUNE_CACHE="AOTAutotuneCache", HELION_AOT_DATA_DIR=tempfile.mkdtemp())
    return helion_examples()


def helion_untuned() -> list[Peer]:
    """The same as Helion configures them where nothing was tuned."""
    os.environ.update(HELION_AUTOTUNE_EFFORT="none")
    return helion_examples()


def helion_examples() -> list[Peer]:
    sys.path.append(os.environ["HELION_EXAMPLES"])
    engine = importlib.import_module("linear_attention_engine")

    def plain(shape: Shape) -> Form:
        return partial(engine.helion_chunk_linear_attn, scale=shape[-1] ** -0.5)

    def decayed(shape: Shape) -> Form:
        gate = log_decay(shape, "token").transpose(1, 2).contiguous()
        return partial(engine.helion_chunk_simple_gla, g=gate, scale=shape[-1] ** -0.5)

    return [
        Peer("chunk, a decay a token", decayed, decays=True, shapes=SHORT, layout="bhnd"),
        Peer("chunk", plain, shapes=SHORT, layout="bhnd"),
    ]


def flashinfer() -> list[Peer]:
    """FlashInfer's prefill of the gated delta rule, forward only: it has nothing nearer. Sequences lie in a row, (B N, H, D)."""
    prefill = importlib.import_module("flashinfer").chunk_gated_delta_rule

    def form(shape: Shape) -> Form:
        batch, heads, length, dim = shape
        ends = length * torch.arange(batch + 1, device="cuda")
        gates = {"g": log_decay(shape, "token").exp().view(-1, heads), "beta": torch.rand(batch * length, heads, device="cuda") / dim}

        def called(*leaves: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2).reshape(batch * length, heads, dim) for x in leaves)
            return prefill(q, k, v, **gates, cu_seqlens=ends).view(batch, length, heads, dim).transpose(1, 2)

        return called

    return [Peer("gated delta rule, a decay a token", form, decays=True, shapes=WIDE, backward=())]


def fla_step(batch: int, heads: int, dim: int) -> Step:
    run = importlib.import_module("fla.ops.simple_gla").fused_recurrent_simple_gla
    q, k, v = (torch.randn(batch, 1, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    rate = -torch.rand(heads, device="cuda")
    return lambda state: run(q, k, v, g_gamma=rate, initial_state=state, output_final_state=True)


def helion_step(batch: int, heads: int, dim: int) -> Step:
    helion()
    run = importlib.import_module("linear_attention_engine").recurrent_step
    q, k, v = (torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return partial(run, q, k, v, alpha=torch.rand(batch, heads, 1, device="cuda"))


def flashinfer_step(batch: int, heads: int, dim: int) -> Step:
    """Mamba's selective state update at a time step of one: state = exp(A) state + v k', o = state q."""
    run = importlib.import_module("flashinfer.mamba").selective_state_update
    q, k, v = (torch.randn(batch, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    rate = (-torch.rand(heads, device="cuda"))[:, None, None].expand(-1, dim, dim)
    time_step = torch.ones(batch, heads, 1, device="cuda").expand(-1, -1, dim)
    skip = torch.zeros(heads, 1, device="cuda").expand(-1, dim)
    return lambda state: run(state, v, time_step, rate, k, q, skip)


class Library(NamedTuple):
    distribution: str  # which tells the version
    offers: Callable[[], list[Peer]]
    step: Callable[[int, int, int], Step] | None = None  # of (sequences, heads, head dim): one token, on a state (B, H, D, D)


LIBRARIES = {
    "FLA": Library("fla-core", fla, fla_step),
    "Helion": Library("helion", helion, helion_step),
    "Helion untuned": Library("helion", helion_untuned),
    "FlashInfer": Library("flashinfer-python", flashinfer, flashinfer_step),
}
