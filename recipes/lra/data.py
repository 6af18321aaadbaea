"""The six tasks' data as compact arrays, read from prepared folders, from the release's files, from other local files, or from the hub.

A token is one byte: a digit or operator (ListOps), a byte of text (Text, Retrieval), a grey level (Image, Pathfinder, Path-X). The model
sees token + 1, and 0 as padding. A split of any task fits in memory, on the GPU too.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.errors import RecipeError, sentence
from recipes.common.reading import inside, is_data_set, read_json

from .listops import OPERATORS

SPLITS = ("train", "valid", "test")
LONGEST_LINE = 2**22
"""Characters of one example; of those the tasks read 4,000."""


@dataclass(frozen=True)
class Task:
    """What a task's data look like. length: the most tokens of one sequence; sizes: the published examples of train, valid, test."""

    name: str
    vocabulary: int
    length: int
    classes: int
    sizes: tuple[int, int, int]
    side: int = 0  # of the image, in pixels
    towers: int = 1


# A tenth of IMDb's training half is held out: the published rows validate on the test half, which would let the test choose the checkpoint.
TASKS = {
    task.name: task
    for task in (
        Task("listops", 11 + len(OPERATORS), 2000, 10, (96_000, 2_000, 2_000)),
        Task("text", 256, 4000, 2, (22_500, 2_500, 25_000)),
        Task("retrieval", 256, 4000, 2, (147_086, 18_090, 17_437), towers=2),
        Task("image", 256, 1024, 10, (45_000, 5_000, 10_000), side=32),
        Task("pathfinder", 256, 1024, 2, (160_000, 20_000, 20_000), side=32),
        Task("pathfinder64", 256, 4096, 2, (160_000, 20_000, 20_000), side=64),
        Task("pathx", 256, 16384, 2, (160_000, 20_000, 20_000), side=128),
    )
}


@dataclass(frozen=True)
class Sequences:
    """tokens: uint8 (total,), one sequence after another; sequence i is tokens[offsets[i]:offsets[i + 1]]; offsets: int64 (n + 1,)."""

    tokens: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, sequences: Iterable[np.ndarray]) -> Sequences:
        parts = list(sequences)
        offsets = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return cls(np.concatenate(parts) if parts else np.zeros(0, np.uint8), offsets)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def take(self, indices: np.ndarray) -> Sequences:
        return Sequences.of(self[int(index)] for index in indices)


@dataclass(frozen=True)
class Split:
    """labels: int64 (n,); towers: one Sequences of n, or two for pairs."""

    towers: tuple[Sequences, ...]
    labels: np.ndarray

    @classmethod
    def of(cls, examples: Iterable[tuple[tuple[np.ndarray, ...], int]], towers: int = 1) -> Split:
        """From (sequences of the towers, label) pairs."""
        pairs = list(examples)
        return cls(
            tuple(Sequences.of(pair[0][t] for pair in pairs) for t in range(towers)), np.array([label for _, label in pairs], np.int64)
        )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Split:
        return Split(tuple(tower.take(indices) for tower in self.towers), self.labels[indices])

    def digest(self) -> str:
        """A short digest of all examples, to notice that a run is resumed on others."""
        whole = hashlib.blake2b(self.labels.tobytes(), digest_size=8)
        for tower in self.towers:
            whole.update(np.ascontiguousarray(tower.tokens).data)
            whole.update(np.ascontiguousarray(tower.offsets).data)
        return whole.hexdigest()

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {"labels": self.labels.astype(np.uint8)}
        for number, tower in enumerate(self.towers):
            arrays |= {f"tokens{number}": tower.tokens, f"offsets{number}": tower.offsets}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path, task: Task) -> Split:
        """Raises RecipeError where the file is damaged or is another task's."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                towers = tuple(Sequences(arrays[f"tokens{t}"], arrays[f"offsets{t}"]) for t in range(task.towers))
                split = cls(towers, arrays["labels"].astype(np.int64))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise RecipeError(
                f"{path}: not a whole prepared split of {task.name} ({sentence(error)}); run recipes.lra.prepare again"
            ) from None
        if any(len(tower) != len(split) or len(tower.tokens) != tower.offsets[-1] for tower in towers):
            raise RecipeError(f"{path}: its sequences and labels do not fit each other; run recipes.lra.prepare again")
        return split


def load(task: Task, folder: str | Path) -> dict[str, Split]:
    """train, valid and test from a folder that `recipes.lra.prepare` wrote, or from one with the release's files.

    Raises RecipeError where neither is there, and where a file is bad."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder; make it with: python -m {__package__}.prepare {task.name} --out {folder}")
    if (folder / "prepared.json").is_file():
        prepared = read_prepared(folder)
        if prepared.get("task") != task.name:
            raise RecipeError(f"{folder} holds the data of {prepared.get('task')}, not of {task.name}; name another folder")
        splits = {name: Split.load(folder / f"{name}.npz", task) for name in SPLITS}
    else:
        splits = read_folder(task, folder)
    for name, split in splits.items():
        check(task, split, f"{folder} ({name})")
    return splits


