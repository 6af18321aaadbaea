"""Rows padded with zeros for the engines that are fast at a few head dims, held to the bar of `accuracy_bar.py`.

What is padded, `test_emulated_padding.py` tells.
"""

import pytest
import torch
from accuracy_bar import compare, operator_case, paths_of, run

from hf_linattn import linear_attention
from hf_linattn.ops import cuda

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_only")]
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def check(path, dtype, **kind):
    assert paths_of(dtype, **kind) == (path, path)
    compare(dtype, **kind)


DIMS = [
    (3, 5, 32),
    (8, 8, 32),
    (24, 24, 32),
    (31, 7, 32),
    (48, 48, 64),
    (24, 40, 64),
    (72, 72, 80),
    (88, 81, 96),
    (112, 112, 128),
    (64, 128, 128),
]


@pytest.mark.parametrize("dtype, engine", [(BFLOAT, "stream"), (HALF, "stream"), (FLOAT, "chunks")], ids=str)
@pytest.mark.parametrize("head_dim, value_dim, padded", DIMS)
@pytest.mark.parametrize("kind", [{}, {"causal": False}, {"stateful": True}], ids=str)
def test_dims_and_states(dtype, engine, head_dim, value_dim, padded, kind):
    check(f"{engine} at {padded}", dtype, head_dim=head_dim, value_dim=value_dim, length=500, **kind)


@pytest.mark.parametrize("head_dim, padded", [(136, 192), (160, 192), (200, 256)])
@pytest.mark.parametrize("kind", [{}, {"causal": False}, {"stateful": True}], ids=str)
def test_wide_heads(head_dim, padded, kind):
    check(f"chunks at {padded}", BFLOAT, head_dim=head_dim, value_dim=head_dim, length=500, **kind)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("head_dim, value_dim, padded", [(24, 24, 32), (48, 40, 64), (9, 33, 64), (112, 112, 128)])
@pytest.mark.parametrize("kind", [
    {"noisy": True}, {"decay": "key_head", "stateful": True}, {"decay": "query_token", "segments": "packed"},
    {"decay": "key_token", "segments": "left", "stateful": True, "noisy": True}, {"causal": False, "segments": "mask", "stateful": True},
], ids=str)  # fmt: skip
def test_what_multiplies_the_weights(dtype, head_dim, value_dim, padded, kind):
    check(f"stream at {padded}", dtype, head_dim=head_dim, value_dim=value_dim, length=500, **kind)


@pytest.mark.parametrize("head_dim, value_dim, padded", [(24, 24, 32), (40, 64, 64), (48, 48, 64), (72, 72, 80), (112, 100, 128)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [64, 333, 1000])
def test_second_degree(head_dim, value_dim, padded, causal, length):
    check(f"pairs at {padded}", BFLOAT, degree=2, causal=causal, head_dim=head_dim, value_dim=value_dim, length=length)


def test_a_long_second_degree():
    """On Hopper beside a state, which is of the wider rows: where the call's own is asked for, nothing is padded."""
    kind = {"degree": 2, "head_dim": 48, "value_dim": 48, "length": 9000, "batch": 1, "heads": 2, "key_heads": 1}
    assert paths_of(BFLOAT, **kind)[0] == "pairs at 64"
    compare(BFLOAT, **kind)
    x = torch.empty(1, 2, 9000, 48, device="cuda", dtype=BFLOAT)
    assert cuda.paths(x, x, x, degree=2, return_state=True)[0] == "generic"


@pytest.mark.parametrize("dtype, head_dim", [(BFLOAT, 48), (BFLOAT, 9), (BFLOAT, 64), (FLOAT, 24)], ids=str)
def test_layouts_give_the_same_bits(dtype, head_dim):
    """Transformers' layout, rows that begin anywhere, and heads of one projection."""
    packed = torch.randn(2, 133, 3, 4, head_dim + 3, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    query, key, value = (packed[:, :, i, :, 1:-2].transpose(1, 2) for i in range(3))
    assert " at " in cuda.paths(query, key, value)[0]
    out = linear_attention(query, key, value)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, linear_attention(query.contiguous(), key.contiguous(), value.contiguous()))


@pytest.mark.parametrize("dtype, degree", [(BFLOAT, 1), (FLOAT, 1), (BFLOAT, 2)], ids=str)
def test_results_are_written_whole_and_repeat(dtype, degree):
    inputs, upstream = operator_case(dtype, degree=degree, head_dim=40, value_dim=24, length=333)

    def results():
        poison = [torch.full_like(x, float("nan")) for x in (*inputs[:3], *inputs[:3])]
        del poison  # the allocator hands the same memory out again
        return run(cuda, inputs, upstream, False)

    first = results()
    assert all(x.isfinite().all() for x in first.values())
    for _ in range(50):
        assert [name for name, x in results().items() if not torch.equal(x, first[name])] == []


def test_graph_capture():
    inputs, upstream = operator_case(BFLOAT, head_dim=48, value_dim=48, length=600, stateful=True)
    first = run(cuda, inputs, upstream, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(cuda, inputs, upstream, True)
    captured["out"].zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, first[name]) for name, x in captured.items())


def test_copies_are_gone_behind_the_call():
    """What stays is the output and, for backward, the masses."""
    x = torch.randn(1, 8, 4096, 48, device="cuda", dtype=BFLOAT)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = linear_attention(x, x, x)
    assert torch.cuda.memory_allocated() - before < 1.1 * out.numel() * out.element_size()
