"""Runs of tokens, made of a caller's segments, and a decay without padding: what the operators `linattn::runs` and
`linattn::decay_at_tokens` say, and that PyTorch takes them for operators."""

import pytest
import torch
from operator_cases import make_segments
from segment_cases import said_in_words, segment_cases
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck

from hf_linattn import linear_attention
from hf_linattn.ops.decay import without_padding
from hf_linattn.ops.segments import canonical_segments, reversed_segments


@pytest.mark.parametrize("length", [1, 2, 37])
def test_runs_are_what_they_are_said_to_be(length):
    for ids in segment_cases(3, length):
        runs = canonical_segments(ids, 3, length)
        assert runs.dtype == torch.int32 and runs.is_contiguous() and runs.tolist() == said_in_words(ids), ids


def test_reversed_runs_rise_too():
    ids = torch.tensor([[0, 1, 1, 0, 4, 4], [2, 2, 3, 0, 0, 5]])
    assert reversed_segments(canonical_segments(ids, 2, 6)).tolist() == [[1, 1, -4, 4, 4, -4], [1, -3, -3, 3, 4, 4]]


@pytest.mark.parametrize("ids", [[1, 2**32 + 1], [5, 2**33], [1, 2**31]], ids=str)
def test_numbers_that_runs_cannot_hold_are_refused(ids):
    with pytest.raises(ValueError, match="below 2\\*\\*31"):
        canonical_segments(torch.tensor([ids]), 1, 2)


def test_numbers_that_would_wrap_to_what_they_are_not_are_refused():
    with pytest.raises(ValueError, match="never fall"):
        canonical_segments(torch.tensor([[1 - 2**32, 1]]), 1, 2)
    with pytest.raises(TypeError, match="complex64"):
        canonical_segments(torch.ones(1, 2, dtype=torch.complex64), 1, 2)


@pytest.mark.parametrize("kind", ["left", "packed", "mask"])
def test_opcheck(kind):
    ids = make_segments(kind, 2, 9)
    opcheck(torch.ops.linattn.runs.default, (ids,))
    opcheck(torch.ops.linattn.runs.default, (ids[:1].expand(4, -1),))
    runs = canonical_segments(ids, 2, 9)
    for shape in ((3,), (2, 3, 9)):
        opcheck(torch.ops.linattn.decay_at_tokens.default, (-torch.rand(*shape, requires_grad=True), runs))
        opcheck(torch.ops.linattn.decay_at_tokens_backward.default, (torch.rand(2, 3, 9), runs, len(shape) == 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 3, 9)], ids=str)
def test_a_decay_without_padding(shape, dtype):
    runs = canonical_segments(make_segments("middle", 2, 9), 2, 9)
    rate, other = ((-torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)).requires_grad_() for _ in range(2))
    grad = torch.rand(2, 3, 9, dtype=dtype)
    expected = (other if other.dim() == 3 else other[None, :, None].expand(2, -1, 9)) * (runs > 0)[:, None]
    found = without_padding(rate, runs)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(found, rate, grad), torch.autograd.grad(expected, other, grad))


def test_a_graph_holds_each_once():
    """And no part of what they are made of."""
    x, ids, rate = torch.randn(1, 2, 8, 4), torch.tensor([[0, 1, 1, 2, 2, 0, 3, 3]]), -torch.rand(2)
    names = []

    def record(module, inputs):
        names.extend(node.name for node in module.graph.nodes if node.op == "call_function")
        return module

    torch._dynamo.reset()
    call = lambda x, ids, rate: linear_attention(x, x, x, log_decay=rate, segment_ids=ids)  # noqa: E731
    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=record))
        torch.testing.assert_close(compiled(x, ids, rate), call(x, ids, rate))
    assert sorted(name for name in names if not name.startswith(("full", "stack", "unsqueeze", "cat", "getitem"))) == [
        "decay_at_tokens", "forward", "runs",
    ]  # fmt: skip
