"""Values of tensors that are asked for once, and digests of what was left out."""

from __future__ import annotations

import torch

from hf_linattn.counted import PRIME, digest, joined
from hf_linattn.values import remember


def test_what_was_read_is_remembered_until_something_changes() -> None:
    source, beside, reads = torch.zeros(3), torch.ones(1), []

    def read() -> str:
        reads.append(1)
        return f"{len(reads)} times"

    assert [remember(source, "a", (5, beside), read) for _ in range(3)] == ["1 times"] * 3
    assert remember(source, "b", (5, beside), read) == "2 times"  # under another name
    assert remember(source, "a", (6, beside), read) == "3 times" and remember(source, "a", (6, beside.clone()), read) == "4 times"
    source.add_(1)
    assert remember(source, "a", (6, beside), read) == "5 times" and remember(source, "a", (6, beside), read) == "5 times"
    with torch.inference_mode():
        fresh = torch.zeros(3)
    assert [remember(fresh, "a", (), read) for _ in range(2)] == ["6 times", "7 times"]  # which cannot tell whether it was written


def test_nothing_true_may_be_remembered_as_none() -> None:
    source = torch.zeros(3)
    assert remember(source, "a", (), lambda: torch.zeros(2, dtype=torch.bool), none_if_false=True) is None
    assert remember(source, "a", (), lambda: 1 / 0, none_if_false=True) is None
    assert remember(source, "b", (), lambda: torch.tensor([False, True]), none_if_false=True).tolist() == [False, True]
    assert remember(source, "c", (), lambda: torch.zeros(2, dtype=torch.bool)).tolist() == [False, False]


def test_digests_tell_patterns_apart_and_add_up() -> None:
    one = torch.zeros(64, 64, dtype=torch.bool).fill_diagonal_(True)  # a token at each place
    pairs = one[:-1] | one[1:]
    seen = torch.cat([digest(one), digest(pairs)]).tolist()
    assert len(set(seen)) == 127 and all(0 < x < PRIME for x in seen)
    whole = torch.rand(4, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    for cut in (0, 1, 17, 30):
        parts = digest(whole[:, :cut]), digest(whole[:, cut:], cut)
        assert torch.equal(joined(*parts), digest(whole)) and torch.equal(joined(digest(whole), -parts[1]), parts[0])
    assert digest(torch.zeros(2, 5, dtype=torch.bool)).tolist() == [0, 0]
    assert digest(torch.ones(1, 3, dtype=torch.bool)).tolist() == [1142000473]  # written into saved prompts