def read_prepared(folder: Path) -> dict[str, Any]:
    prepared = read_json(folder / "prepared.json")
    if not isinstance(prepared, dict) or "task" not in prepared:
        raise RecipeError(f"{folder / 'prepared.json'} names no task; run recipes.lra.prepare again with --overwrite")
    return prepared


def check(task: Task, split: Split, where: str) -> None:
    """Raise RecipeError where tokens, lengths or labels are outside what the task allows."""
    if not len(split):
        raise RecipeError(f"{where}: there is no example; expected at least one")
    if split.labels.min() < 0 or split.labels.max() >= task.classes:
        raise RecipeError(
            f"{where}: labels reach from {split.labels.min()} to {split.labels.max()}, {task.name} has classes 0 to {task.classes - 1}"
        )
    for tower in split.towers:
        lengths = tower.lengths
        if lengths.min() < 1 or lengths.max() > task.length or (task.side and lengths.min() != task.length):
            raise RecipeError(f"{where}: sequences have {lengths.min()} to {lengths.max()} tokens, {task.name} allows {_allowed(task)}")
        if tower.tokens.max() >= task.vocabulary:
            raise RecipeError(f"{where}: token {tower.tokens.max()} is outside the {task.vocabulary} tokens of {task.name}")


def _allowed(task: Task) -> str:
    return f"exactly {task.length}" if task.side else f"1 to {task.length}"


# -- one example ---------------------------------------------------------------------------------------------------------------------------

_LISTOPS_CODES = np.full(256, 255, np.uint8)
_LISTOPS_CODES[list(b"0123456789")] = range(10)
_LISTOPS_CODES[list(b"abcd")] = range(10, 14)
_LISTOPS_CODES[ord("]")] = 14
LISTOPS_SYMBOLS = [*"0123456789", *(f"[{name}" for name in OPERATORS), "]"]


def encode_listops(source: str) -> np.ndarray:
    """The tokens of an expression, split at blanks and with the parentheses dropped, as numbers of LISTOPS_SYMBOLS, uint8 (length,).

    Raises ValueError that names a token which is none."""
    words = source.replace("(", "").replace(")", "").split()
    short = " ".join(words)
    for name, letter in zip(OPERATORS, "abcd", strict=True):
        short = short.replace(f"[{name}", letter)
    letters = short.split()
    codes = _LISTOPS_CODES[np.frombuffer("".join(letters).encode("ascii", "replace"), np.uint8)]
    if len(codes) != len(words) or (codes == 255).any() or not set("abcd").isdisjoint("".join(words)):
        unknown = next((word for word in words if word not in LISTOPS_SYMBOLS), None)
        if unknown is not None:
            raise ValueError(f"unknown token {unknown!r}, expected one of {' '.join(LISTOPS_SYMBOLS)}")
    return codes


def encode_text(text: str | bytes, length: int) -> np.ndarray:
    """The first `length` bytes, uint8. An empty text becomes one blank, since a sequence needs a token."""
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return np.frombuffer(data[:length] or b" ", np.uint8)


def encode_image(image: Any, side: int) -> np.ndarray:
    """The grey levels of a PIL image row by row, uint8 (side * side,); grey by luma, 0.299 R + 0.587 G + 0.114 B.

    Raises ValueError where the size is another or the image is cut short."""
    if image.size != (side, side):
        raise ValueError(f"the image is {image.size[0]} x {image.size[1]} pixels, expected {side} x {side}")
    try:
        return np.asarray(image.convert("L"), np.uint8).reshape(-1)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"the image cannot be read ({sentence(error)})") from None


