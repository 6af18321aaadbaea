"""Rows padded with zeros for the engines that are fast at a few head dims: which calls are, and that their results are the calls' own."""

from ctypes import byref

import pytest
import torch
from accuracy_bar import compare, paths_of, run

from hf_linattn.ops import cuda
from hf_linattn.ops.call import Call

pytestmark = pytest.mark.timeout(1200)
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def small(head_dim, value_dim=None, **kind):
    return {
        "head_dim": head_dim,
        "value_dim": value_dim or head_dim,
        "length": 130,
        "batch": 1,
        "heads": 2,
        "key_heads": 1,
        "device": "cpu",
    } | kind


def check(path, dtype, head_dim, value_dim=None, **kind):
    assert paths_of(dtype, **small(head_dim, value_dim, **kind)) == (path, path)
    compare(dtype, **small(head_dim, value_dim, **kind))


@pytest.mark.parametrize("dtype, head_dim, path", [
    (BFLOAT, 8, "stream at 32"), (BFLOAT, 24, "stream at 32"), (BFLOAT, 48, "stream at 64"), (BFLOAT, 112, "stream at 128"),
    (BFLOAT, 1, "stream at 32"), (HALF, 33, "stream at 64"), (BFLOAT, 72, "stream at 80"), (BFLOAT, 136, "chunks at 192"),
    (FLOAT, 8, "chunks at 32"), (FLOAT, 24, "chunks at 32"), (FLOAT, 48, "chunks at 64"), (FLOAT, 112, "chunks at 128"),
], ids=str)  # fmt: skip
def test_head_dims(kernels, dtype, head_dim, path):
    check(path, dtype, head_dim)


