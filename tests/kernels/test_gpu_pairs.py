"""The second degree on the tensor cores, held to the bar of `accuracy_bar.py`. Every test makes sure that it is this path it looks at."""

import pytest
import torch
from accuracy_bar import assert_bar, assert_bars, check, operator_case, run

from hf_linattn import linear_attention
from hf_linattn.ops import chunked, cuda, reference
from hf_linattn.ops.call import Call

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_only")]
DIMS = (32, 64, 80, 96, 128)
DTYPES = (torch.bfloat16, torch.float16)


def paths(dtype, head_dim, causal=True, heads=4, key_heads=2, length=37, normalize_qk=True, **kind):
    query = torch.empty(2, heads, length, head_dim, dtype=dtype, device="cuda")
    key = torch.empty(2, key_heads, length, head_dim, dtype=dtype, device="cuda")
    return cuda.paths(query, key, key, degree=2, causal=causal, normalize_qk=normalize_qk, **kind)


def path(*args, **kind):
    return paths(*args, **kind)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("length", [33, 128, 333, 1000])
def test_shapes(dtype, causal, head_dim, length):
    assert path(dtype, head_dim, causal, length=length) == "pairs"
    check(dtype, causal, length=length, head_dim=head_dim, value_dim=head_dim, quadratic=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [32, 63, 64, 65, 127, 129, 4097])