def open_image(source: Any) -> Any:
    """A PIL image of a path or a binary file. Raises ValueError where it is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(source)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"the image cannot be read ({sentence(error)})") from None


def parse_label(text: Any, classes: int) -> int:
    """Raises ValueError where it is no whole number from 0 to classes - 1."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = -1.0
    if not (0 <= value < classes and value == int(value)):
        raise ValueError(f"the label is {str(text)[:40]!r}, expected a whole number from 0 to {classes - 1}")
    return int(value)


# -- files ---------------------------------------------------------------------------------------------------------------------------------


def read_folder(task: Task, folder: Path, seed: int = 0, processes: int = 1) -> dict[str, Split]:
    """The three splits from local files:

    ListOps       basic_train.tsv, basic_val.tsv, basic_test.tsv (columns Source and Target)
    Retrieval     new_aan_pairs.train.tsv, .eval.tsv, .test.tsv (label, id1, id2, text1, text2, no header)
    Pathfinder    [pathfinder32/]curv_contour_length_14/ with metadata/*.npy and imgs/*/*.png; 80, 10 and 10 in a hundred by `seed`
    Text          imdb_train.jsonl[.xz], imdb_test.jsonl[.xz] (label and text a line); a tenth of train held out by `seed`
    Image         cifar10_train_jpeg.npz, cifar10_test_jpeg.npz (jpeg, offsets, labels); a tenth of train held out by `seed`
    """
    if task.name == "listops":
        names = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
        return {split: read_listops(_existing(folder, task, name), task) for split, name in names.items()}
    if task.name == "retrieval":
        names = {"train": "new_aan_pairs.train.tsv", "valid": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
        return {split: read_retrieval(_existing(folder, task, name), task) for split, name in names.items()}
    if task.name == "text":
        train, test = (
            read_jsonl(_existing(folder, task, f"imdb_{half}.jsonl.xz", f"imdb_{half}.jsonl"), task) for half in ("train", "test")
        )
        return hold_out(train, seed) | {"test": test}
    if task.name == "image":
        train, test = (read_jpegs(_existing(folder, task, f"cifar10_{half}_jpeg.npz"), task) for half in ("train", "test"))
        return hold_out(train, seed) | {"test": test}
    return shares(read_pathfinder(folder, task, processes), seed)


def _existing(folder: Path, task: Task, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise RecipeError(f"{folder}: {' or '.join(names)} is missing, so there is no {task.name} data here; name the folder that holds it")


def hold_out(train: Split, seed: int) -> dict[str, Split]:
    """A tenth of `train`, chosen by `seed`, as valid."""
    order = np.random.default_rng([seed, 10]).permutation(len(train))
    held = len(train) // 10
    return {"train": train.take(np.sort(order[held:])), "valid": train.take(np.sort(order[:held]))}


def shares(whole: Split, seed: int) -> dict[str, Split]:
    """80, 10 and 10 in a hundred, chosen by `seed`."""
    order = np.random.default_rng([seed, 80]).permutation(len(whole))
    cuts = len(whole) * 8 // 10, len(whole) * 9 // 10
    return {name: whole.take(np.sort(part)) for name, part in zip(SPLITS, np.split(order, cuts), strict=True)}


Example = tuple[tuple[np.ndarray, ...], int]


def _rows(path: Path, read: Callable[[str, int], Example]) -> Iterator[Example]:
    """read(line, number) for each line, with the file and line in front of what it complains about. Undecodable bytes pass through."""
    number = 0
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), ""), 1):
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"the line has more than {LONGEST_LINE:,} characters, expected one example")
                if line.strip():
                    yield read(line.rstrip("\r\n"), number)
    except ValueError as error:
        raise RecipeError(f"{path}, line {number}: {sentence(error)}") from None
    except (EOFError, lzma.LZMAError) as error:
        raise RecipeError(f"{path}, after line {number}: the compressed file is damaged or cut short ({sentence(error)})") from None


