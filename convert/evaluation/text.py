"""Held-out text as rows of tokens: documents one after another, each behind the start token, cut every so many tokens."""

from __future__ import annotations

import json
import lzma
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from convert.errors import ConversionError, stage
from recipes.common.reading import open_file, user_path
from recipes.common.tokenizing import start_token

SEPARATOR = "<|endoftext|>"
"""What stands between two documents of a text file."""
LONGEST = 2**16
"""Characters of a document that is tokenized at once; what is longer goes on as another one."""
_CHARACTERS = 16
"""More than a token has of any text, on the average."""


@dataclass(frozen=True)
class Rows:
    """Rows of one file.

    Attributes:
        name: the file's name.
        ids: int64 (R, N).
        nbytes: of each row, the UTF-8 bytes of the text that its tokens after the first stand for.
    """

    name: str
    ids: Tensor
    nbytes: list[int]


def documents(path: Path) -> Iterator[str]:
    """The documents of a text file, apart by SEPARATOR, or of the key text in rows of JSON (.jsonl); either as it is or packed by xz.

    Raises:
        ConversionError: it cannot be read, is no UTF-8, or holds rows without that key.
    """
    path = user_path(path)
    with stage(f"reading {path}", "give text in UTF-8, or rows of JSON with a key text, as it is or packed by xz"), open_file(path) as raw:
        packed = path.suffix == ".xz"
        with TextIOWrapper(lzma.LZMAFile(raw) if packed else raw, encoding="utf-8") as file:  # type: ignore[type-var]
            for document in (json.loads(line)["text"] for line in file) if ".jsonl" in path.suffixes else _split(file):
                yield from (part for start in range(0, len(document), LONGEST) if (part := document[start : start + LONGEST].strip()))


def first_rows(path: Path, tokenizer: Any, length: int, count: int) -> Rows:
    """The first ``count`` rows of ``length`` tokens, or as many as there are.

    Raises:
        ConversionError: there is none.
    """
    ids: list[int] = []
    for document in documents(path):
        ids += _tokens(document, tokenizer)
        if len(ids) >= length * count:
            break
    return _rows(path, ids[: length * count], tokenizer, length)


def last_rows(path: Path, tokenizer: Any, length: int, count: int) -> Rows:
    """The last ``count`` rows, which evaluation does not come to in a text that is long enough for both."""
    ids = [token for document in last_documents(path, _CHARACTERS * length * count) for token in _tokens(document, tokenizer)]
    return _rows(path, ids[max(len(ids) - length * count, 0) :], tokenizer, length)


def first_documents(path: Path, characters: int) -> list[str]:
    """The first documents, of so many characters in all or a document more."""
    kept: list[str] = []
    size = 0
    for document in documents(path):
        kept.append(document)
        size += len(document)
        if size >= characters:
            break
    return kept


def last_documents(path: Path, characters: int) -> list[str]:
    """The last documents, of so many characters in all or a document more."""
    kept: deque[str] = deque()
    size = 0
    for document in documents(path):
        kept.append(document)
        size += len(document)
        while size - len(kept[0]) >= characters:
            size -= len(kept.popleft())
    return list(kept)


def _rows(path: Path, ids: list[int], tokenizer: Any, length: int) -> Rows:
    whole = len(ids) // length
    if not whole:
        raise ConversionError(f"{path} has {len(ids):,} tokens, too few for a row of {length:,}; give more text or a smaller length")
    rows = torch.tensor(ids[: whole * length]).view(whole, length)
    texts = tokenizer.batch_decode(rows[:, 1:].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Rows(path.name, rows, [len(text.encode()) for text in texts])


def _tokens(document: str, tokenizer: Any) -> list[int]:
    return [start_token(tokenizer), *tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]]


def _split(file: TextIO) -> Iterator[str]:
    rest = ""
    while block := file.read(LONGEST):
        *whole, rest = (rest + block).split(SEPARATOR)
        yield from whole
        if len(rest) > 2 * LONGEST:  # its last characters may be the first of a separator
            yield rest[:LONGEST]
            rest = rest[LONGEST:]
    yield rest
