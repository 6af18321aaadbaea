"""Hopper's own kernels of the second degree on the CPU, by the emulator in `tests/emulation`, at the accuracy bar. And what the emulator
says of a warpgroup's products: that what is wrong in their order comes out."""

import ctypes
import subprocess
import sys
from pathlib import Path

import accuracy_bar
import pytest
import torch
from accuracy_bar import assert_bar, assert_first_tokens_have_their_values, compare, operator_case, run
from emulation import build
from reach_cases import assert_far_tokens_are_met, assert_far_tokens_are_not_met

from hf_linattn.ops import chunked, cuda
from hf_linattn.ops.call import Call

pytestmark = [
    pytest.mark.skipif(build.compiler() is None or build.headers() is None, reason="needs g++ or clang++, and CUDA's headers"),
    pytest.mark.timeout(1200),
]


def check(dtype, stateful=False, shift=0.0, chunks=1, **kind):
    """The output, the masses and the state, twice to the same bits; `chunks`: those of the plan."""
    kind = {"length": 130, "batch": 1, "heads": 2, "key_heads": 1, "head_dim": 32} | kind
    inputs, _ = operator_case(dtype, degree=2, device="cpu", **{"value_dim": kind["head_dim"]} | kind)
    inputs[2] = inputs[2] + shift
    call = Call(*inputs)
    asked = call.query.data_ptr() if stateful else None  # any pointer: nothing runs yet
    plan = cuda._Launch(call).plan("forward", cuda._ForwardResult(cuda._describe(call.empty_out()), None, asked))
    assert plan.warpgroups and plan.segments == chunks
    exact = chunked.forward(Call(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)), stateful)
    plain, ours, again = chunked.forward(call, stateful), cuda.forward(call, stateful), cuda.forward(call, stateful)
    for name, x, beside, truth, twice in zip(("out", "mass", "state"), ours, plain, exact, again, strict=True):
        if x is not None:
            assert_bar(name, x, beside, truth, 2, dtype)
            assert torch.equal(x, twice), name


