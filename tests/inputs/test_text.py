"""Text is read as a stream: what a process takes for it does not grow with the file, nor with a line."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.common import documents
from recipes.common.documents import Source, read_documents
from recipes.common.errors import RecipeError
from recipes.lra import data as lra

Command = Callable[..., tuple[int, str]]
MIB = 2**20

# Growth of the peak memory, in MiB, over reading `file` and over tokenizing a piece of it.
MEASURE = """
import resource, sys
from recipes.common.tokenizing import load_tokenizer
from recipes.common.documents import Source, read_documents
from recipes.common.tokens import tokenized
from recipes.tinystories.data import Stories
file, small, tokenizer = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
words = load_tokenizer(tokenizer)
tokenized(Stories([Source(small)], held_out=3).train, ["small"], words)
before = peak()
characters = sum(map(len, read_documents(Source(file))))
read = peak()
assert sum(map(len, Stories([Source(file)], held_out=3).train())) > 0
made = peak()
with open(file + ".part", "w") as part:
    part.write(open(file).read(4 * 2**20))
tokenized(Stories([Source(file + ".part")], held_out=3).train, ["part"], words)
print(characters, read - before, made - before, peak() - before)
"""


def test_what_reading_takes_does_not_grow_with_a_line(whole: Path, tmp_path: Path) -> None:
    """A line of 20 MB. Taken whole, one of 100 MB took 12 GB."""
    file = tmp_path / "line.txt"
    with file.open("w") as out:
        for number in range(20):
            out.write(f"{number} " + "the cat sat on a mat " * (MIB // 21))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_LINATTN_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", MEASURE, file, whole / "text.txt", whole / "model"]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
    characters, read, made, tokenized = map(float, done.stdout.split())
    assert characters > 0.99 * 20 * MIB * 21 / 21.1
    assert read < 20 and made < 60 and tokenized < 150, done.stdout


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", " | "])
def test_long_stories_are_cut_at_blanks_and_nothing_is_lost(separator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 40)
    stories = ["one " * 30, "short", "x" * 95, "two\nwords " * 9, "é" * 41]
    (tmp_path / "a.txt").write_text(separator.join(stories), encoding="utf-8")
    found = list(read_documents(Source(str(tmp_path / "a.txt"), separator=separator)))
    assert max(map(len, found)) <= 40
    assert "".join("".join(found).split()) == "".join("".join(stories).split())
    assert all(word in ("one", "short", "two", "words") or set(word) in ({"x"}, {"é"}) for story in found for word in story.split())
    assert "short" in found


def test_the_parts_of_a_table_are_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 40)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one " * 30}) + "\n" + json.dumps({"text": "two"}) + "\n")
    found = list(read_documents(Source(str(tmp_path / "a.jsonl"))))
    assert found[-1] == "two" and max(map(len, found)) <= 40 and " ".join(found[:-1]).split() == ["one"] * 30


def test_what_is_no_text_is_refused(whole: Path, run: Command, tmp_path: Path) -> None:
    for name, content in {"a.txt": b"\xff", "b.txt": b"the cat \xc3", "c.txt": b" \n", "d.jsonl": b"{", "e.txt": b"\x00" * 10}.items():
        (tmp_path / name).write_bytes(content)
        arguments = [whole / "model", "--data", tmp_path / name, "--out", tmp_path / "out", "--decode", 8, "--tokens", 2]
        status, error = run("recipes.tinystories.evaluate", *arguments)
        assert (status == 2 and name in error) or name == "e.txt", error


LONG = {
    "text": ("imdb_train.jsonl", lambda: json.dumps({"text": "a" * lra.LONGEST_LINE, "label": 0}) + "\n"),
    "listops": ("basic_train.tsv", lambda: "Source\tTarget\n" + "1 " * lra.LONGEST_LINE + "\t1\n"),
    "retrieval": ("new_aan_pairs.train.tsv", lambda: "1\ta\tb\t" + "a" * lra.LONGEST_LINE + "\tb\n"),
}


@pytest.mark.parametrize("task", LONG)
def test_an_endless_line_of_the_arena_is_refused(task: str, tmp_path: Path, run: Command) -> None:
    name, content = LONG[task]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text(content())
    status, error = run("recipes.lra.prepare", task, "--source", tmp_path / "data", "--out", tmp_path / "out")
    assert status == 2 and name in error and "more than 4,194,304 characters" in error, error


def test_a_small_archive_of_an_endless_line_is_refused(tmp_path: Path) -> None:
    with lzma.open(tmp_path / "imdb_train.jsonl.xz", "wb") as file:
        for _ in range(64):
            file.write(b"a" * MIB)
    with pytest.raises(RecipeError, match="line 1: the line has more than"):
        lra.read_jsonl(tmp_path / "imdb_train.jsonl.xz", lra.TASKS["text"])


PICTURES = ["../secret.png 0", "/etc/hostname .", "imgs/../../secret.png .", "link.png ."]


@pytest.mark.parametrize("row", PICTURES)
def test_metadata_name_pictures_of_their_own_folder(row: str, tmp_path: Path, run: Command) -> None:
    from PIL import Image

    root = tmp_path / "data" / "curv_contour_length_14"
    (root / "metadata").mkdir(parents=True)
    Image.new("L", (32, 32)).save(tmp_path / "data" / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "data" / "secret.png")
    folder, _, name = row.partition(" ")
    (root / "metadata" / "0.npy").write_text(f"{folder} {name} 0 1\n" * 20)
    status, error = run("recipes.lra.prepare", "pathfinder", "--source", tmp_path / "data", "--out", tmp_path / "out", "--processes", 1)
    assert status == 2 and "metadata" in error + "link.png" and ("only names inside" in error or "link out of" in error), error
