"""A window's blocks mixed by a gate with another attention: against the formula, in float64 and at the accuracy bar."""

import pytest
import torch
from operator_cases import make_segments
from window_cases import make_tensors

from hf_linattn.ops import blocks, window
from hf_linattn.ops.frame import Frame
from hf_linattn.ops.mixing import mixed

GATES = {"head": (1, 4, 1, 1), "token": (2, 4, None, 1), "dropped": (2, 4, 1, 1)}


def make_inputs(length, gate, rows, dtype=torch.float64):
    """query, key, value; what lies before the window of the last `rows` tokens; a gate of 32 bits or more."""
    generator = torch.Generator().manual_seed(length)
    shape = [length if size is None else size for size in GATES[gate]]
    far = torch.randn(2, 4, rows, 6, generator=generator, dtype=torch.float64).to(dtype)
    share = torch.rand(shape, generator=generator, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return [*make_tensors(length, dtype=dtype), far.requires_grad_(), share.requires_grad_()]


def by_blocks(query, key, value, far, gate, segments=None):
    frame = Frame.of(key, value, window=8, sinks=2, segment_ids=segments)
    return frame.open(window.attend_beside(frame.close(query), frame, None, far, gate))


def by_formula(query, key, value, far, gate, segments=None):
    frame = Frame.of(key, value, window=8, sinks=2, segment_ids=segments)
    far = torch.nn.functional.pad(far, (0, 0, query.shape[2] - far.shape[2], 0))
    return frame.open(mixed(blocks.attend(frame.close(query), frame, None), far, gate, frame.has_before()))


def results(function, inputs, segments=None):
    out = function(*inputs, segments)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, upstream, materialize_grads=True)]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 40, 43])
def test_equals_the_formula(length, gate):
    inputs = make_inputs(length, gate, max(length - 8, 0))
    for found, expected in zip(results(by_blocks, inputs), results(by_formula, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("segments", ["left", "middle", "packed"])
def test_padded_and_packed(segments, gate):
    """far has every token then, and the gate counts where a sequence has tokens before the window."""
    inputs, ids = make_inputs(43, gate, 43), make_segments(segments, 2, 43)
    for found, expected in zip(results(by_blocks, inputs, ids), results(by_formula, inputs, ids), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_against_float64(dtype):
    """At most twice, in gradients three times, that of the formula with every step rounded to the dtype."""
    inputs = make_inputs(400, "token", 392, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    in_dtype = lambda *x: by_formula(*x[:4], x[4].to(dtype))  # noqa: E731
    tables = [results(by_formula, exact), results(in_dtype, inputs), results(by_blocks, inputs)]
    for number, (right, plain, ours) in enumerate(zip(*tables, strict=True)):
        error, allowed = ((x.double() - right).norm() for x in (ours, plain))
        assert error <= (3 if number else 2) * allowed, number


@pytest.mark.parametrize("length", [5, 8, 43])
@pytest.mark.parametrize("beside", [True, False])
def test_a_second_derivative_is_refused_where_it_would_be_given_in_part(length, beside):
    """As beside a residual stream, by which it is reached without the window."""
    query, key, value, *others = make_inputs(length, "head", max(length - 8, 0))
    attend = by_blocks if beside else lambda *given: window.window_attention(*given[:3], window=8, sinks=2)
    out = attend(query, key, value, *others) + value.repeat_interleave(2, 1) ** 3
    with pytest.raises(RuntimeError, match="no second derivative.*create_graph"):
        torch.autograd.grad(out.square().sum(), (query, value), create_graph=True)
