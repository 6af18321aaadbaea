"""The compiled kernels as launches: every output written, the same bits each time, graphs, compilation, memory, strides."""

import pytest
import torch
from operator_cases import gradients, make_inputs
from torch.library import opcheck

from hf_linattn import linear_attention
from hf_linattn.ops import cuda, operators
from hf_linattn.ops.segments import canonical_segments

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_only")]


def inputs(dtype=torch.bfloat16, **kind):
    tensors, options = make_inputs(dtype=torch.float32, device="cuda", **kind)
    return [x.detach().to(dtype).requires_grad_() for x in tensors], options


KINDS = [
    {"length": 1000, "head_dim": 64, "value_dim": 64}, {"length": 300, "head_dim": 128, "value_dim": 128, "decay": "key_head"},
    {"length": 333, "head_dim": 32, "value_dim": 32, "decay": "query_token", "segments": "packed"},
    {"length": 200, "head_dim": 64, "value_dim": 64, "quadratic": True}, {"length": 63, "head_dim": 48, "value_dim": 80},
    {"length": 300, "head_dim": 48, "value_dim": 40, "decay": "key_head"},
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_output_is_written(dtype, kind, monkeypatch):
    """Memory that PyTorch hands out is full of NaN here: what a kernel reads before writing, or never writes, shows."""
    tensors, options = inputs(dtype, **kind)
    expected, expected_grads = gradients(linear_attention, tensors, options)
    made = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(255) if k.get("dtype") == torch.uint8 else empty(*a, **k))
        out, grads = gradients(linear_attention, tensors, options)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = made
    assert torch.equal(out, expected)
    for name, grad in grads.items():
        assert torch.equal(grad, expected_grads[name]), name


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_250_repeats_give_the_same_bits(kind):
    tensors, options = inputs(**kind)
    first, first_grads = gradients(linear_attention, tensors, options)
    same = torch.ones((), dtype=torch.bool, device="cuda")
    for _ in range(250):
        out, grads = gradients(linear_attention, tensors, options)
        same &= (out == first).all()
        for name, grad in grads.items():
            same &= (grad == first_grads[name]).all()
    assert same.item()


@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_cuda_graph(kind):
    tensors, options = inputs(**kind)
    options = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    options.pop("segment_ids", None)
    upstream = torch.randn(2, 4, kind["length"], kind["value_dim"], device="cuda").to(tensors[0].dtype)

    def step():
        out = linear_attention(*tensors, **options)
        return out, *torch.autograd.grad(out, tensors, upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in tensors:
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for ours, eager in zip(captured, step(), strict=True):
        assert torch.equal(ours, eager)


def test_a_call_does_not_wait_for_the_device():
    tensors, options = inputs(length=500, head_dim=64, value_dim=64, decay="key_head")
    gradients(linear_attention, tensors, options)
    upstream = torch.randn(2, 4, 500, 64, device="cuda").to(tensors[0].dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = linear_attention(*tensors, **options)
        torch.autograd.grad(out, tensors, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", [{}, {"decay": "query_token", "segments": "packed"}, {"quadratic": True}], ids=str)
def test_compile_fullgraph(case):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x, **k: linear_attention(*x, **k).sin(), fullgraph=True)
    tensors, options = inputs(torch.float32, length=130, head_dim=32, value_dim=32, **case)
    expected, expected_grads = gradients(lambda *x, **k: linear_attention(*x, **k).sin(), tensors, options)
    out, grads = gradients(compiled, tensors, options)
    torch.testing.assert_close(out, expected)
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name])


@pytest.mark.parametrize("quadratic", [False, True])
def test_opcheck(quadratic):
    tensors, options = inputs(torch.float32, length=70, head_dim=16, value_dim=8, decay="key_token", segments="packed", quadratic=quadratic)
    rows = [options[name] if name in options else torch.zeros(4, device="cuda") for name in ("a", "b", "c", "temperature")]
    coefficients = torch.stack(rows).detach().requires_grad_()
    runs = canonical_segments(options["segment_ids"], 2, 70)
    absent = None, None, None
    arguments = (*tensors, coefficients, options["log_decay"], runs, runs, *absent, 2 if quadratic else 1, True, True, True)
    opcheck(torch.ops.linattn.forward.default, arguments)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    out, mass, state = torch.ops.linattn.forward(*plain)
    *rest, degree, causal, normalize_qk, _ = plain
    upstream = torch.rand_like(out), torch.rand_like(mass), torch.rand_like(state)
    opcheck(torch.ops.linattn.backward.default, (*rest, degree, causal, normalize_qk, out, mass, *upstream))


def test_transformers_layout_strides_and_broadcasts():
    (query, key, value), _ = inputs(length=130, head_dim=64, value_dim=64, learned=False)
    query, key, value = (x.detach() for x in (query, key, value))
    expected = linear_attention(query, key, value)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    out = linear_attention(*turned)
    assert torch.equal(out, expected) and out.transpose(1, 2).is_contiguous()
    fused = torch.cat([x.transpose(1, 2) for x in (query, key, value)], 2).transpose(1, 2)
    assert torch.equal(linear_attention(fused[:, :4], fused[:, 4:6], fused[:, 6:]), expected)
    odd = torch.zeros(2, 4, 130, 67, device="cuda", dtype=query.dtype)[..., 1:65].copy_(query)
    torch.testing.assert_close(linear_attention(odd, key, value), expected, rtol=1e-2, atol=1e-2)
    one = value[:, :1, :, :1].expand(2, 2, 130, 64)
    assert torch.equal(linear_attention(query, key, one), linear_attention(query, key, one.contiguous()))


