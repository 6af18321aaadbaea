"""Attention over a window and sinks against its ten lines, in float64: every option, and gradients of every input."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import gradients, make_segments
from torch.nn.attention import SDPBackend, sdpa_kernel
from window_cases import make_tensors

from hf_linattn.ops import window_attention, window_reference
from hf_linattn.ops.frame import Frame

SEGMENTS = (None, "left", "right", "middle", "packed", "mask")


def assert_equal_with_gradients(tensors, **options):
    out, grads = gradients(window_attention, tensors, options)
    expected, expected_grads = gradients(window_reference, tensors, options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("window, sinks", [(1, 0), (1, 3), (5, 0), (5, 2), (8, 8), (4, 11), (26, 4), (52, 4), (53, 1), (90, 100)])
def test_equals_reference(window, sinks, segments):
    ids = None if segments is None else make_segments(segments, 2, 53)
    assert_equal_with_gradients(make_tensors(53), window=window, sinks=sinks, segment_ids=ids)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 16, 17, 24])
@pytest.mark.parametrize("segments", [None, "packed", "mask"])
def test_lengths(length, segments):
    ids = None if segments is None else make_segments(segments, 2, length)
    assert_equal_with_gradients(make_tensors(length), window=8, sinks=3, segment_ids=ids)


@pytest.mark.parametrize("head_dim, value_dim, heads, key_heads", [(1, 1, 1, 1), (8, 3, 6, 1), (48, 80, 2, 2), (5, 13, 9, 3)])
@pytest.mark.parametrize("segments", [None, "middle"])
def test_shapes(head_dim, value_dim, heads, key_heads, segments):
    ids = None if segments is None else make_segments(segments, 2, 40)
    tensors = make_tensors(40, heads=heads, key_heads=key_heads, head_dim=head_dim, value_dim=value_dim)
    assert_equal_with_gradients(tensors, window=6, sinks=2, segment_ids=ids, scaling=0.7)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_combination(data):
    draw = lambda *options: data.draw(st.sampled_from(options))  # noqa: E731
    length, batch, key_heads, segments = data.draw(st.integers(0, 60)), draw(1, 3), draw(1, 2, 3), draw(*SEGMENTS)
    ids = None if segments is None else make_segments(segments, batch, length)
    if segments == "packed" and length:  # any ids that do not fall
        steps = torch.tensor(data.draw(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=batch * length, max_size=batch * length)))
        keep = torch.tensor(data.draw(st.lists(st.sampled_from([1, 1, 0]), min_size=batch * length, max_size=batch * length)))
        ids = ((1 + steps.view(batch, length).cumsum(-1)) * keep.view(batch, length)).long()
    tensors = make_tensors(
        length, batch, key_heads * draw(1, 2, 4), key_heads, draw(1, 3, 8), draw(1, 4), seed=data.draw(st.integers(0, 99))
    )
    assert_equal_with_gradients(tensors, window=data.draw(st.integers(1, 70)), sinks=data.draw(st.integers(0, 70)), segment_ids=ids)


def test_gradcheck():
    ids = make_segments("packed", 1, 18)
    tensors = make_tensors(18, batch=1, head_dim=3, value_dim=2)
    for segment_ids in (None, ids):
        torch.autograd.gradcheck(lambda *x, ids=segment_ids: window_attention(*x, window=4, sinks=2, segment_ids=ids), tensors)


@pytest.mark.parametrize("segments", ["left", "right", "middle", "packed"])
def test_nothing_at_padding_reaches_a_token(segments):
    """NaN in query, key, value and the incoming gradient at padding changes no other row, and gives no NaN gradient."""
    ids = make_segments(segments, 2, 53)
    padding = (ids == 0)[:, None, :, None]
    results = []
    for filler in (0.0, float("nan")):
        tensors = [x.masked_fill(padding, filler).requires_grad_() for x in make_tensors(53, dtype=torch.float32, grad=False)]
        out = window_attention(*tensors, window=6, sinks=2, segment_ids=ids)
        assert torch.equal(out.masked_fill(~padding, 0), torch.zeros_like(out))
        results.append((out, *torch.autograd.grad(out, tensors, torch.ones_like(out).masked_fill(padding, filler))))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("segments", ["left", "right", "middle", "packed"])
def test_a_sequence_gives_what_it_gives_alone(segments):
    """Padding takes no place in the window, wherever it lies, and what is packed beside it none either."""
    ids = make_segments(segments, 2, 53)
    tensors = make_tensors(53, grad=False)
    together = window_attention(*tensors, window=6, sinks=2, segment_ids=ids)
    for row, run in itertools.product(range(2), range(1, int(ids.max()) + 1)):
        at = ids[row] == run
        alone = window_attention(*(x[row : row + 1, :, at] for x in tensors), window=6, sinks=2)
        torch.testing.assert_close(together[row : row + 1, :, at], alone, rtol=0, atol=1e-12)


def errors(dtype, device, segments=None, **shape):
    """The errors of output and gradients against float64 by name: ours, and the ten lines' in the same dtype."""
    ids = None if segments is None else make_segments(segments, 2, 300).to(device)
    options = {"window": 64, "sinks": 4, "segment_ids": ids}
    tensors = make_tensors(300, dtype=dtype, device=device, **shape)
    exact_tensors = [x.detach().double().requires_grad_() for x in tensors]
    results = []
    for function, given_tensors in ((window_reference, exact_tensors), (window_reference, tensors), (window_attention, tensors)):
        out, grads = gradients(function, given_tensors, options)
        results.append({"out": out} | grads)
    exact, plain, ours = results
    assert ours["out"].dtype == dtype
    distance = lambda x, name: ((x.double() - exact[name]).norm() / exact[name].norm()).item()  # noqa: E731
    return {name: (distance(ours[name], name), distance(plain[name], name)) for name in exact}


