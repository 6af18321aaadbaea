"""Where packed sequences begin, told by positions and by `cu_seq_lens`, row by row against what is written out here."""

import pytest
import torch

from hf_linattn.packing import previous_token, segment_ids, sequence_starts

POSITIONS = {  # positions, real tokens where some are padding, where sequences begin behind another
    "one sequence": ("0 1 2 3", None, "...."),
    "two": ("0 1 0 1", None, "..|."),
    "from elsewhere": ("7 8 9 3 4", None, "...|."),
    "a gap": ("0 1 5 6", None, "...."),
    "sequences of one token": ("0 0 1 0 0", None, ".|.||"),
    "groups that share a position": ("0 0 1 1 2 0 1", None, ".....|."),
    "no position but 0": ("0 0 0 0", None, "...."),
    "padding in front": ("0 0 0 1 2", "--+++", "....."),
    "padding in front with positions": ("0 1 2 0 1", "--+++", "...|."),
    "padding between": ("0 1 2 0 1", "++-++", "...|."),
    "padding between that is passed over": ("0 1 0 2 3", "++-++", "....."),
    "padding behind": ("0 1 0 1 0", "++++-", "..|.."),
    "nothing but padding": ("0 0 1", "---", "..."),
}


def row(letters: str, true: str) -> torch.Tensor:
    return torch.tensor([[letter == true for letter in letters]])


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_that_fall_begin_a_sequence(kind: str) -> None:
    positions, real, starts = POSITIONS[kind]
    ids = torch.tensor([[int(position) for position in positions.split()]])
    found = sequence_starts(None if real is None else row(real, "+"), ids, None, ids.shape[1])
    assert torch.equal(row(starts, "|") if "|" in starts else torch.zeros(1), torch.zeros(1) if found is None else found)


@pytest.mark.parametrize(("bounds", "starts"), [([0, 2, 5], "..|.."), ([0, 5], "....."), ([0, 1, 4, 5], ".|..|"), ([0, 4, 4, 5], "....|")])
def test_bounds_begin_a_sequence(bounds: list[int], starts: str) -> None:
    found = sequence_starts(None, None, torch.tensor(bounds, dtype=torch.int32), 5)
    assert torch.equal(row(starts, "|") if "|" in starts else torch.zeros(1), torch.zeros(1) if found is None else found)


def test_what_says_nothing() -> None:
    assert sequence_starts(None, torch.zeros(1, 1), None, 1) is None
    for positions in (None, torch.zeros(3, 1, 5), torch.zeros(1, 4)):
        assert sequence_starts(None, positions, None, 5) is None


def test_the_token_before_and_what_the_operator_is_given() -> None:
    real, starts = row("-+-++", "+"), row("...|.", "|")
    assert previous_token(real).tolist() == [[-1, -1, 1, 1, 3]]
    assert segment_ids(real, starts, 2).tolist() == [[0, 1, 0, 2, 2]] * 2
    assert segment_ids(None, starts, 1).tolist() == [[1, 1, 1, 2, 2]] and segment_ids(None, starts, 1).dtype == torch.int32
    assert torch.equal(segment_ids(real, None, 2), real.expand(2, -1)) and segment_ids(None, None, 2) is None
