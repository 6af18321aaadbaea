"""float32 and wide heads on the tensor cores, held to the bar of `accuracy_bar.py`, and that it is this path that is looked at."""

import pytest
import torch
from accuracy_bar import assert_bar, compare, operator_case, run

from hf_linattn import linear_attention
from hf_linattn.ops import chunked, cuda, reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_only")]
SHAPES = [*((torch.float32, head_dim) for head_dim in (32, 64, 80, 96, 128)), (torch.bfloat16, 192), (torch.bfloat16, 256)]
every_shape = pytest.mark.parametrize("dtype, head_dim", SHAPES, ids=str)


def path(dtype, head_dim, causal=True, value_dim=None, heads=4, key_heads=2, length=37, **kind):
    query = torch.empty(2, heads, length, head_dim, dtype=dtype, device="cuda")
    key = torch.empty(2, key_heads, length, head_dim, dtype=dtype, device="cuda")
    value = torch.empty(2, key_heads, length, value_dim or head_dim, dtype=dtype, device="cuda")
    return cuda.paths(query, key, value, causal=causal, **kind)


def three(inputs, upstream):
    """The exact results, PyTorch's in the same dtype, and ours."""
    return run(chunked, inputs, upstream, False, torch.float64), run(chunked, inputs, upstream, False), run(cuda, inputs, upstream, False)


def check(dtype, head_dim, **kind):
    assert path(dtype, head_dim, kind.get("causal", True)) == ("chunks", "chunks")
    compare(dtype, head_dim=head_dim, value_dim=head_dim, **kind)


@every_shape
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 129, 1000, 2049])
def test_lengths(dtype, head_dim, length):
    check(dtype, head_dim, length=length)


@every_shape
@pytest.mark.parametrize("kind", [
    {"causal": False}, {"causal": False, "stateful": True}, {"stateful": True}, {"stateful": True, "length": 90},
    {"heads": 8, "key_heads": 1}, {"heads": 6, "key_heads": 6, "batch": 3},
], ids=str)  # fmt: skip
def test_kinds(dtype, head_dim, kind):
    check(dtype, head_dim, **kind)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("kind", [{}, {"key_heads": 16, "stateful": True}], ids=str)
def test_heads_that_fill_the_card(head_dim, kind):
    """Each block walks over many chunks, and takes the state with it."""
    shape = {"batch": 12, "heads": 32, "key_heads": 32, "length": 500} | kind
    query, key = (torch.empty(12, shape[heads], 500, head_dim, device="cuda") for heads in ("heads", "key_heads"))
    assert all(plan.chunk * plan.segments < 500 for plan in cuda.plans(query, key, key))
    check(torch.float32, head_dim, **shape)


@every_shape
def test_without_unit_length(dtype, head_dim):
    assert path(dtype, head_dim, normalize_qk=False) == ("chunks", "chunks")
    inputs, upstream = operator_case(dtype, head_dim=head_dim, value_dim=head_dim, length=300)
    inputs[-1] = False
    inputs[3][1] *= 0.1 / head_dim  # b: so that masses stay away from 0
    exact, plain, ours = three(inputs, upstream)
    for name, x in ours.items():
        if name != "gradient of coefficients":
            assert_bar(name, x, plain[name], exact[name], 3 if name.startswith("gradient") else 2, dtype)


@every_shape
def test_results_are_written_whole_and_repeat(dtype, head_dim):
    inputs, upstream = operator_case(dtype, head_dim=head_dim, value_dim=head_dim, length=333)

    def results():
        poison = [torch.full_like(x, float("nan")) for x in (*inputs[:3], *inputs[:3])]
        del poison  # the allocator hands the same memory out again
        return run(cuda, inputs, upstream, False)

    first = results()
    assert all(x.isfinite().all() for x in first.values())
    for _ in range(50):
        assert [name for name, x in results().items() if not torch.equal(x, first[name])] == []


