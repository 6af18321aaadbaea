"""The second degree beside a decay, runs of tokens and keys narrower than values, held to the bar of `accuracy_bar.py`. Every test makes
sure that it is the kernels of pairs that it looks at."""

import pytest
import torch
from accuracy_bar import compare, distance, operator_case, run

from hf_linattn import linear_attention
from hf_linattn.ops import chunked, cuda, reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_only")]
DIMS = [(32, 32), (64, 64), (128, 128), (8, 64), (16, 64), (24, 64), (32, 64), (16, 128), (32, 128)]


def check(head_dim, value_dim, **kind):
    kind = {"degree": 2, "head_dim": head_dim, "value_dim": value_dim, "length": 333} | kind
    inputs = operator_case(torch.bfloat16, **kind)[0]
    options = {"causal": kind.get("causal", True), "log_decay": inputs[4], "segments": inputs[5]}
    assert cuda.paths(*inputs[:3], degree=2, **options) == ("pairs", "pairs")
    compare(torch.bfloat16, **kind)


@pytest.mark.parametrize("head_dim, value_dim", DIMS)
@pytest.mark.parametrize("decay", [None, "key_head", "query_head", "key_token", "query_token"])
@pytest.mark.parametrize("segments", [None, "packed", "left", "mask"])
def test_gates(head_dim, value_dim, decay, segments):
    if decay is None and segments is None and head_dim == value_dim:
        pytest.skip("test_gpu_pairs.py has it")
    check(head_dim, value_dim, decay=decay, segments=segments)


@pytest.mark.parametrize("head_dim, value_dim", DIMS)
def test_both_sides(head_dim, value_dim):
    check(head_dim, value_dim, causal=False, segments="mask")


@pytest.mark.parametrize("length", [32, 63, 64, 65, 127, 128, 129, 1000, 2050, 4097])
def test_lengths(length):
    check(16, 64, length=length, decay="key_head", batch=1)
    check(64, 64, length=length, decay="query_token", segments="packed", batch=1)


@pytest.mark.parametrize("heads, key_heads", [(8, 1), (6, 2), (32, 4), (5, 5)])
@pytest.mark.parametrize("decay", ["key_head", "query_head"])
def test_grouped_queries(heads, key_heads, decay):
    check(16, 64, heads=heads, key_heads=key_heads, decay=decay, segments="left")


@pytest.mark.parametrize(
    "head_dim, value_dim, length", [(32, 32, 3601), (64, 64, 8300), (8, 64, 3585), (16, 128, 5000), (24, 64, 9001), (32, 128, 8193)]
)
@pytest.mark.parametrize("kind", [
    {"decay": "key_token", "strengths": (0.01, 0.1, 1.0)}, {"decay": "key_head", "strengths": (0.003, 0.01)}, {"segments": "packed"},
    {"decay": "key_token", "strengths": (0.003,), "segments": "mask"}, {"decay": "key_head", "strengths": (0.01,), "segments": "left"}, {},
], ids=str)  # fmt: skip
def test_gradients_of_long_sequences(head_dim, value_dim, length, kind):
    """Pairs are formed inside chunks, and what lies outside comes out of states."""
    kind = {"degree": 2, "head_dim": head_dim, "value_dim": value_dim, "length": length, "batch": 1, "heads": 2, "key_heads": 1} | kind
    inputs = operator_case(torch.bfloat16, **kind)[0]
    plan = cuda.plans(*inputs[:3], degree=2, log_decay=inputs[4], segments=inputs[5])[1]
    assert plan.engine == "pairs" and plan.chunk < length
    compare(torch.bfloat16, **kind)


@pytest.mark.parametrize("strengths", [(), (0.1,), (0.003,)])
@pytest.mark.parametrize("head_dim, length", [(16, 3600), (16, 30_000), (64, 9000)])
def test_rates_of_long_sequences(head_dim, length, strengths):
    """The gradient of a rate counts every token's small difference of sums, rounded each for itself, as often as tokens lie before."""
    kind = {"head_dim": head_dim, "value_dim": 64, "length": length, "batch": 1, "heads": 16, "key_heads": 16, "strengths": strengths}
    inputs, upstream = operator_case(torch.bfloat16, degree=2, decay="key_head", **kind)
    exact = run(chunked, inputs, upstream, False, torch.float64)["gradient of log_decay"]
    assert distance(run(cuda, inputs, upstream, False)["gradient of log_decay"], exact) < 0.02


def rows(length=700, heads=4, key_heads=2, head_dim=16, value_dim=64):
    generator = torch.Generator("cuda").manual_seed(0)
    random = lambda *shape: torch.randn(*shape, device="cuda", generator=generator).bfloat16()  # noqa: E731
    return random(2, heads, length, head_dim), random(2, key_heads, length, head_dim), random(2, key_heads, length, value_dim)


@pytest.mark.parametrize("rate, lag", [(-1e-6, 0), (-0.5, 0), (-3.0, 0), (-80.0, 0), (-1e-6, 64), (-3.0, 64)])
def test_rates_of_any_size(rate, lag):
    """A key's factor may leave the number range, and what is near a query stays exact."""
    query, key, value = rows()
    decay, options = torch.full((2,), rate, device="cuda"), {"c": 0.5, "lag": lag}
    out = linear_attention(query, key, value, log_decay=decay, **options)
    exact = reference(*(x.double() for x in (query, key, value)), log_decay=decay.double(), **options)
    assert ((out - exact).norm() / exact.norm()).item() < 5e-3


def test_long_sums_of_a_decay():
    """The decay's running sum reaches thousands, where float32 has no hundredths left; only differences count."""
    query, key, value = rows(length=8000, heads=2, key_heads=2)
    decay = -4 * torch.rand(2, 2, 8000, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    assert cuda.paths(query, key, value, degree=2, log_decay=decay)[0] == "pairs"
    out = linear_attention(query, key, value, c=0.5, log_decay=decay)
    exact = reference(*(x.double() for x in (query, key, value)), c=0.5, log_decay=decay.double())
    assert ((out - exact).norm() / exact.norm()).item() < 5e-3


@pytest.mark.parametrize("head_dim", [16, 64])
def test_no_padding_is_read_and_every_result_is_written(head_dim):
    kind = {"degree": 2, "decay": "key_token", "segments": "mask", "length": 333, "head_dim": head_dim, "value_dim": 64}
    inputs, upstream = operator_case(torch.bfloat16, **kind)
    plain, padding = run(cuda, inputs, upstream, False), (inputs[5] <= 0)[:, None, :, None]
    poisoned = [x.masked_fill(padding, float("nan")) for x in inputs[:3]]
    upstream = [upstream[0].masked_fill(padding, float("nan")), upstream[1].masked_fill(padding[..., 0], float("nan")), None]
    for _ in range(20):
        free = [torch.full_like(x, float("nan")) for x in (*inputs[:3], upstream[0]) for _ in range(2)]
        del free  # the allocator hands the same memory out again
        for name, x in run(cuda, [*poisoned, *inputs[3:]], upstream, False).items():
            assert torch.equal(x, plain[name]), name


def test_graph_capture():
    inputs, upstream = operator_case(torch.bfloat16, degree=2, decay="key_head", segments="packed", length=333, head_dim=16, value_dim=64)
    expected = run(cuda, inputs, upstream, False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(cuda, inputs, upstream, False)
    for x in captured.values():
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, expected[name]) for name, x in captured.items())
