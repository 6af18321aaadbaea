"""What depends on sizes alone is made once, and only where it can be kept."""

from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from window_cases import make_tensors

from hf_linattn.ops import blocks, constants, window_attention
from hf_linattn.ops.constants import constant


def test_made_once_and_no_more_than_so_many():
    kept, made = {}, []

    def get(size):
        return constant(size, lambda: made.append(size) or torch.zeros(size), kept, 2)

    assert get(1) is get(1) and get(2) is get(2) and made == [1, 2]
    get(3)
    assert len(kept) == 1 and get(1).shape == (1,) and made == [1, 2, 3, 1]


def test_what_inference_mode_made_serves_training():
    kept = {}
    with torch.inference_mode():
        constant("x", lambda: torch.ones(3), kept)
    x = torch.ones(3, requires_grad=True)
    (x * constant("x", lambda: torch.zeros(3), kept)).sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


def test_what_has_no_numbers_is_not_kept():
    kept = {}
    with FakeTensorMode():
        constant("x", lambda: torch.ones(3), kept)
    constant("x", lambda: torch.ones(3, device="meta"), kept)
    assert not kept


def test_fake_tensors_behind_real_ones():
    tensors = make_tensors(40, grad=False)
    expected = window_attention(*tensors, window=8, sinks=2)
    with FakeTensorMode() as mode:
        assert window_attention(*map(mode.from_tensor, tensors), window=8, sinks=2).shape == expected.shape


def test_what_transforms_wrap_is_not_kept():
    """It has no memory of its own to be given to a kernel."""
    kept = {}
    weighed = lambda x: (x * constant("x", lambda: torch.ones(3), kept)).sum()  # noqa: E731
    torch.func.functionalize(weighed)(torch.ones(3))
    torch.func.grad(weighed)(torch.ones(3))
    torch.vmap(weighed)(torch.ones(2, 3))
    assert not kept


def test_what_a_captured_graph_reads_outlives_what_is_kept(monkeypatch):
    kept, of_gpu = {}, SimpleNamespace(is_cuda=True)
    kept["x"] = of_gpu
    monkeypatch.setattr(constants, "_captured", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    constant("x", torch.ones, kept)
    assert not constants._captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    constant("x", torch.ones, kept)
    kept.clear()
    assert of_gpu in constants._captured.values()


def test_a_graph_keeps_nothing_for_other_calls():
    """Its memory is its own; what is kept of a call that is not compiled serves the next one."""
    blocks._of_sizes.clear()
    tensors = make_tensors(40, dtype=torch.float32)
    torch.compile(lambda *x: window_attention(*x, window=8, sinks=2), backend="aot_eager")(*tensors).sum().backward()
    assert not blocks._of_sizes
    window_attention(*tensors, window=8, sinks=2).sum().backward()
    first = dict(blocks._of_sizes)
    assert len(first) == 2
    window_attention(*tensors, window=8, sinks=2)
    assert all(blocks._of_sizes[name] is x for name, x in first.items())