@pytest.mark.parametrize("segments", ["left", "right", "middle", "packed"])
@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_at_padding_reaches_a_token(segments, quadratic, dtype):
    tensors, options = inputs(dtype, length=200, head_dim=64, value_dim=64, segments=segments, decay="key_head", quadratic=quadratic)
    padding = (options["segment_ids"] == 0)[:, None, :, None]
    options = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    results = []
    for filler in (0.0, float("nan")):
        filled = [x.detach().masked_fill(padding, filler).requires_grad_() for x in tensors]
        out = linear_attention(*filled, **options)
        assert torch.equal(out.masked_fill(~padding, 0), torch.zeros_like(out))
        results.append((out, *torch.autograd.grad(out, filled, torch.ones_like(out).masked_fill(padding, filler))))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_grows_with_length_alone(dtype):
    """Forward and backward together take a few tensors' worth, at any length: nothing is kept of N x N or N x D x D."""
    peaks = []
    for length in (4096, 16384):
        query, key, value = (torch.randn(1, 8, length, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
        upstream = torch.randn(1, 8, length, 64, device="cuda", dtype=dtype)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(linear_attention(query, key, value, b=0.5), (query, key, value), upstream)
        peaks.append((torch.cuda.max_memory_allocated() - before) / (query.numel() * query.element_size()))
    assert max(peaks) < 7, peaks
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_a_tensor_beyond_32_bit_offsets():
    """2^31 elements and more: the last head of a large batch equals the same head alone."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs about 40 GB of device memory")
    query = torch.randn(1, 33, 2**20, 64, device="cuda", dtype=torch.bfloat16)
    out = linear_attention(query, query, query, b=0.5)
    alone = linear_attention(*(query[:, -1:].contiguous(),) * 3, b=0.5)
    # not bit by bit: how a sequence is cut may depend on how many heads there are to fill the card
    assert (out[:, -1:].float() - alone.float()).norm() < 0.01 * alone.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_million_tokens(dtype):
    """N = 2^24: some outputs and some gradients of values, each summed over all tokens in float64."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs about 30 GB of device memory")
    length, b = 2**24, 0.5
    query, key, value, upstream = (torch.randn(1, 1, length, 32, device="cuda", dtype=dtype).requires_grad_() for _ in range(4))
    with torch.no_grad():
        value += 1.0  # sums that grow with N
    out = linear_attention(query, key, value, b=b)
    (grad,) = torch.autograd.grad(out, value, upstream)
    with torch.no_grad():
        q, k, v, w = (x[0, 0].double() for x in (query, key, value, upstream))
        q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
        mass = torch.arange(1, length + 1, device="cuda", dtype=torch.float64) + b * (q * k.cumsum(0)).sum(-1)
        places = [0, 1, 63, 1000, 2**20 + 5, 2**23, length - 2, length - 1]
        rows = torch.stack([(1 + b * k[: i + 1] @ q[i]) @ v[: i + 1] / mass[i] for i in places])
        columns = torch.stack([((1 + b * q[n:] @ k[n]) / mass[n:]) @ w[n:] for n in places])
    for ours, exact in ((out[0, 0, places], rows), (grad[0, 0, places], columns)):
        error = (ours.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert error[exact.norm(dim=-1) > 2**-14].max() < (2e-2 if dtype == torch.bfloat16 else 3e-3), error


def test_backend_variable(monkeypatch):
    (query, key, value), _ = inputs(torch.float32, length=50, learned=False)
    ours = linear_attention(query, key, value)
    monkeypatch.setenv("HF_LINATTN_BACKEND", "torch")
    assert cuda.paths(query, key, value) == ("torch", "torch")
    torch.testing.assert_close(linear_attention(query, key, value), ours, rtol=1e-4, atol=1e-5)
    monkeypatch.setenv("HF_LINATTN_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="float64"):
        linear_attention(query.double(), key.double(), value.double())


@pytest.mark.parametrize("kind", [{}, {"decay": "key_token"}], ids=str)
def test_backward_takes_over_the_states_that_forward_made(monkeypatch, kind):
    """One kernel less, the same bits."""
    tensors, options = inputs(batch=1, heads=2, key_heads=2, length=4096, head_dim=64, value_dim=64, **kind)

    def run():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            out, grads = gradients(linear_attention, tensors, options)
            torch.cuda.synchronize()
        return [out, *grads.values()], sum("segments_kernel" in event.name for event in profile.events())

    run()
    found, launched = run()
    monkeypatch.setitem(operators._KEEPING, "cuda", lambda *call: (cuda.forward(*call), None))
    remade, more = run()
    assert launched + 1 == more
    assert all(torch.equal(x, y) for x, y in zip(found, remade, strict=True))
