"""The kernels of packed sequences and padding on a GPU: exactly what PyTorch's operators say, in a launch each or one, and in a graph."""

import re

import pytest
import torch
from segment_cases import segment_cases
from torch.library import opcheck

from hf_linattn.ops import decay, segments

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("batch, length", [(3, 1), (2, 700), (2, 4096), (2, 4097), (1, 40000)])
def test_runs(batch, length):
    for ids in segment_cases(batch, length):
        ids = ids.cuda() if ids.is_contiguous() else ids.t().contiguous().cuda().t()
        assert torch.equal(segments.canonical_segments(ids, batch, length), segments.by_operators(ids)), ids


@pytest.mark.parametrize("shape", [(3,), (2, 3, 700)], ids=str)
def test_a_decay_without_padding(shape):
    runs = segments.canonical_segments(torch.rand(2, 700, device="cuda") < 0.7, 2, 700)
    rate = (-torch.rand(*shape, device="cuda")).requires_grad_()
    gradient = torch.randn(2, 3, 700, device="cuda")
    found = decay.without_padding(rate, runs)
    assert torch.equal(found, decay._decay(rate, runs))
    expected = decay._gradient(gradient.double(), runs, len(shape) == 3).float()
    torch.testing.assert_close(torch.autograd.grad(found, rate, gradient, retain_graph=True)[0], expected)
    again = torch.autograd.grad(found, rate, gradient, retain_graph=True)[0]
    assert torch.equal(again, torch.autograd.grad(found, rate, gradient)[0])


def test_opcheck():
    ids = torch.tensor([[0, 1, 1, 2, 0]], device="cuda")
    opcheck(torch.ops.linattn.runs.default, (ids,))
    for shape in ((3,), (1, 3, 5)):
        rate = (-torch.rand(*shape, device="cuda")).requires_grad_()
        opcheck(torch.ops.linattn.decay_at_tokens.default, (rate, segments.canonical_segments(ids, 1, 5)))


@pytest.mark.parametrize("shape", [(3,), (2, 3, 700)], ids=str)
def test_runs_and_a_decay_in_one_launch(shape):
    ids, gradient = torch.randint(0, 2, (2, 700), device="cuda"), torch.randn(2, 3, 700, device="cuda")
    rate = (-torch.rand(*shape, device="cuda")).requires_grad_()
    made = lambda: decay.runs_and_decay(ids, rate)  # noqa: E731
    assert launched(made) == ["runs_kernel"]
    runs, found = made()
    assert torch.equal(runs, segments.runs_of(ids)) and torch.equal(found, decay.without_padding(rate, runs)) and not runs.requires_grad
    expected = torch.autograd.grad(decay.without_padding(rate, runs), rate, gradient)[0]
    assert torch.equal(torch.autograd.grad(found, rate, gradient)[0], expected)


def launched(made):
    made()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        made()
        torch.cuda.synchronize()
    return sorted(re.findall(r"\w+_kernel\b", " ".join(event.name for event in profile.events())))


def test_one_launch_each_in_a_graph_too():
    ids, rate = torch.ones(2, 90, dtype=torch.int64, device="cuda"), -torch.rand(3, device="cuda")
    made = lambda: decay.without_padding(rate, segments.canonical_segments(ids, 2, 90))  # noqa: E731
    assert launched(made) == ["decay_at_tokens_kernel", "runs_kernel"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = made()
    ids[:, 40:] = 0
    graph.replay()
    assert torch.equal(captured, made())
