"""Stories: read whole whatever the chunk, never twice, packed without a gap; a resumed epoch goes on where it was."""

from __future__ import annotations

import json

import datasets
import pytest
import torch

from recipes.common.errors import RecipeError
from recipes.common.tokenizing import load_tokenizer, start_token
from recipes.tinystories import data
from recipes.tinystories.data import Collator, EpochSampler, Source, pack, read_stories, split_stories

MARK = "<|endoftext|>"


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 13, 1000])
def test_a_file_is_split_the_same_whatever_the_chunk(tmp_path, chunk):
    path = tmp_path / "a.txt"
    path.write_text(f"one é{MARK}\n\n{MARK}two “quoted”{MARK}三\n")
    assert [x.strip() for x in data._split_file(path, MARK, chunk)] == ["one é", "", "two “quoted”", "三"]


def test_no_story_comes_twice_and_none_is_in_both_parts(tmp_path):
    texts = [f"story {n}" for n in range(30)]
    (tmp_path / "a.txt").write_text(MARK.join(texts[:20] + texts[:5]))
    (tmp_path / "b.txt").write_text(MARK.join(texts[15:]))
    train, valid = split_stories([Source(str(tmp_path / "a.txt")), Source(str(tmp_path / "b.txt"))], [], held_out=4)
    assert train["text"][:] == texts[:26]
    assert valid["text"][:] == texts[26:]
    train, valid = split_stories([Source(str(tmp_path / "a.txt"))], [Source(str(tmp_path / "b.txt"))], held_out=4)
    assert train["text"][:] == texts[:15]
    assert valid["text"][:] == texts[15:]


def test_a_changed_file_is_read_again(tmp_path):
    source = Source(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text(MARK.join("abc"))
    assert split_stories([source], [], 1)[0]["text"][:] == ["a", "b"]
    (tmp_path / "a.txt").write_text(MARK.join("xyzw"))
    assert split_stories([source], [], 1)[0]["text"][:] == ["x", "y", "z"]


def test_packing_is_the_stream_of_start_tokens_and_stories(tiny):
    tokenizer = load_tokenizer(str(tiny.model))
    train, _ = split_stories([Source(str(tiny.text))], [], 20)
    packed = pack(train, tokenizer, 32)
    stream = [x for text in tiny.texts[:180] for x in [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
    assert packed[:]["input_ids"].flatten().tolist() == stream[: len(stream) // 32 * 32]


def test_what_is_left_of_one_batch_goes_on_in_the_next(tiny, monkeypatch):
    """Texts are tokenized a million characters at a time; here 300."""
    tokenizer = load_tokenizer(str(tiny.model))
    train, _ = split_stories([Source(str(tiny.text))], [], 21)
    monkeypatch.setattr(data.by_size, "__defaults__", (300,))
    packed = pack(train, tokenizer, 32)
    stream = [x for text in tiny.texts[:179] for x in [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
    assert packed[:]["input_ids"].flatten().tolist() == stream[: len(stream) // 32 * 32]


@pytest.mark.parametrize("row", [0, 999, 1000, 2499])
def test_a_digest_is_of_every_row(row):
    rows = [[number, 7] for number in range(2500)]
    before = data.digest(datasets.Dataset.from_dict({"input_ids": rows}))
    assert data.digest(datasets.Dataset.from_dict({"input_ids": rows})) == before
    rows[row] = [rows[row][0], 8]
    assert data.digest(datasets.Dataset.from_dict({"input_ids": rows})) != before


def test_positions_restart_at_every_story():
    ids = torch.tensor([[5, 6, 0, 7, 8, 0, 9], [0, 1, 2, 3, 4, 5, 6]])
    batch = Collator(start=0, separate=True)([{"input_ids": row} for row in ids])
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert set(Collator(start=0, separate=False)([{"input_ids": row} for row in ids])) == {"input_ids"}


def test_an_epoch_visits_each_once_and_goes_on_from_any_point():
    sampler = EpochSampler(size=50, per_epoch=48, seed=3)
    whole = list(sampler)
    assert len(set(whole)) == len(sampler) == 48
    sampler.begin_at(0, 30)
    assert list(sampler) == whole[30:]
    assert len(sampler) == 18
    sampler.begin_at(1, 0)
    assert list(sampler) != whole
    assert list(EpochSampler(size=50, per_epoch=48, seed=3)) == whole != list(EpochSampler(size=50, per_epoch=48, seed=4))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", f" \n{MARK}\n ".encode(), "holds no text"),
        ("a.txt", b"good \xff bad", "not UTF-8 text (byte 5 is 0xff)"),
        ("a.txt", "cut é".encode()[:-1], "its last character is cut off"),
        ("a.jsonl", b'{"story": "x"}\n', "no column 'text'; set text_column to one of story"),
        ("a.jsonl", b"not json\n", "the data set cannot be loaded"),
        ("absent.txt", None, "no such file"),
        ("folder", "folder", "is a folder"),
    ],
)
def test_bad_text_is_refused_in_a_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as error:
        list(read_stories(Source(str(path))))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_offset_of_bad_utf8_counts_from_the_start_of_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode() * 10 + b"\xff")
    for chunk in (1, 3, 7, 100):
        with pytest.raises(RecipeError, match=r"byte 20 is 0xff"):
            list(data._split_file(path, MARK, chunk))


def test_rows_of_a_table_are_stories(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"story": x}) + "\n" for x in ("one", " ", "two")))
    assert list(read_stories(Source(str(path), column="story"))) == ["one", "two"]


def test_too_little_text_is_refused(tmp_path, tiny):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(RecipeError, match="1 stories are too few to hold 5 out"):
        split_stories([Source(str(tmp_path / "a.txt"))], [], 5)
    train, _ = split_stories([Source(str(tmp_path / "a.txt"))], [Source(str(tiny.text))], 5)
    with pytest.raises(RecipeError, match="shorter than one sequence of 32"):
        pack(train, load_tokenizer(str(tiny.model)), 32)


def test_a_tokenizer_must_mark_where_stories_start(tmp_path, tiny):
    tokenizer = load_tokenizer(str(tiny.model / "tokenizer.json"))
    assert start_token(tokenizer) == 0
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(RecipeError, match="neither a bos nor an eos"):
        start_token(tokenizer)
    with pytest.raises(RecipeError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))