def assert_accurate(found):
    for name, (ours, plain) in found.items():
        assert ours <= (2 if name == "out" else 3) * plain + 1e-6, f"{name}: {ours:.3g}, plain {plain:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("segments", [None, "packed"])
def test_error_against_float64(dtype, segments):
    assert_accurate(errors(dtype, "cpu", segments, head_dim=32, value_dim=32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("segments", [None, "left", "packed"])
@pytest.mark.parametrize("shape", [{"head_dim": 64, "value_dim": 64}, {"heads": 9, "key_heads": 3, "head_dim": 64, "value_dim": 64},
                                   {"head_dim": 20, "value_dim": 12}])  # fmt: skip
def test_error_against_float64_on_a_gpu(dtype, segments, shape):
    assert_accurate(errors(dtype, "cuda", segments, **shape))


@pytest.mark.gpu
def test_same_inputs_same_bits_on_a_gpu():
    tensors, ids = make_tensors(500, dtype=torch.bfloat16, head_dim=64, value_dim=64, device="cuda"), make_segments("packed", 2, 500).cuda()
    options = {"window": 64, "sinks": 4, "segment_ids": ids}
    first_out, first = gradients(window_attention, tensors, options)
    for _ in range(10):
        out, grads = gradients(window_attention, tensors, options)
        assert torch.equal(out, first_out) and all(torch.equal(grads[name], first[name]) for name in first)


@pytest.mark.gpu
def test_gradients_do_not_depend_on_how_the_incoming_one_lies_in_memory():
    """As they did with cuDNN, which is not to be chosen, whatever the caller allows."""
    tensors = make_tensors(512, dtype=torch.bfloat16, head_dim=64, value_dim=64, device="cuda")
    found = []
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        for lies in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT):
            out = window_attention(*tensors, window=64, sinks=4)
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
            found.append(torch.autograd.grad(out, tensors, lies(upstream)))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.gpu
def test_more_blocks_than_a_grid_is_deep():
    """70,000 blocks of two sequences, where one dimension of a CUDA grid ends at 65,535."""
    tensors = make_tensors(280_000, batch=1, heads=1, key_heads=1, dtype=torch.float32, device="cuda", grad=False)
    out = window_attention(*tensors, window=4, sinks=2)
    last = [x[:, :, -4:] for x in tensors]
    first = [x[:, :, :2] for x in tensors]
    keys, values = (torch.cat([a, b], 2) for a, b in zip(first[1:], last[1:], strict=True))
    expected = (last[0][:, :, -1:] @ keys.mT * 8**-0.5).softmax(-1) @ values
    torch.testing.assert_close(out[:, :, -1:], expected, rtol=1e-4, atol=1e-5)


def test_memory_is_linear():
    """Per token, forward and backward hold as much for 4,096 tokens as for 1,024: no N x N anywhere."""
    held = []
    for length in (1024, 4096):
        tensors, largest = make_tensors(length, dtype=torch.float32, batch=1), [0]

        def pack(x, largest=largest):
            largest[0] = max(largest[0], x.untyped_storage().nbytes())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            window_attention(*tensors, window=16, sinks=4, segment_ids=make_segments("packed", 1, length)).sum().backward()
        held.append(largest[0] / length)
    assert held[1] <= held[0] * 1.01


@pytest.mark.parametrize("segments", [None, "packed"])
def test_compiled_for_any_length(segments):
    function = torch.compile(window_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (33, 24, 50):
        tensors = make_tensors(length)
        options = {"window": 8, "sinks": 3, "segment_ids": None if segments is None else make_segments(segments, 2, length)}
        out, grads = gradients(function, tensors, options)
        expected, expected_grads = gradients(window_attention, tensors, options)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        for name, grad in expected_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-13)


def test_operator_checks():
    """Schema, fake tensors, gradients and tracing of what a graph holds."""
    query, key, value = make_tensors(20)
    frame = Frame.of(key, value, window=6, sinks=2, segment_ids=make_segments("packed", 2, 20))
    inputs = (frame.close(query), frame.key, frame.value, frame.runs, frame.number, None, None, frame.front, 6, 2, None)
    inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in inputs)
    torch.library.opcheck(torch.ops.linattn.window, inputs)


def test_the_output_lies_as_transformers_wants_it():
    assert window_attention(*make_tensors(40, grad=False), window=8).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("options, error, words", [
    ({"window": 0}, ValueError, "window must be at least 1, but is 0"),
    ({"window": 4.0}, TypeError, "window must be a whole number"),
    ({"window": True}, TypeError, "window must be a whole number"),
    ({"window": 4, "sinks": -1}, ValueError, "sinks must be at least 0"),
    ({"window": 4, "segment_ids": torch.ones(2, 5, dtype=torch.long)}, ValueError, r"shape \(2, 9\)"),
])  # fmt: skip
def test_what_is_wrong_is_said(options, error, words):
    with pytest.raises(error, match=words):
        window_attention(*make_tensors(9, grad=False), **options)


def test_tensors_that_do_not_fit_are_refused():
    query, key, value = make_tensors(9, grad=False)
    with pytest.raises(ValueError, match="as many keys as queries"):
        window_attention(query[:, :, :5], key, value, window=4)


def test_transforms_of_torch_func():
    """They go through plain views, so that gradients, batches and gradients of batches are what autograd and a loop give."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, heads, 20, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]

    def loss(query, key, value):
        return window_attention(query, key, value, window=5, sinks=2).square().sum()

    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    whole = torch.func.grad(loss, (0, 1, 2))(*tensors)
    single = torch.func.vmap(torch.func.grad(lambda *rows: loss(*(x[None] for x in rows)), (0, 1, 2)))(*tensors)
    for found in (whole, single):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