def read_listops(path: Path, task: Task) -> Split:
    """A tab-separated file whose first line names the columns Source and Target."""
    columns: dict[str, int] = {}

    def read(line: str, number: int) -> Example:
        fields = line.split("\t")
        if len(fields) <= max(columns.values()):
            raise ValueError(f"{len(fields)} columns, expected {len(columns)} separated by tabs")
        tokens = encode_listops(fields[columns["Source"]])
        if not 1 <= len(tokens) <= task.length:
            raise ValueError(f"the expression has {len(tokens)} tokens, expected {_allowed(task)}")
        return (tokens,), parse_label(fields[columns["Target"]], task.classes)

    def header_or_row(line: str, number: int) -> Example:
        if columns:
            return read(line, number)
        names = line.split("\t")
        missing = [name for name in ("Source", "Target") if name not in names]
        if missing:
            raise ValueError(
                f"the column {' and '.join(missing)} is missing; expected a first line with Source and Target, separated by a tab"
            )
        columns.update({name: names.index(name) for name in ("Source", "Target")})
        return _HEADER

    return Split.of(row for row in _rows(path, header_or_row) if row is not _HEADER)


_HEADER: Example = ((), -1)


def read_retrieval(path: Path, task: Task) -> Split:
    """A tab-separated file of label, id1, id2, text1, text2 without a header."""

    def read(line: str, number: int) -> Example:
        fields = line.split("\t")
        if len(fields) != 5:
            raise ValueError(f"{len(fields)} columns, expected 5 separated by tabs (label, id1, id2, text1, text2)")
        return (encode_text(fields[3], task.length), encode_text(fields[4], task.length)), parse_label(fields[0], task.classes)

    return Split.of(_rows(path, read), towers=2)


