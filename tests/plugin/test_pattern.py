"""What a mask says of tokens, packed into one small tensor and read back, whatever it says and however few tokens there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hf_linattn.pattern import DTYPES, Pattern, is_packed, pack, unpack

REAL = {1: torch.tensor([[True], [False]]), 2: torch.tensor([[False, True], [True, True]]), 5: torch.ones(2, 5, dtype=torch.bool).triu(1)}
STARTS = {1: None, 2: torch.tensor([[False, True], [False, False]]), 5: torch.eye(5, dtype=torch.bool)[2:4]}


def same(one: Tensor | int | None, other: Tensor | int | None) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return torch.equal(torch.as_tensor(one).expand(2), torch.as_tensor(other).expand(2))
    return one == other


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("causal", [True, False, None])
def test_what_is_packed_comes_back(length: int, causal: bool | None) -> None:
    pasts = [None] if causal is None else [None, 0, torch.tensor([7, 2**31 - 2])]
    for has_real, has_starts, past in itertools.product((False, True), (False, True), pasts):
        real, starts = REAL[length] if has_real else None, STARTS[length] if has_starts else None
        packed = pack(Pattern(causal, real, starts, past), length, "cpu")
        assert is_packed(packed) and packed.dtype == DTYPES[causal] and packed.dim() == 4 and packed.shape[2] == 1
        found = unpack(packed, length)
        assert found.causal is causal
        assert (found.real is None) == (real is None) and (real is None or torch.equal(found.real, real))
        assert (
            (found.starts is None or torch.equal(found.starts, starts))
            if starts is not None
            else not (found.starts is not None and found.starts.any())
        )
        said = past if past is not None or (real is None and starts is None) else -1  # -1: nothing is said
        assert same(found.past, said), (found.past, said)


def test_nothing_to_say_takes_no_columns() -> None:
    assert pack(Pattern(True), 9, "cpu").shape == (1, 1, 1, 1) and pack(Pattern(True, past=0), 9, "cpu").shape == (1, 1, 1, 0)
    assert unpack(torch.zeros(1, 1, 1, 1, dtype=torch.int64), 9) == Pattern(False)
    assert unpack(torch.zeros(1, 1, 1, 0, dtype=torch.int32), 9) == Pattern(True, past=0)


@pytest.mark.parametrize("width", [9, 12])
def test_a_mask_for_other_tokens_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match="a mask for other tokens than the 9 it attends with"):
        unpack(torch.zeros(1, 1, 1, width, dtype=torch.int32), 9)


def test_other_masks_are_not_taken_for_packed_ones() -> None:
    for mask in (None, torch.zeros(1, 1, 1, 5), torch.zeros(1, 1, 5, 5, dtype=torch.int32), torch.zeros(1, 5, dtype=torch.int32)):
        assert not is_packed(mask)