@pytest.mark.parametrize("dtype, head_dim, value_dim, path", [
    (BFLOAT, 24, 40, "stream at 64"), (BFLOAT, 64, 32, "stream at 64"), (BFLOAT, 31, 7, "stream at 32"), (FLOAT, 7, 31, "chunks at 32"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", [{"stateful": True}, {"causal": False, "stateful": True}], ids=str)
def test_values_of_another_dim_and_states(kernels, dtype, head_dim, value_dim, path, kind):
    check(path, dtype, head_dim, value_dim, **kind)


@pytest.mark.parametrize("kind", [
    {"decay": "key_head", "stateful": True}, {"decay": "query_token", "segments": "packed", "heads": 4, "key_heads": 2},
    {"segments": "left"}, {"segments": "mask", "causal": False}, {"noisy": True}, {"noisy": True, "decay": "key_token", "stateful": True},
], ids=str)  # fmt: skip
def test_what_multiplies_the_weights(kernels, kind):
    check("stream at 32", BFLOAT, 24, 22, **kind)


@pytest.mark.parametrize("head_dim, value_dim, path", [(24, 24, "pairs at 32"), (48, 40, "pairs at 64")], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_second_degree(kernels, head_dim, value_dim, path, causal):
    check(path, BFLOAT, head_dim, value_dim, degree=2, causal=causal)


def test_forward_and_backward_are_padded_each_for_itself(kernels):
    assert paths_of(HALF, **small(48, degree=2)) == ("pairs at 64", "generic")
    compare(HALF, **small(48, degree=2))


def results(query, key, value, upstream):
    inputs = [query, key, value, torch.ones(4, query.shape[1]) * 0.5, *(None,) * 6, 1, True, True]
    return run(cuda, inputs, (upstream, None, None), False)


LAYOUTS = {
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "heads of one projection": lambda x: torch.cat([x, x], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, : x.shape[1]],
    "rows that begin anywhere": lambda x: torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)[..., 1:-2].copy_(x),
    "features before tokens": lambda x: x.mT.contiguous().mT,
    "from an odd place": lambda x: torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, head_dim", [(BFLOAT, 24), (BFLOAT, 64), (FLOAT, 24), (BFLOAT, 9)], ids=str)
def test_layouts_give_the_same_bits(kernels, dtype, head_dim, layout):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, heads, 70, head_dim, generator=generator).to(dtype) for heads in (2, 1, 1, 2)]
    expected, turned = results(*rows), results(*map(LAYOUTS[layout], rows))
    assert [name for name, x in turned.items() if not torch.equal(x, expected[name])] == []


def test_results_lie_as_the_queries_do(kernels):
    query = torch.randn(1, 70, 2, 24).bfloat16().transpose(1, 2)
    out, _, _ = cuda.forward(Call(query, query, query, torch.ones(4, 2)), False)
    assert out.shape == query.shape and out.stride() == query.stride()
    spread = torch.ones(1, 1, 1, 1).bfloat16().expand(1, 2, 70, 24)
    assert torch.equal(cuda.forward(Call(query, query, spread, torch.ones(4, 2)), False)[0], spread)


@pytest.mark.parametrize("path, dtype, kind", [
    ("stream", BFLOAT, {"head_dim": 64}), ("stream at 64", BFLOAT, {"head_dim": 16, "value_dim": 64}),
    ("stream at 32", BFLOAT, {"head_dim": 24, "length": 64}), ("generic", BFLOAT, {"head_dim": 24, "length": 63}),
    ("stream at 128", BFLOAT, {"head_dim": 32, "value_dim": 128}), ("generic", BFLOAT, {"head_dim": 32, "value_dim": 129}),
    ("chunks at 192", BFLOAT, {"head_dim": 160}), ("chunks at 256", BFLOAT, {"head_dim": 64, "value_dim": 256}),
    ("generic", BFLOAT, {"head_dim": 160, "decay": "key_head"}),
    ("generic", HALF, {"head_dim": 136}), ("generic", FLOAT, {"head_dim": 136}),
    ("generic", FLOAT, {"head_dim": 24, "segments": "left"}), ("generic", FLOAT, {"head_dim": 24, "noisy": True}),
    ("pairs at 32", BFLOAT, {"head_dim": 16, "degree": 2, "length": 1024}),
    ("generic", BFLOAT, {"head_dim": 16, "degree": 2, "length": 1025}),
    ("pairs at 64", BFLOAT, {"head_dim": 40, "value_dim": 64, "degree": 2, "length": 2048}),
    ("pairs", BFLOAT, {"head_dim": 16, "value_dim": 64, "degree": 2, "length": 2048}),
    ("generic", BFLOAT, {"head_dim": 24, "degree": 2, "stateful": True}),
], ids=str)  # fmt: skip
def test_what_is_padded(kernels, path, dtype, kind):
    assert paths_of(dtype, **small(**kind)) == (path, path)


def test_a_second_degree_state_that_is_only_asked_for_leaves_the_call_as_it_is(kernels):
    x = torch.empty(1, 2, 130, 24, dtype=BFLOAT)
    assert cuda.paths(x, x, x, degree=2) == ("pairs at 32", "pairs at 32")
    assert cuda.paths(x, x, x, degree=2, return_state=True) == ("generic", "generic")


def test_a_plan_tells_the_dim(kernels):
    x, wide = torch.empty(1, 2, 130, 24, dtype=BFLOAT), torch.empty(1, 2, 130, 32, dtype=BFLOAT)
    plan, same = cuda.plans(x, x, x)[0], cuda.plans(wide, wide, wide)[0]
    assert plan == same._replace(padded_dim=32) and same.padded_dim == 0
    assert str(plan).startswith("stream at 32 (chunks of 64, ")


def test_a_plan_of_padded_rows_is_not_launched_with_others(kernels):
    query, value = torch.randn(1, 2, 130, 32).bfloat16(), torch.randn(1, 2, 130, 24).bfloat16()
    call, out, mass = Call(query, query, value, torch.ones(4, 2)), torch.zeros(1, 2, 131, 24).bfloat16(), torch.empty(1, 2, 130)
    launch, results = cuda._Launch(call), cuda._ForwardResult(cuda._describe(out), mass.data_ptr())
    library, _ = cuda.load_library()
    plan = launch.plan("forward", results)
    assert plan.padded_dim == 32 and library.linattn_forward(byref(launch.problem), byref(results), byref(plan)) != 0
    assert not out.any()