def test_lengths(dtype, length):
    assert path(dtype, 64, length=length) == "pairs"
    check(dtype, length=length, head_dim=64, value_dim=64, quadratic=True, batch=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads, key_heads", [(8, 1), (6, 2), (32, 4), (5, 5)])
def test_grouped_queries(dtype, causal, heads, key_heads):
    assert path(dtype, 64, causal, heads, key_heads) == "pairs"
    check(dtype, causal, heads=heads, key_heads=key_heads, length=300, head_dim=64, value_dim=64, quadratic=True)


def test_without_unit_length():
    assert path(torch.bfloat16, 64, normalize_qk=False) == "pairs"
    assert path(torch.float16, 64, normalize_qk=False) == "generic"  # weights may pass its largest number
    check(torch.bfloat16, normalize_qk=False, quadratic=True, length=200, head_dim=64, value_dim=64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", DIMS)
def test_mass_is_the_sum_of_weights_and_every_result_is_written(dtype, head_dim):
    inputs, _ = operator_case(dtype, degree=2, length=333, head_dim=head_dim, value_dim=head_dim)
    exact_out, exact_mass, _ = chunked.forward(Call(*(x.double() if isinstance(x, torch.Tensor) else x for x in inputs)), False)
    poison = [torch.full((2, 4, 333, head_dim), float("nan"), dtype=dtype, device="cuda") for _ in range(4)]
    del poison  # the allocator hands the same memory out again
    out, mass, _ = cuda.forward(Call(*inputs), False)
    assert ((mass - exact_mass).norm() / exact_mass.norm()).item() < 1e-5
    assert ((out - exact_out).norm() / exact_out.norm()).item() < (5e-3 if dtype == torch.bfloat16 else 6e-4)
    for _ in range(3):
        again = cuda.forward(Call(*inputs), False)
        assert torch.equal(out, again[0]) and torch.equal(mass, again[1])


by_state = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="Hopper's alone")


@by_state
@pytest.mark.parametrize("heads, key_heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("head_dim, length", [(32, 3585), (32, 5000), (64, 7169), (64, 8192), (64, 10_001), (32, 50_000)])
def test_long_sequences(head_dim, length, heads, key_heads):
    """What lies before a chunk of 32 D tokens comes out of a state; the last one is the caller's."""
    assert path(torch.bfloat16, head_dim, True, heads, key_heads, length) == "pairs"
    kind = {"length": length, "head_dim": head_dim, "value_dim": head_dim, "batch": 1, "heads": heads, "key_heads": key_heads}
    inputs, _ = operator_case(torch.bfloat16, degree=2, **kind)
    inputs[2] = inputs[2] + 0.5  # so that sums over many tokens keep something
    exact = chunked.forward(Call(*(x.double() if isinstance(x, torch.Tensor) else x for x in inputs)), True)
    plain, ours = chunked.forward(Call(*inputs), True), cuda.forward(Call(*inputs), True)
    for name, x, beside, truth in zip(("out", "mass", "state"), ours, plain, exact, strict=True):
        assert_bar(name, x, beside, truth, 2, torch.bfloat16)
    again = cuda.forward(Call(*inputs), False)
    assert torch.equal(again[0], ours[0]) and torch.equal(again[1], ours[1])


@by_state
def test_long_sequences_without_unit_length():
    inputs, _ = operator_case(torch.bfloat16, degree=2, length=7300, head_dim=64, value_dim=64, batch=1)
    inputs[-1] = False
    exact = chunked.forward(Call(*(x.double() if isinstance(x, torch.Tensor) else x for x in inputs)), False)
    plain, ours = chunked.forward(Call(*inputs), False), cuda.forward(Call(*inputs), False)
    for name, x, beside, truth in zip(("out", "mass"), ours, plain, exact, strict=False):
        assert_bar(name, x, beside, truth, 2, torch.bfloat16)


LONG = [(32, 2561, 2, 2), (32, 5003, 4, 1), (64, 5121, 2, 2), (64, 9001, 4, 1), (64, 10_240, 2, 2), (32, 50_000, 1, 1)]


@pytest.mark.parametrize("head_dim, length, heads, key_heads", LONG)
@pytest.mark.parametrize("normalize_qk", [True, False])
def test_gradients_of_long_sequences(head_dim, length, heads, key_heads, normalize_qk):
    """Pairs are formed inside chunks, and what lies outside comes out of states."""
    kind = {"length": length, "head_dim": head_dim, "value_dim": head_dim, "batch": 1, "heads": heads, "key_heads": key_heads}
    inputs, upstream = operator_case(torch.bfloat16, degree=2, **kind)
    inputs[2] = inputs[2] + 0.5  # so that what is left of large sums counts
    inputs[-1] = normalize_qk
    plan = cuda.plans(*inputs[:3], degree=2, normalize_qk=normalize_qk)[1]
    assert plan.engine == "pairs" and plan.chunk < length
    exact, plain = run(chunked, inputs, upstream, False, torch.float64), run(chunked, inputs, upstream, False)
    first = run(cuda, inputs, upstream, False)
    assert_bars(first, plain, exact, torch.bfloat16)
    for _ in range(5):
        poison = [torch.full_like(x, float("nan")) for x in inputs[:3]]
        del poison  # the allocator hands the same memory out again
        again = run(cuda, inputs, upstream, False)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_memory_of_long_gradients():
    """The states of the chunks, and not more than a few tensors."""
    x = torch.empty(1, 32, 65_536, 64, dtype=torch.bfloat16, device="cuda")
    for plan in cuda.plans(x, x, x, degree=2):
        assert plan.workspace_bytes < 6 * 2 * x.numel()


def test_state_asked_for():
    inputs, _ = operator_case(torch.bfloat16, degree=2, length=333, head_dim=64, value_dim=64)
    exact = chunked.forward(Call(*(x.double() if isinstance(x, torch.Tensor) else x for x in inputs)), True)
    ours = cuda.forward(Call(*inputs), True)
    for x, truth in zip(ours, exact, strict=True):
        assert ((x - truth).norm() / truth.norm()).item() < 5e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    """Transformers' layout, and heads cut out of one projection."""
    packed = torch.randn(2, 133, 3, 4, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    query, key, value = (packed[:, :, i].transpose(1, 2) for i in range(3))
    assert cuda.paths(query, key, value, degree=2)[0] == "pairs"
    out = linear_attention(query, key, value, c=0.5)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, linear_attention(query.contiguous(), key.contiguous(), value.contiguous(), c=0.5))


def rows(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    return (torch.randn(1, 2, 200, 64, device="cuda", generator=generator).to(dtype) for _ in range(3))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", DIMS)
def test_gradients_are_written_whole_and_repeat(causal, head_dim):
    assert paths(torch.bfloat16, head_dim, causal, length=333)[1] == "pairs"
    inputs, _ = operator_case(torch.bfloat16, degree=2, length=333, head_dim=head_dim, value_dim=head_dim)
    rows = [x.requires_grad_() for x in inputs[:3]]
    upstream = torch.randn(2, 4, 333, head_dim, dtype=torch.bfloat16, device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def gradients():
        poison = [torch.full_like(x, float("nan")) for x in (*rows, upstream)]
        del poison  # the allocator hands the same memory out again
        return torch.autograd.grad(linear_attention(*rows, c=0.5, causal=causal), rows, upstream)

    first = gradients()
    assert all(x.isfinite().all() for x in first)
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(first, gradients(), strict=True))


def test_large_weights_in_float16():
    query, key, value = rows(torch.float16)
    options = {"a": 1.0, "b": 1.0, "c": 0.5, "temperature": 1000.0}
    out, exact = linear_attention(query, key, value, **options), reference(query.double(), key.double(), value.double(), **options)
    assert ((out - exact).norm() / exact.norm()).item() < 2e-3


def test_zero_vectors_have_no_direction():
    query, key, value = rows(torch.bfloat16)
    query[:, :, 7] = 0
    key[:, :, :50] = 0
    out = linear_attention(query, key, value, c=0.5)
    exact = reference(query.double(), key.double(), value.double(), c=0.5)
    assert ((out - exact).norm() / exact.norm()).item() < 5e-3


def test_what_others_take():
    def kinds(**kind):
        return path(torch.bfloat16, 64, **kind)

    segments = torch.ones(2, 37, dtype=torch.int32, device="cuda")
    assert kinds(dropout_p=torch.tensor(0.1, device="cuda")) == path(torch.float16, 64, segments=segments) == "generic"
    assert path(torch.float32, 64) == path(torch.bfloat16, 136) == path(torch.bfloat16, 64, length=31) == "generic"
    assert path(torch.float16, 32, length=8192) == "pairs" and path(torch.float16, 32, length=8193) == "generic"
    assert paths(torch.bfloat16, 128, length=131_072)[1] == "pairs" and paths(torch.bfloat16, 128, length=131_073)[1] == "generic"
    assert paths(torch.bfloat16, 32, False, length=8193)[1] == "generic" and paths(torch.bfloat16, 32, length=8193)[1] == "pairs"
    assert paths(torch.float16, 64)[1] == "generic"


def test_graph_capture():
    inputs, _ = operator_case(torch.bfloat16, degree=2, length=333, head_dim=64, value_dim=64)
    out, mass, _ = cuda.forward(Call(*inputs), False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.forward(Call(*inputs), False)
    captured[0].zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured[0], out) and torch.equal(captured[1], mass)
