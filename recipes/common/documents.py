"""Documents out of text files, tables, folders of them, data sets of the hub, and conversations through a chat template.

Text is read as a stream: memory holds documents, and of those a few at a time. One longer than `LONGEST_DOCUMENT` is cut into several.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from recipes.common.errors import RecipeError, sentence
from recipes.common.reading import is_data_set, not_outside, open_file, parse_json, user_path

LONGEST_DOCUMENT = 2**18
"""Characters, about 65,000 tokens. What goes on longer is cut here, at a blank, and goes on as a document of its own."""
LONGEST_LINE = 2**26
"""Bytes of a line of JSON."""
_TABLES = {".json": "json", ".parquet": "parquet", ".csv": "csv"}  # read by the library `datasets`
_TEXT, _LINES = (".txt", ".txt.xz", ".md"), (".jsonl", ".jsonl.xz")
_ROWS = 100

Render = Callable[[list[dict[str, Any]]], str]


@dataclass(frozen=True)
class Source:
    """One place that documents come from.

    name: a text file (documents apart by `separator`), a table (.jsonl, .json, .parquet or .csv; a document in each row's `column`), both
        also as .xz (text and .jsonl), a folder of such files, or a data set's id on the hub (`split` of it).
    column: holds text, or a conversation: a list of messages, each {"role": ..., "content": ...}.
    column_option: what a user calls the column where it is given.
    """

    name: str
    split: str = "train"
    column: str = "text"
    separator: str = "<|endoftext|>"
    column_option: str = "text_column"

    def __post_init__(self) -> None:
        if not self.separator:
            raise RecipeError("the separator is empty; give what stands between the documents of a text file")

    def files(self) -> list[Path] | None:
        """The files that are read, in order; None of a data set on the hub.

        Raises:
            RecipeError: there is nothing of that name, or a folder has no such file.
        """
        path = user_path(self.name)
        if path.is_dir():
            if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
                raise RecipeError(f"{path} holds a model and no text; give a text file, a folder of them, or a data set's id on the hub")
            found = [file for file in sorted(path.rglob("*")) if _kind(file) and not any(x.startswith(".") for x in file.parts[-2:])]
            if not found:
                raise RecipeError(f"{path} is a folder without text; give one that holds {', '.join((*_TEXT, *_LINES, *_TABLES))} files")
            return [not_outside(path, file) for file in found]
        if path.exists():
            return [path]
        if is_data_set(self.name) and not _kind(path):
            return None
        raise RecipeError(
            f"{self.name}: no such file; give a text file, a folder, or a data set's id on the hub such as roneneldan/TinyStories"
        )

    def check(self) -> None:
        """Refuses, before any of it is read, what could not be read.

        Raises:
            RecipeError: as of `files`, or it takes a library that is not installed.
        """
        files = self.files()
        if files is None or any(_kind(file) in _TABLES for file in files):
            _require_datasets(self.name)

    def stamp(self) -> list[Any]:
        """What changes when the source does: for local files their paths, sizes and times of change."""
        files = self.files()
        state = [(file, file.stat()) for file in files or ()]
        place: list[Any] = [[str(file.resolve()), one.st_size, one.st_mtime_ns] for file, one in state] or [self.name, self.split]
        return [place, self.column, self.separator]


def read_documents(source: Source, render: Render | None = None) -> Iterator[str]:
    """The documents of `source`, stripped, empty ones left out.

    Args:
        render: what makes text of a conversation, such as a tokenizer's chat template.

    Raises:
        RecipeError: no such file or data set, not UTF-8, a conversation without `render`, or no text in it.
    """
    files, found = source.files(), False
    texts = _rows(source, None, render) if files is None else chain.from_iterable(_read_file(source, file, render) for file in files)
    for text in texts:
        if stripped := text.strip():
            found = True
            yield stripped
    if not found:
        raise RecipeError(f"{source.name} holds no text; give a file with documents in it, apart by {source.separator}")


def read_all(sources: Sequence[Source], render: Render | None = None) -> Iterator[str]:
    """The documents of all sources, one after the other."""
    return chain.from_iterable(read_documents(source, render) for source in sources)


def unique(documents: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    """`documents` without those met before; `seen` collects their digests and may be shared between streams."""
    for document in documents:
        digest = hashlib.blake2b(document.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield document


def _kind(path: Path) -> str:
    """The ending that says how a file is read; nothing where none does."""
    endings = (*_TEXT, *_LINES, *_TABLES)
    return next((ending for ending in endings if path.name.lower().endswith(ending)), "")


def _read_file(source: Source, path: Path, render: Render | None) -> Iterator[str]:
    kind = _kind(path)
    if kind in _TABLES:
        return _rows(source, path, render)
    return _lines(source, path, render) if kind in _LINES else _split_file(path, source.separator)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open_file(path) as raw:
            if path.suffix != ".xz":
                yield raw
                return
            with lzma.open(raw) as plain:
                yield plain  # type: ignore[misc]
    except (lzma.LZMAError, EOFError, OSError) as error:
        raise RecipeError(f"{path} cannot be read ({sentence(error)}); copy or download it again") from None


def _split_file(path: Path, separator: str, chunk: int = 1 << 20) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, offset = "", 0
    with _opened(path) as file:
        while data := file.read(chunk):
            pending = len(decoder.getstate()[0])
            try:
                rest += decoder.decode(data)
            except UnicodeDecodeError as error:
                where = offset - pending + error.start
                raise RecipeError(
                    f"{path} is not UTF-8 text (byte {where} is 0x{error.object[error.start]:02x}); convert it to UTF-8"
                ) from None
            offset += len(data)
            *whole, rest = rest.split(separator)
            for document in whole:
                yield from _parts(document)
            # The last characters may be the first of a separator.
            while len(rest) > LONGEST_DOCUMENT + len(separator):
                at = _cut(rest)
                yield rest[:at]
                rest = rest[at:]
    if decoder.getstate()[0]:
        raise RecipeError(f"{path} is not UTF-8 text (its last character is cut off); convert it to UTF-8")
    yield from _parts(rest)


def _parts(document: str) -> Iterator[str]:
    """`document` in parts of at most LONGEST_DOCUMENT characters."""
    while len(document) > LONGEST_DOCUMENT:
        at = _cut(document)
        yield document[:at]
        document = document[at:]
    yield document


def _cut(text: str) -> int:
    """Where a text that is too long is cut: at the last blank of what may stand, if there is one in its second half."""
    at = max(text.rfind(blank, LONGEST_DOCUMENT // 2, LONGEST_DOCUMENT) for blank in " \n")
    return at if at > 0 else LONGEST_DOCUMENT


def _lines(source: Source, path: Path, render: Render | None) -> Iterator[str]:
    """The column of each line of a .jsonl file."""
    with _opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            where = f"{path}, line {number}"
            if len(line) == LONGEST_LINE:
                raise RecipeError(f"{where} has more than {LONGEST_LINE:,} bytes; cut it into several")
            if not line.strip():
                continue
            row = parse_json(line.decode("utf-8", errors="replace"), where)
            if not isinstance(row, dict):
                raise RecipeError(f"{where} is no JSON object with the text in its column {source.column!r}")
            if source.column not in row:
                raise _no_column(where, source, row)
            yield from _parts(_text(row[source.column], where, render))


def _rows(source: Source, path: Path | None, render: Render | None) -> Iterator[str]:
    """The column of a table, or of a data set on the hub."""
    _require_datasets(source.name)
    import datasets

    name = source.name if path is None else str(path)
    try:
        if path is None:
            data = datasets.load_dataset(name, split=source.split, trust_remote_code=False)
        else:
            data = datasets.load_dataset(_TABLES[_kind(path)], data_files=name, split="train", trust_remote_code=False)
    except Exception as error:  # datasets, huggingface_hub, pyarrow and the network each raise their own
        raise RecipeError(f"{name}: the data set cannot be loaded ({sentence(error)})") from None
    if source.column not in data.column_names:
        raise _no_column(name, source, data.column_names)
    return (part for batch in data.iter(_ROWS) for row in batch[source.column] for part in _parts(_text(row, name, render)))


def _require_datasets(name: str) -> None:
    spec = find_spec("datasets")
    if spec is None or spec.origin is None:  # a folder of that name is no library
        raise RecipeError(f"{name} is read by the library datasets: `pip install datasets`, or give .txt or .jsonl files")


def _no_column(where: str, source: Source, columns: Iterable[str]) -> RecipeError:
    return RecipeError(f"{where} has no column {source.column!r}; set {source.column_option} to one of {', '.join(columns)}")


def _text(value: Any, where: str, render: Render | None) -> str:
    """A row's value as text; a list of messages through `render`."""
    if not isinstance(value, list):
        return str(value)
    if not value or not all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in value):
        raise RecipeError(f"{where} holds a list that is no conversation; each of it must have a role and a content")
    if render is None:
        raise RecipeError(f"{where} holds a conversation, and the tokenizer has no chat template; give text, or a tokenizer that has one")
    try:
        return render(value)
    except Exception as error:  # what a template raises, it says itself
        raise RecipeError(f"{where}: the chat template refuses the conversation {json.dumps(value)[:100]} ({sentence(error)})") from None