def read_jsonl(path: Path, task: Task) -> Split:
    """One JSON object a line with text and label."""

    def read(line: str, number: int) -> Example:
        row = json.loads(line)
        missing = [key for key in ("text", "label") if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(f"{' and '.join(missing)} is missing; expected a JSON object with text and label")
        if not isinstance(row["text"], str):
            raise ValueError(f"text is a {type(row['text']).__name__}, expected a string")
        label = {"neg": 0, "pos": 1}.get(row["label"], row["label"])
        return (encode_text(row["text"], task.length),), parse_label(label, task.classes)

    return Split.of(_rows(path, read))


def read_jpegs(path: Path, task: Task) -> Split:
    """An .npz of images one after another: image i is the file jpeg[offsets[i]:offsets[i + 1]], its class labels[i]."""
    import io

    try:
        with np.load(path, allow_pickle=False) as arrays:
            jpeg, offsets, labels = arrays["jpeg"], arrays["offsets"], arrays["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RecipeError(f"{path}: expected an .npz with jpeg, offsets and labels ({sentence(error)})") from None
    if len(offsets) != len(labels) + 1 or offsets[-1] > len(jpeg):
        raise RecipeError(f"{path}: {len(offsets) - 1} images in {len(jpeg)} bytes do not fit {len(labels)} labels; the file is damaged")

    def examples() -> Iterator[Example]:
        for number, (start, end, label) in enumerate(zip(offsets[:-1], offsets[1:], labels, strict=True)):
            try:
                image = open_image(io.BytesIO(jpeg[start:end].tobytes()))
                yield (encode_image(image, task.side),), parse_label(label, task.classes)
            except ValueError as error:
                raise RecipeError(f"{path}, image {number}: {sentence(error)}") from None

    return Split.of(examples())


def read_pathfinder(folder: Path, task: Task, processes: int = 1) -> Split:
    """All images that the metadata name, in the order of the metadata files' numbers."""
    from .parallel import ordered_map

    root = pathfinder_root(folder, task)
    files = sorted((root / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    if not files:
        raise RecipeError(
            f"{root / 'metadata'}: no metadata (*.npy) here; expected the release's layout, metadata/0.npy beside imgs/0/sample_0.png"
        )
    parts = list(ordered_map(_PathfinderReader(root, task), files, processes))
    return Split.of((tokens, label) for part in parts for tokens, label in part)


def pathfinder_root(folder: Path, task: Task) -> Path:
    """The folder with metadata/ and imgs/ of the hard set (contours of 14)."""
    for candidate in (folder, folder / "curv_contour_length_14", folder / f"pathfinder{task.side}" / "curv_contour_length_14"):
        if (candidate / "metadata").is_dir():
            return candidate
    raise RecipeError(
        f"{folder}: no metadata folder, so there is no {task.name} data here; expected curv_contour_length_14/metadata and .../imgs"
    )


@dataclass(frozen=True)
class _PathfinderReader:
    root: Path
    task: Task

    def __call__(self, metadata: Path) -> list[Example]:
        examples: list[Example] = []
        for number, fields in enumerate(read_metadata(metadata), 1):
            where = f"{metadata}, line {number}"
            if len(fields) < 4:
                raise RecipeError(f"{where}: {len(fields)} columns, expected at least 4 (folder, file, number, label)")
            path = inside(self.root, f"{fields[0]}/{fields[1]}", where)
            try:
                label = parse_label(fields[3], self.task.classes)
                if not path.is_file():
                    raise ValueError(f"the image {path} is missing")
                with open_image(path) as image:
                    examples.append(((encode_image(image, self.task.side),), label))
            except ValueError as error:
                raise RecipeError(f"{where}, {path}: {sentence(error)}") from None
        return examples


def read_metadata(path: Path) -> list[list[str]]:
    """The rows of a metadata file: text with blanks between the fields, as in the release, or an array of strings, as the generator's own
    code saves it."""
    with path.open("rb") as file:
        is_array = file.read(6) == b"\x93NUMPY"
    try:
        if is_array:
            return [[str(field) for field in row] for row in np.load(path, allow_pickle=False)]
        return [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: not a metadata file ({sentence(error)}); expected text, or a NumPy array of strings") from None


# -- hub -----------------------------------------------------------------------------------------------------------------------------------

HUB = {"text": "stanfordnlp/imdb", "image": "uoft-cs/cifar10"}


def read_hub(task: Task, name: str, seed: int = 0) -> dict[str, Split]:
    """The three splits of a data set on the hub (or a local folder that `load_dataset` reads). A missing validation split is held out of
    train.

    Columns: Source and Target (ListOps); text1, text2 and label (Retrieval); text and label (Text); image or img, and label (the rest)."""
    import datasets

    if not (is_data_set(name) or Path(name).is_dir()):
        raise RecipeError(f"{name} is neither a folder nor a data set's id on the hub, such as stanfordnlp/imdb; name one of them")
    try:
        found = datasets.load_dataset(name, trust_remote_code=False)
    except Exception as error:  # what load_dataset raises depends on the hub, the network and the data set's own files
        raise RecipeError(
            f"{name}: load_dataset failed ({sentence(error)}); check the name and the network, or give local files by --source"
        ) from None
    splits = {}
    for split, names in {"train": ("train",), "valid": ("validation", "valid", "val"), "test": ("test",)}.items():
        rows = next((found[key] for key in names if key in found), None)
        if rows is not None:
            splits[split] = Split.of(_hub_rows(task, rows, f"{name} ({split})"), task.towers)
    for split in ("train", "test"):
        if split not in splits:
            raise RecipeError(f"{name}: there is no {split} split; it has {', '.join(found)}")
    return splits if "valid" in splits else hold_out(splits["train"], seed) | {"test": splits["test"]}


def _hub_rows(task: Task, rows: Any, where: str) -> Iterator[Example]:
    wanted = {"listops": ("Source", "Target"), "retrieval": ("text1", "text2", "label"), "text": ("text", "label")}.get(task.name)
    if wanted is None:
        wanted = ("img" if "img" in rows.column_names else "image", "label")
    missing = [column for column in wanted if column not in rows.column_names]
    if missing:
        raise RecipeError(f"{where}: the column {' and '.join(missing)} is missing; it has {', '.join(rows.column_names)}")
    for number, row in enumerate(rows):
        *sources, label = (row[column] for column in wanted)
        try:
            yield tuple(_hub_tokens(task, source) for source in sources), parse_label(label, task.classes)
        except ValueError as error:
            raise RecipeError(f"{where}, row {number}: {sentence(error)}") from None


def _hub_tokens(task: Task, source: Any) -> np.ndarray:
    if task.side:
        return encode_image(source, task.side)
    return encode_listops(source) if task.name == "listops" else encode_text(source, task.length)


def shortened(split: Split, count: int | None, seed: int) -> Split:
    """`count` of the examples, chosen by `seed`; all of them where `count` is None.

    Raises RecipeError where there are fewer."""
    if count is None or count == len(split):
        return split
    if not 0 < count < len(split):
        raise RecipeError(f"{count} examples are asked for and there are {len(split)}; ask for 1 to {len(split)}")
    return split.take(np.array(sorted(random.Random(seed).sample(range(len(split)), count))))