@pytest.mark.parametrize("exponent", [-20, -10, 10, 20])
def test_values_and_gradients_of_any_size(exponent):
    """Rows of float32 in float16 parts: powers of two bring them into range, whatever their size, each token's its own."""
    inputs, upstream = operator_case(torch.float32, head_dim=64, value_dim=64, length=400)
    sizes = torch.exp2(torch.linspace(-exponent, exponent, 400, device="cuda"))[:, None]
    inputs[2], upstream = inputs[2] * sizes, (upstream[0] / sizes, *upstream[1:])
    exact, plain, ours = three(inputs, upstream)
    for name, x in ours.items():
        assert_bar(name, x, plain[name], exact[name], 3 if name.startswith("gradient") else 2, torch.float32)


@pytest.mark.parametrize("gradient, value", [(1e-24, 1.0), (1e-12, 1e-12), (1.0, 1e-20), (1e12, 1e12)], ids=str)
def test_small_and_large_gradients(gradient, value):
    """As a mean over many tokens makes them: nothing falls below what a part of a factor can hold."""
    inputs, upstream = operator_case(torch.float32, value_dim=32, length=300)
    inputs[2] = inputs[2] * value
    upstream = [None if x is None else x * gradient * (1 if i == 0 else value) for i, x in enumerate(upstream)]
    exact, plain, ours = three(inputs, upstream)
    for name, x in ours.items():
        assert_bar(name, x, plain[name], exact[name], 3 if name.startswith("gradient") else 2, torch.float32)


def test_features_of_unlike_sizes():
    """Elements a thousandth and a hundred thousandth of their row's largest keep their own precision."""
    inputs, upstream = operator_case(torch.float32, head_dim=64, value_dim=64, length=400)
    inputs[2][..., 16:32] *= 1e-3
    inputs[2][..., 32:] *= 1e-5
    exact, plain, ours = (results["out"] for results in three(inputs, upstream))
    for part in (slice(0, 16), slice(16, 32), slice(32, 64)):
        assert_bar(str(part), ours[..., part], plain[..., part], exact[..., part], 2, torch.float32)


@every_shape
def test_strides(dtype, head_dim):
    """Transformers' layout, and heads cut out of one projection."""
    packed = torch.randn(2, 133, 3, 4, head_dim, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    query, key, value = (packed[:, :, i].transpose(1, 2) for i in range(3))
    assert cuda.paths(query, key, value) == ("chunks", "chunks")
    out = linear_attention(query, key, value)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, linear_attention(query.contiguous(), key.contiguous(), value.contiguous()))


def test_zero_vectors_have_no_direction():
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (torch.randn(1, 2, 200, 64, device="cuda", generator=generator) for _ in range(3))
    query[:, :, 7] = 0
    key[:, :, :50] = 0
    out, exact = linear_attention(query, key, value), reference(query.double(), key.double(), value.double())
    assert ((out - exact).norm() / exact.norm()).item() < 2e-6


def test_what_others_take():
    segments, decay = torch.ones(2, 37, dtype=torch.int32, device="cuda"), torch.zeros(2, device="cuda")
    noise = torch.tensor(0.1, device="cuda")
    for other in ({"segments": segments}, {"log_decay": decay}, {"dropout_p": noise}, {"degree": 2}, {"value_dim": 32}):
        assert path(torch.float32, 64, **other) == ("generic", "generic")
    assert path(torch.bfloat16, 64) == ("stream", "stream")
    assert path(torch.float16, 192) == path(torch.float32, 192) == path(torch.float32, 136) == ("generic", "generic")


@pytest.mark.parametrize("dtype, head_dim", [(torch.float32, 64), (torch.bfloat16, 256)], ids=str)
def test_graph_capture(dtype, head_dim):
    inputs, upstream = operator_case(dtype, head_dim=head_dim, value_dim=head_dim, length=600)
    first = run(cuda, inputs, upstream, False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(cuda, inputs, upstream, False)
    captured["out"].zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, first[name]) for name, x in captured.items())
