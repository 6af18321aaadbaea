"""Rows of held-out text: which documents they are of, and how many bytes."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
from byte_models import START, byte_tokenizer

from convert.errors import ConversionError
from convert.evaluation.text import LONGEST, documents, first_documents, first_rows, last_documents, last_rows

TEXTS = ["first story", "höher", "third, and longer than the others"]


@pytest.mark.parametrize("name", ["text.txt", "text.txt.xz", "text.jsonl", "text.jsonl.xz"])
def test_documents(name: str, tmp_path: Path) -> None:
    whole = f"\n{START}\n".join(TEXTS) if "txt" in name else "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    data = whole.encode()
    (tmp_path / name).write_bytes(lzma.compress(data) if name.endswith("xz") else data)
    assert list(documents(tmp_path / name)) == TEXTS


def test_separators_are_found_wherever_a_block_ends(tmp_path: Path) -> None:
    for before in range(LONGEST - 15, LONGEST + 2):
        (tmp_path / "text").write_text("a" * before + START + "b")
        assert [part[0] for part in documents(tmp_path / "text")][-1] == "b"
        assert "".join(documents(tmp_path / "text")) == "a" * before + "b"


@pytest.mark.parametrize(("characters", "count"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (99, 3)])
def test_documents_of_an_end_are_as_few_as_suffice(characters: int, count: int, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(START.join(["aaaa", "bbbb", "cccc"]))
    assert first_documents(tmp_path / "text", characters) == ["aaaa", "bbbb", "cccc"][:count]
    assert last_documents(tmp_path / "text", characters) == ["aaaa", "bbbb", "cccc"][-count:]


def test_rows_are_the_stream_cut(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(START.join(TEXTS))
    tokenizer = byte_tokenizer()
    stream = [token for text in TEXTS for token in [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
    assert len(stream) == 3 + sum(len(text.encode()) for text in TEXTS)
    rows = first_rows(tmp_path / "text", tokenizer, 20, 2)
    assert rows.ids.tolist() == [stream[:20], stream[20:40]]
    assert rows.nbytes == [17, 19]  # all but the first token, and in the first row two starts
    last = last_rows(tmp_path / "text", tokenizer, 20, 1)
    assert last.ids.tolist() == [stream[-20:]]
    assert len(first_rows(tmp_path / "text", tokenizer, 20, 99).ids) == len(stream) // 20


def test_bytes_are_those_of_the_text_as_it_stands(tmp_path: Path) -> None:
    """Blanks before a full stop, which decoding may clean up, are counted."""
    (tmp_path / "text").write_text("an end . And n't , so ?")
    assert first_rows(tmp_path / "text", byte_tokenizer(), 24, 1).nbytes == [23]


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("abc")
    with pytest.raises(ConversionError, match="has 4 tokens, too few for a row of 20"):
        first_rows(tmp_path / "short", byte_tokenizer(), 20, 1)
    for name, data in {"a.txt": b"\xff\xfe\xfa", "b.jsonl": b"{}\n", "c.xz": b"no xz", "d.jsonl": b"no json\n"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConversionError, match=f"reading .*{name} failed"):
            list(documents(tmp_path / name))
