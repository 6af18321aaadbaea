"""The kernels of packed sequences and padding on the CPU, by the emulator in `tests/emulation`: exactly what PyTorch's operators say."""

import faulthandler
import os
import signal

import pytest
import torch
from emulation import build
from segment_cases import segment_cases

from hf_linattn.ops import decay, runs_cuda, segments

pytestmark = [
    pytest.mark.skipif(build.compiler() is None or build.headers() is None, reason="needs g++ or clang++, and CUDA's headers"),
    pytest.mark.timeout(1200),
]


@pytest.mark.parametrize("batch, length", [(3, 1), (2, 40), (2, 4096), (1, 9000)])
def test_runs(kernels, batch, length):
    """Of rows that a block has whole, and of rows that several share."""
    for ids in segment_cases(batch, length):
        assert torch.equal(runs_cuda.runs(ids), segments.by_operators(ids)), ids


@pytest.mark.parametrize("batch, length", [(2, 40), (2, 4097)])
def test_runs_and_a_decay_in_one_launch(kernels, batch, length):
    for ids in segment_cases(batch, length):
        for rate in (-torch.rand(3), -torch.rand(batch, length, 3).transpose(1, 2)):
            runs, at_tokens = runs_cuda.runs_and_decay(ids, rate)
            assert torch.equal(runs, segments.by_operators(ids)), ids
            assert torch.equal(at_tokens, decay._decay(rate, runs)), ids


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([[1, 2**32 + 1]], "segment_ids must be 0 for padding and below 2**31"),
        ([[0, 2**31]], "segment_ids must be 0 for padding and below 2**31"),
        ([[-1, 1]], "segment_ids must be 0 for padding and below 2**31"),
        ([[2, 0, 1]], "segment_ids must, apart from zeros, never fall along a row"),
        ([[*[3] * 5000, 2]], "segment_ids must, apart from zeros, never fall along a row"),  # in another block than those before
    ],
    ids=lambda x: str(x)[:20],
)
def test_numbers_that_are_no_segments_end_in_an_assertion(kernels, ids, sentence, capfd):
    """On a CPU Python says the same, and on a GPU would have to wait for the numbers; the process that asserts is a fork of this one."""
    with pytest.raises(ValueError, match="segment_ids must be"):
        segments.canonical_segments(torch.tensor(ids), 1, len(ids[0]))
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        runs_cuda.runs(torch.tensor(ids))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGABRT and sentence in capfd.readouterr().err


@pytest.mark.parametrize("shape", [(3,), (2, 3, 700)], ids=str)
def test_a_decay_at_tokens_and_its_gradient(kernels, shape):
    runs = segments.by_operators(torch.rand(2, 700) < 0.7)
    rate, gradient = -torch.rand(*shape), torch.randn(2, 3, 700)
    assert torch.equal(runs_cuda.decay_at_tokens(rate, runs), decay._decay(rate, runs))
    sums = runs_cuda.sum_at_tokens(gradient.transpose(0, 1).contiguous().transpose(0, 1), runs)
    torch.testing.assert_close(sums, decay._gradient(gradient.double(), runs, False).float())


@pytest.mark.parametrize("shape", [(3,), (2, 3, 40)], ids=str)
def test_a_decay_out_of_one_launch_has_a_gradient(kernels, shape):
    ids, rate, gradient = torch.randint(0, 2, (2, 40)), (-torch.rand(*shape)).requires_grad_(), torch.randn(2, 3, 40)
    runs, at_tokens = decay._WithRuns.apply(rate, ids)
    assert at_tokens.requires_grad and not runs.requires_grad
    expected = decay._gradient(gradient.double(), runs, len(shape) == 3).float()
    torch.testing.assert_close(torch.autograd.grad(at_tokens, rate, gradient)[0], expected)
