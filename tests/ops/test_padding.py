"""Rows padded with zeros, without kernels: that the formula does not notice them, and how they are copied."""

import pytest
import torch
from accuracy_bar import operator_case, run

from hf_linattn.ops import chunked
from hf_linattn.ops.call import Call
from hf_linattn.ops.padding import copy_rows, padded_call, padded_rows, padded_state, state_without_padding

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("kind", [
    {}, {"stateful": True, "decay": "query_head"}, {"causal": False, "stateful": True}, {"noisy": True, "segments": "packed"},
    {"degree": 2},
], ids=str)  # fmt: skip
def test_the_formula_does_not_notice_zeros(kind):
    stateful = kind.get("stateful", False)
    inputs, upstream = operator_case(torch.float64, length=150, head_dim=5, value_dim=7, device="cpu", **kind)
    grad_out, grad_mass, grad_state = upstream
    wide = padded_call(Call(*inputs), 8)
    expected = run(chunked, inputs, upstream, stateful, torch.float64)
    found = run(chunked, list(wide), (padded_rows(grad_out, 8), grad_mass, padded_state(grad_state, 8)), stateful, torch.float64)
    for name, x in expected.items():
        of_a_state = name in ("state", "gradient of initial_state")
        of_rows = name in ("out", "gradient of query", "gradient of key", "gradient of value")
        ours = state_without_padding(found[name], x.shape) if of_a_state else found[name]
        torch.testing.assert_close(ours[..., : x.shape[-1]] if of_rows else ours, x)


def test_states_keep_their_last_row_and_column():
    state = torch.arange(1.0, 13).view(1, 1, 3, 4)
    wide = padded_state(state, 5)
    assert wide.shape == (1, 1, 6, 6) and wide.sum() == state.sum()
    assert torch.equal(wide[..., -1, :3], state[..., -1, :3]) and torch.equal(wide[..., :2, -1], state[..., :2, -1])
    assert wide[..., -1, -1] == 12 and torch.equal(wide[..., :2, :3], state[..., :2, :3])
    narrow = state_without_padding(wide, state.shape)
    assert torch.equal(narrow, state) and wide.is_contiguous() and narrow.is_contiguous()
    assert padded_state(None, 5) is state_without_padding(None, state.shape) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 6, 8, 24])
def test_rows_are_padded_behind(dtype, head_dim):
    rows = torch.randn(2, 7, 3, head_dim).to(dtype)
    for x in (rows, rows.transpose(1, 2), rows[:, ::2], rows[..., :1].expand(rows.shape)):
        wide = padded_rows(x, 32)
        assert wide.shape == (*x.shape[:-1], 32) and wide.is_contiguous()
        assert torch.equal(wide[..., :head_dim], x) and wide[..., head_dim:].abs().sum() == 0


def test_rows_that_are_wide_and_aligned_already_are_not_copied():
    rows = torch.randn(2, 4, 10, 32).bfloat16()
    assert padded_rows(rows, 32) is rows
    apart = torch.randn(2, 4, 10, 40).bfloat16()[..., 8:]
    assert padded_rows(apart, 32) is apart
    for moved in (torch.randn(2, 4, 10, 36).bfloat16()[..., :32], torch.randn(2, 4, 10, 40).bfloat16()[..., 4:36], rows.mT.contiguous().mT):
        wide = padded_rows(moved, 32)
        assert wide.is_contiguous() and wide.data_ptr() % 16 == 0 and torch.equal(wide, moved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start, width, stride", [(0, 8, 8), (0, 8, 9), (1, 8, 12), (4, 8, 16), (0, 3, 8), (2, 6, 16)])
def test_copies_are_of_the_rows_alone(dtype, start, width, stride):
    """By eight bytes or by numbers: NaN and the sign of zero too, and nothing beside them."""
    source = torch.randn(3, 5, stride + 4).to(dtype)
    source[0, 0], source[1, 1] = float("nan"), -0.0
    target = torch.full((3, 5, 40), 7.0, dtype=dtype)
    to = target[..., start : start + width]
    assert copy_rows(to, source[..., start : start + width]) is to
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(to.view(bits), source[..., start : start + width].view(bits))
    assert (target[..., :start] == 7).all() and (target[..., start + width :] == 7).all()