@pytest.mark.parametrize("dtype, head_dim", [
    *((torch.bfloat16, d) for d in (32, 64, 128)), (torch.float16, 64),
    *(pytest.param(torch.float16, d, marks=pytest.mark.slow) for d in (32, 128)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("causal", [True, False])
def test_head_dims(hopper_kernels, dtype, head_dim, causal):
    check(dtype, head_dim=head_dim, causal=causal, length=201)


@pytest.mark.parametrize(
    "kind", [{"length": 32}, {"length": 64}, {"length": 333, "heads": 6, "key_heads": 2, "batch": 2}, {"length": 257}], ids=str
)
def test_lengths_and_grouped_queries(hopper_kernels, kind):
    check(torch.bfloat16, head_dim=64, **kind)


@pytest.mark.parametrize("head_dim, value_dim", [
    (32, 32), (64, 64), (16, 64), (24, 128), (32, 64),
    *(pytest.param(*dims, marks=pytest.mark.slow) for dims in ((128, 128), (8, 128), (32, 128))),
])  # fmt: skip
@pytest.mark.parametrize("kind", [
    {"decay": "key_head", "length": 300, "heads": 4, "key_heads": 2},
    {"decay": "query_token", "segments": "packed", "heads": 4, "key_heads": 2, "length": 290},
    {"decay": "key_token", "segments": "left", "batch": 2}, {"segments": "mask", "causal": False, "length": 200}, {"length": 333},
    {"decay": "key_token", "strengths": (0.01, 50.0, 0.0), "segments": "middle", "length": 400},
], ids=str)  # fmt: skip
def test_gates(hopper_kernels, kind, head_dim, value_dim):
    check(torch.bfloat16, head_dim=head_dim, value_dim=value_dim, **kind)


@pytest.mark.parametrize("kind", [{"decay": "key_token", "segments": "mask"}, {"segments": "packed"}], ids=str)
def test_no_padding_is_read(hopper_kernels, kind):
    """NaN there reaches nothing, and what comes out there is 0."""
    inputs, _ = operator_case(torch.bfloat16, degree=2, length=290, head_dim=64, value_dim=64, device="cpu", **kind)
    padding = (inputs[5] <= 0)[:, None, :, None]
    out = cuda.forward(Call(*inputs), False)[0]
    poisoned = [x.masked_fill(padding, float("nan")) for x in inputs[:3]]
    assert torch.equal(cuda.forward(Call(*poisoned, *inputs[3:]), False)[0], out) and not out.masked_select(padding).any()


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_queries_of_any_length(hopper_kernels, scale):
    """Whose weights in units of their own would leave float32's range in their sums."""
    inputs, _ = operator_case(torch.bfloat16, degree=2, batch=1, heads=2, key_heads=1, length=140, head_dim=64, value_dim=64, device="cpu")
    plain = cuda.forward(Call(*inputs), False)[0]
    inputs[0] = inputs[0] * torch.where(torch.arange(140) < 5, scale, 1.0)[:, None].bfloat16()
    scaled = cuda.forward(Call(*inputs), False)[0]
    torch.testing.assert_close(scaled, plain, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("query, key", [(1e20, 1.0), (1.0, 1e20), (1e30, 1e30), (1e18, 1e25)])
@pytest.mark.parametrize("kind", [{}, {"decay": "key_token"}, {"segments": "mask"}], ids=str)
def test_rows_whose_square_is_beyond_float32(hopper_kernels, kind, query, key):
    """Such a row has no direction, as in plain PyTorch; and no product is beyond float32, whatever the lengths of the others."""
    inputs, _ = operator_case(torch.bfloat16, degree=2, length=140, head_dim=64, value_dim=64, device="cpu", **kind)
    huge = torch.arange(140) % 5 == 3
    inputs[:2] = [x * torch.where(huge, scale, 1.0)[:, None].bfloat16() for x, scale in zip(inputs, (query, key), strict=False)]
    plain, ours = chunked.forward(Call(*inputs), False), cuda.forward(Call(*inputs), False)
    torch.testing.assert_close(ours[0], plain[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(ours[1], plain[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("per_token", [True, False])
def test_a_token_that_forgets_everything(hopper_kernels, per_token):
    """A sum of decays keeps the small differences of others beside one of any size."""
    inputs, _ = operator_case(torch.bfloat16, degree=2, length=200, head_dim=64, value_dim=64, device="cpu", decay="key_token")
    decay = inputs[4] if per_token else inputs[4][0, :, 0]
    token = torch.zeros_like(decay, dtype=torch.bool)
    token[..., 70 if per_token else 0] = True
    forgets, nearly = (Call(*inputs[:4], decay.masked_fill(token, x), *inputs[5:]) for x in (-1e30, -800.0))
    found, exact = cuda.forward(forgets, False), chunked.forward(nearly, False)
    assert torch.equal(found[0], cuda.forward(nearly, False)[0])
    torch.testing.assert_close(found[0], exact[0], atol=2e-2, rtol=2e-2)


def test_rows_that_lie_in_the_same_place(hopper_kernels):
    """No bulk copy takes them, and the kernels of other cards do; one head or sequence for all is taken."""
    inputs, _ = operator_case(torch.bfloat16, degree=2, batch=2, heads=4, key_heads=2, length=140, head_dim=64, value_dim=64, device="cpu")
    for names in ((1,), (2,), (1, 2)):
        for index, size in ((2, 140), (1, 2), (0, 2)):
            shared = list(inputs)
            for i in names:
                shared[i] = inputs[i].narrow(index, 0, 1).expand(*(size if d == index else -1 for d in range(4)))
            copied = [x.contiguous() if i in names else x for i, x in enumerate(shared)]
            found, expected = cuda.forward(Call(*shared), False), cuda.forward(Call(*copied), False)
            torch.testing.assert_close(found[0], expected[0], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("numbers", [
    (1.0, 1.0, 0.5, 2.0), (1.0, 1.0, 0.0, 1.0), (2.0, 3.0, 0.01, 1.0), (1.0, 0.5, -0.25, 1.0), (1.0, -1.0, 0.5, 1e-3),
    (0.1, 0.0, 30.0, 1.0),
], ids=str)  # fmt: skip
def test_functions_of_every_kind(hopper_kernels, numbers):
    """With a square to complete and without."""
    inputs, _ = operator_case(torch.bfloat16, degree=2, batch=1, heads=2, key_heads=1, length=140, head_dim=64, value_dim=64, device="cpu")
    inputs[3] = torch.tensor(numbers)[:, None].expand(4, 2).contiguous()
    inputs[0][:, :, 7] = 0  # a query without a direction
    exact = chunked.forward(Call(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)), False)
    plain, ours = chunked.forward(Call(*inputs), False), cuda.forward(Call(*inputs), False)
    assert_bar("out", ours[0], plain[0], exact[0], 2, torch.bfloat16)
    assert ((ours[1] - exact[1]).norm() / exact[1].norm()).item() < 1e-5


@pytest.mark.parametrize("kind", [{}, {"decay": "key_head"}, {"decay": "key_head", "segments": "packed"}], ids=str)
def test_the_first_token_has_its_own_value(hopper_kernels, kind):
    assert_first_tokens_have_their_values(head_dim=64, value_dim=64, **kind)


@pytest.mark.parametrize("kind", [
    {"head_dim": 24, "value_dim": 64, "decay": "key_token", "strengths": (0.01, 0.1), "segments": "mask"},
    {"head_dim": 32, "decay": "key_head"},
], ids=str)  # fmt: skip
def test_long_sequences_with_gates(hopper_kernels, kind):
    """What lies outside of a chunk is added to what the kernels of states have left in the results."""
    check(torch.bfloat16, heads=1, length=3600, chunks=8, **kind)


@pytest.mark.parametrize("kind", [
    {"head_dim": 32, "length": 3600, "chunks": 4, "stateful": True},
    pytest.param({"head_dim": 64, "length": 7200, "chunks": 4}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_long_sequences(hopper_kernels, kind):
    check(torch.bfloat16, heads=1, shift=0.5, **kind)


def check_gradients(warpgroups=True, **kind):
    kind = {"length": 150, "batch": 1, "heads": 2, "key_heads": 1, "degree": 2, "device": "cpu"} | kind
    call = Call(*operator_case(torch.bfloat16, **kind)[0])
    names = ("out", "grad_out", "grad_query", "grad_key", "grad_value")
    rows = zip(names, (call.empty_out(), call.empty_out(), call.query, call.key, call.value), strict=True)
    plan = cuda._Launch(call).plan("backward", cuda._BackwardData(**{name: cuda._describe(x) for name, x in rows}))
    assert plan.warpgroups == warpgroups
    compare(torch.bfloat16, **kind)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [33, 300])
def test_gradients(hopper_kernels, head_dim, causal, length):
    check_gradients(head_dim=head_dim, value_dim=head_dim, causal=causal, length=length)


@pytest.mark.parametrize("head_dim, value_dim", [(32, 32), (64, 64), (16, 64), (24, 64), (128, 128)])
@pytest.mark.parametrize("kind", [
    {"decay": "key_head", "length": 300, "heads": 4, "key_heads": 2},
    {"decay": "query_token", "segments": "packed", "length": 270, "key_heads": 2},
    {"decay": "key_token", "segments": "left", "batch": 2, "length": 270}, {"segments": "mask", "causal": False, "length": 200},
    {"segments": "packed", "length": 520}, {"length": 33, "decay": "key_head"},
    {"decay": "key_token", "strengths": (0.01, 50.0, 0.0), "segments": "middle", "length": 400},
], ids=str)  # fmt: skip
def test_gated_gradients(hopper_kernels, kind, head_dim, value_dim):
    check_gradients(head_dim=head_dim, value_dim=value_dim, **kind)


@pytest.mark.parametrize("kind", [
    {"head_dim": 32}, {"decay": "key_token", "strengths": (0.01, 0.1), "segments": "mask", "head_dim": 24, "value_dim": 64, "length": 2700},
], ids=str)  # fmt: skip
def test_gradients_of_long_sequences(hopper_kernels, kind):
    """Pairs inside chunks, beside what states have left in the results."""
    check_gradients(**{"length": 3600, "heads": 1, "value_dim": 32} | kind)


def test_gradients_read_no_padding(hopper_kernels):
    no_padding_is_read(
        {"degree": 2, "decay": "key_token", "segments": "mask", "length": 150, "head_dim": 16, "value_dim": 64, "device": "cpu"}
    )


def no_padding_is_read(kind):
    inputs, upstream = operator_case(torch.bfloat16, **kind)
    plain, padding = run(cuda, inputs, upstream, False), (inputs[5] <= 0)[:, None, :, None]
    assert padding.any()
    poisoned = [x.masked_fill(padding, float("nan")) for x in inputs[:3]]
    upstream = [upstream[0].masked_fill(padding, float("nan")), upstream[1].masked_fill(padding[..., 0], float("nan")), None]
    for name, x in run(cuda, [*poisoned, *inputs[3:]], upstream, False).items():
        assert torch.equal(x, plain[name]), name


@pytest.mark.parametrize("kind", [
    {"decay": "key_head", "head_dim": 32, "value_dim": 32}, {"decay": "key_head", "segments": "packed", "head_dim": 64, "value_dim": 64},
], ids=str)  # fmt: skip
def test_gradients_of_tokens_that_weigh_nearly_nothing(hopper_kernels, kind):
    """f(s) = s^2 at tokens that see one or a few, whose outputs have to be these tokens' values."""
    check_gradients(length=65, numbers=(0.0, 0.0, 1.0, 1.0), **kind)


@pytest.mark.parametrize("numbers", [(1e20, 0.0, 1e20, 1.0), (1e20, 1e20, 1e20, 1.0), (1e-20, 0.0, 1e-20, 1.0)], ids=str)
def test_gradients_of_functions_of_any_size(hopper_kernels, numbers):
    check_gradients(head_dim=32, value_dim=32, numbers=numbers)


@pytest.mark.parametrize("kind", [
    {"decay": "query_head", "head_dim": 32, "value_dim": 32}, {"head_dim": 16, "value_dim": 128}, {"head_dim": 96, "value_dim": 96},
], ids=str)  # fmt: skip
def test_gradients_that_stay_with_mma_sync(hopper_kernels, kind):
    """A key has no one factor beside grouped keys and a decay of each query head, and tiles of some widths have no kernel."""
    check_gradients(warpgroups=False, **kind)


@pytest.mark.parametrize("kind", [
    {}, {"segments": "left"}, {"segments": "right"}, {"segments": "packed", "length": 1200, "heads": 1, "decay": "key_token"},
    {"decay": "key_token", "head_dim": 32, "value_dim": 64}, {"length": 4096, "heads": 1, "head_dim": 32, "value_dim": 32},
], ids=str)  # fmt: skip
def test_what_a_decay_leaves_nothing_of_is_not_met(hopper_kernels, kind):
    assert_far_tokens_are_not_met(**kind)


@pytest.mark.parametrize("kind", [
    {"decay": "key_head", "segments": "right", "batch": 2}, {"decay": "key_token", "segments": "packed", "head_dim": 64},
    {"decay": "query_token", "heads": 10, "length": 140},
], ids=str)  # fmt: skip
def test_tiles_of_keys_where_they_are_many(hopper_kernels, monkeypatch, kind):
    """More of them than a card works on at once are made ready by blocks of half as many threads."""
    monkeypatch.setenv("EMULATED_PROCESSORS", "0")
    check(torch.bfloat16, **{"length": 300, "heads": 4, "key_heads": 2} | kind)


@pytest.mark.parametrize("segments", ["packed", "middle", "right"])
@pytest.mark.parametrize("decay", ["key_head", "query_token"])
def test_the_reach_of_a_decay_beside_runs(hopper_kernels, decay, segments):
    """Of heads that reach a few tiles, and one tile, and all: it ends inside a run, or behind padding, which does not decay."""
    shape = {"head_dim": 64, "length": 900, "heads": 3, "key_heads": 3}
    check(torch.bfloat16, decay=decay, segments=segments, strengths=(0.08, 0.6, 1e-3), **shape)


@pytest.mark.parametrize("normalize", [True, False])
def test_where_weights_may_vanish_every_key_is_met(hopper_kernels, normalize):
    assert_far_tokens_are_met(normalize)


def test_long_sequences_whose_decay_forgets(hopper_kernels):
    """Of chunks, their sums and what is read of states, most is out of reach."""
    shape = {"length": 3600, "heads": 1, "head_dim": 32, "value_dim": 32}
    check_gradients(**shape, decay="key_token", strengths=(1.0, 0.02))
    check_gradients(**shape | {"heads": 2}, decay="key_head", segments="middle")


# ---- one pass over 16 features

RUNNING = {"head_dim": 16, "value_dim": 64, "batch": 1, "heads": 2, "key_heads": 1, "degree": 2, "device": "cpu"}


def one_pass(monkeypatch, cuts=1, **kind):
    """A case of it, on a card as small as its heads ask for: on a large one all pairs of so few would take less."""
    kind = RUNNING | kind
    monkeypatch.setenv("EMULATED_PROCESSORS", str(kind["heads"] * kind["batch"] * cuts))
    inputs, upstream = operator_case(torch.bfloat16, **kind)
    plans = cuda.plans(*inputs[:3], degree=2, log_decay=inputs[4], segments=inputs[5])
    assert all((plan.engine, plan.chunk) == ("pairs", 128) for plan in plans)
    return kind, inputs, upstream


@pytest.mark.parametrize("kind", [
    {"length": 1025, "heads": 3}, {"length": 1150, "head_dim": 8, "decay": "key_head", "strengths": (0.01,)},
    {"length": 1100, "decay": "key_token", "strengths": (0.01, 50.0, 0.0), "segments": "middle", "heads": 4, "key_heads": 2},
    {"length": 1050, "segments": "packed", "key_heads": 2}, {"length": 1200, "segments": "left", "decay": "key_token"},
    {"length": 650, "heads": 3, "key_heads": 3, "decay": "key_head"},
    {"length": 650, "heads": 4, "key_heads": 2, "decay": "key_token", "segments": "right"},
], ids=str)  # fmt: skip
def test_one_pass(hopper_kernels, monkeypatch, kind):
    """A state beside the pairs of 128 tokens."""
    check_gradients(**one_pass(monkeypatch, **kind)[0])


@pytest.mark.parametrize("kind", [{"heads": 1}, {"decay": "key_token", "strengths": (0.002,), "heads": 4, "key_heads": 2}], ids=str)
def test_one_pass_in_segments(hopper_kernels, monkeypatch, kind):
    """With few heads each segment begins with a state of its own."""
    kind, inputs, _ = one_pass(monkeypatch, 3, length=3100, **kind)
    small = cuda.plans(*inputs[:3], degree=2)[0].workspace_bytes
    monkeypatch.setenv("EMULATED_PROCESSORS", "1")
    assert cuda.plans(*inputs[:3], degree=2)[0].workspace_bytes < small
    one_pass(monkeypatch, 3, **kind)
    check_gradients(**kind)


@pytest.mark.parametrize("strengths", [(1.0,), (0.002,)], ids=str)
def test_one_pass_and_the_rate_of_a_decay(hopper_kernels, monkeypatch, strengths):
    """Its gradient counts every token's small difference of sums, rounded each for itself, as often as tokens lie before."""
    _, inputs, upstream = one_pass(monkeypatch, length=2600, key_heads=2, strengths=strengths, decay="key_head")
    exact = run(chunked, inputs, upstream, False, torch.float64)["gradient of log_decay"]
    assert accuracy_bar.distance(run(cuda, inputs, upstream, False)["gradient of log_decay"], exact) < 0.01


def test_one_pass_beside_a_mean_of_values(hopper_kernels, monkeypatch):
    """That is many times as large as their differences."""
    call = Call(*one_pass(monkeypatch, length=1040)[1])
    call = call._replace(value=call.value + 4)
    exact = chunked.forward(call._replace(query=call.query.double(), key=call.key.double(), value=call.value.double()), False)
    assert_bar("out", cuda.forward(call, False)[0], chunked.forward(call, False)[0], exact[0], 2, torch.bfloat16)


def test_one_pass_reads_no_padding(hopper_kernels, monkeypatch):
    no_padding_is_read(one_pass(monkeypatch, decay="key_token", segments="mask", length=1030)[0])


def test_one_pass_where_a_decay_leaves_next_to_nothing(hopper_kernels, monkeypatch):
    """Behind the last real token the state falls below float32's normal numbers, whose inverse is infinite."""
    _, inputs, _ = one_pass(monkeypatch, heads=3, key_heads=3, decay="key_head", segments="mask", length=1100)
    inputs[4] = -torch.tensor([0.22, 0.33, 0.57])  # 2^-128 to 2^-149 is left at the beginning of some chunk
    inputs[5] = inputs[6] = torch.where(torch.arange(1100) < 600, 1, -1)[None].int()
    out, mass, _ = cuda.forward(Call(*inputs), False)
    assert torch.isfinite(out).all() and torch.isfinite(mass).all() and not out[:, :, 600:].any()


def test_one_pass_in_any_order_of_warps(hopper_kernels, monkeypatch):
    _, inputs, upstream = one_pass(monkeypatch, length=1030, decay="key_token", strengths=(0.01,))
    first, second = (run(cuda, inputs, upstream, False) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


# ---- the emulator

KERNEL = """
#include "tile/warpgroup.cuh"
using namespace linattn_tile;
using Product = WarpgroupProduct<__nv_bfloat16, 32, {along_rows}>;
__global__ void kernel(const __nv_bfloat16 *from, float *to) {{
  extern __shared__ unsigned char shared[];
  const auto put = [&](int row, int column, __nv_bfloat16 x) {{
    *reinterpret_cast<__nv_bfloat16 *>(shared + Tile<32>::at(row, column / 8) + column % 8 * 2) = x;
  }};
  const auto fill = [&](float factor) {{
    for (int i = threadIdx.x; i < 64 * 32; i += 128) put(i / 32, i % 32, factor * static_cast<float>(from[i]));
  }};
  fill(1.f);
  __syncthreads();
  float d[4][4];
  for (int i = 0; i < 16; ++i) d[i / 4][i % 4] = 1.f;
  const uint64_t a = warpgroup_operand<32>(0), b = warpgroup_operand<32>(0);
  {body}
  for (int i = 0; i < 16; ++i)
    to[(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i % 4 / 2 * 8) * 32 + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = d[i / 4][i % 4];
}}
extern "C" void run(const __nv_bfloat16 *from, float *to) {{ kernel<<<1, 128, 4096, nullptr>>>(from, to); }}
"""
ISSUED = "warpgroup_begin(); Product::run(d, a, b, true); warpgroup_commit();"


COPIED = """
#include "tile/bulk.cuh"
using namespace linattn_tile;
__global__ void kernel(const float *from, float *to) {{
  extern __shared__ unsigned char shared[];
  const uint32_t barrier = 1024;
  if (threadIdx.x == 0) bulk_barrier(barrier, 1), bulk_barriers_made();
  __syncthreads();
  if (threadIdx.x == 0) bulk_arrive_with(barrier, {bytes}), bulk_copy(0, from, 512, barrier);
  {body}
  to[threadIdx.x] = reinterpret_cast<float *>(shared)[threadIdx.x];
}}
extern "C" void run(const float *from, float *to) {{ kernel<<<1, 128, 4096, nullptr>>>(from, to); }}
"""


def made(folder: Path, body: str, along_rows: bool = False) -> Path:
    return library_of(folder, KERNEL.format(body=body, along_rows=str(along_rows).lower()))


def library_of(folder: Path, kernel: str) -> Path:
    (folder / "tile").mkdir(exist_ok=True)
    (folder / "kernel.cpp").write_text('#include "emulator.h"\n' + build.translated(kernel))
    for name in ("linattn.h", "tile/tile.cuh"):
        (folder / name).write_bytes((build.KERNELS / name).read_bytes())
    for name in ("emulator.h", "tile/instructions.cuh", "tile/warpgroup.cuh", "tile/bulk.cuh"):
        (folder / name).write_bytes((build.HERE / name.rpartition("/")[2]).read_bytes())
    build.compile_library([], folder / "kernel.so", folder, of_hopper=[folder / "kernel.cpp"])
    return folder / "kernel.so"


def result(folder: Path, body: str, along_rows: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The products (64, 32), and the tile (64, 32) that both factors are of."""
    numbers, results = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.zeros(64, 32)
    ctypes.CDLL(str(made(folder, body, along_rows))).run(ctypes.c_void_p(numbers.data_ptr()), ctypes.c_void_p(results.data_ptr()))
    return results, numbers.double()


def test_a_product_of_two_tiles(tmp_path):
    found, tile = result(tmp_path, f"{ISSUED} warpgroup_wait<0>();")
    torch.testing.assert_close(found.double(), 1 + tile[:, :16] @ tile[:32, :16].mT, atol=1e-5, rtol=1e-5)


def test_a_product_along_rows(tmp_path):
    found, tile = result(tmp_path, f"{ISSUED} warpgroup_wait<0>();", along_rows=True)
    torch.testing.assert_close(found.double(), 1 + tile[:, :16] @ tile[:16, :], atol=1e-5, rtol=1e-5)


def test_products_one_after_the_other(tmp_path):
    """Of the second only the first column of blocks of A, from registers, is there; the first is thrown away by `accumulate`."""
    found, tile = result(
        tmp_path,
        f"""{ISSUED}
        const uint32_t ones[4] = {{Element<__nv_bfloat16>::kOnes, Element<__nv_bfloat16>::kOnes, 0u, 0u}};
        warpgroup_begin(); Product::run(d, ones, b, false); warpgroup_commit(); warpgroup_wait<1>(); warpgroup_wait<0>();""",
    )
    torch.testing.assert_close(found.double(), tile[:32, :8].sum(-1).expand(64, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("body", [
    ISSUED, f"{ISSUED} warpgroup_wait<1>();", "warpgroup_begin(); Product::run(d, a, b, true); warpgroup_wait<0>();",
    f"{ISSUED} __syncthreads(); fill(2.f); __syncthreads(); warpgroup_wait<0>();",
], ids=["not waited for", "left on its way", "not committed", "overwritten"])  # fmt: skip
def test_what_is_read_too_early_or_overwritten(tmp_path, body):
    assert result(tmp_path, body)[0].isnan().any()


@pytest.mark.parametrize("body, words", [
    ("Product::run(d, a, b, true);", "without warpgroup_begin"),
    (f"{ISSUED} d[0][0] = 1.f; warpgroup_wait<0>();", "while a product is on its way"),
    ("warpgroup_begin(); Product::run(d, a, warpgroup_operand<32>(128), true);", "does not begin in the first of eight rows"),
])  # fmt: skip
def test_what_ends_the_process(tmp_path, body, words):
    call = f"import ctypes; x = ctypes.create_string_buffer(1 << 14); ctypes.CDLL({str(made(tmp_path, body))!r}).run(x, x)"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and words in done.stderr


@pytest.mark.parametrize("body, arrives", [("bulk_wait(barrier, 0);", True), ("", False)])
def test_a_bulk_copy(tmp_path, body, arrives):
    """What is not waited for is not there yet."""
    numbers, found = torch.randn(128), torch.zeros(128)
    library = library_of(tmp_path, COPIED.format(body=body, bytes=512))
    ctypes.CDLL(str(library)).run(ctypes.c_void_p(numbers.data_ptr()), ctypes.c_void_p(found.data_ptr()))
    assert torch.equal(found, numbers) if arrives else found.isnan().all()


def test_bytes_that_never_come(tmp_path):
    library = library_of(tmp_path, COPIED.format(body="bulk_wait(barrier, 0);", bytes=528))
    call = f"import ctypes; x = ctypes.create_string_buffer(1 << 12); ctypes.CDLL({str(library)!r}).run(x, x)"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "wait for one another for ever" in done.stderr
