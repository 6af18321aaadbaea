"""The models that are measured: the teacher, which stays in memory, and beside it one other at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import torch

from convert.errors import ConversionError, stage
from convert.evaluation.options import EvaluationOptions, Subject
from convert.evaluation.windows import windowed
from convert.gguf import unpacked
from recipes.common.checkpoint import COMPANIONS
from recipes.common.loading import load_causal_lm
from recipes.common.reading import open_file, user_path
from recipes.common.tokenizing import load_tokenizer

_READ = {".json", ".safetensors", ".gguf", ".jsonl", ".xz", *(Path(pattern).suffix for pattern in COMPANIONS if pattern.startswith("*."))}
"""Ends of the names of files that a model, its tokenizer or the rows of tasks are read from."""
_WHOLE, _LOOKED_AT, _OF_A_TENSOR = 2**26, 2**20, 2**12
"""Bytes: of a file that is looked at from end to end, of the beginning and the end of a larger one, and of those of each of its tensors."""


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, on its device, with its tokenizer."""

    model: Any
    tokenizer: Any


def usable_device(name: str) -> torch.device:
    """The device of this name; where it is empty a GPU if there is one.

    Raises:
        ConversionError: it cannot be used here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # the device meta can make tensors and not read them
    except (RuntimeError, AssertionError) as error:
        raise ConversionError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try cpu") from None
    return device


def usable_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; where it is empty bfloat16 on a GPU, float32 elsewhere."""
    dtype: torch.dtype = getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))
    return dtype


def tokens_at_once(asked: int, device: torch.device) -> int:
    """Tokens of a batch, where 0 is asked for what a device has room for."""
    return asked or (32768 if device.type == "cuda" else 4096)


def load(path: str, device: torch.device, dtype: torch.dtype) -> Loaded:
    """The model and the tokenizer in a folder, a GGUF file or of a hub id.

    Raises:
        ConversionError: one of them cannot be had.
    """
    with unpacked(path, str(dtype).removeprefix("torch.")) as folder:
        tokenizer = load_tokenizer(folder)
        model: Any = load_causal_lm(folder, dtype=dtype)
    with stage(f"moving {path} to {device}", "give a smaller model, or another --device"):
        return Loaded(model.to(device).eval(), tokenizer)


def check_pair(name: str, model: Loaded, teacher: Loaded) -> None:
    """Refuses a model whose tokens are not the teacher's: neither losses nor logits could be compared.

    Raises:
        ConversionError: another tokenizer, or another number of tokens.
    """
    sizes = [loaded.model.get_output_embeddings().weight.shape[0] for loaded in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise ConversionError(f"{name} has {sizes[0]:,} tokens and the teacher {sizes[1]:,}: give a student of this teacher")
    if model.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ConversionError(f"the tokenizer of {name} is not the teacher's: give a student of this teacher, with its tokenizer")


class Models:
    """Loads what is asked for, once it is: the teacher for good, others until the next."""

    def __init__(self, options: EvaluationOptions) -> None:
        self.device = usable_device(options.device)
        self.dtype, self.batch_tokens = usable_dtype(options.dtype, self.device), tokens_at_once(options.batch_tokens, self.device)
        self._teacher_path, self._sinks = options.subjects()[0].path, options.sinks
        self._teacher: Loaded | None = None
        self._other: tuple[Subject, Loaded] | None = None

    @property
    def teacher(self) -> Loaded:
        """The teacher."""
        if self._teacher is None:
            self._teacher = load(self._teacher_path, self.device, self.dtype)
        return self._teacher

    def is_teacher(self, subject: Subject) -> bool:
        """Whether a row is the teacher's own."""
        return subject == Subject(subject.name, self._teacher_path)

    def opened(self, subject: Subject) -> Loaded:
        """The model of one row; a control shares the teacher's weights.

        Raises:
            ConversionError: it cannot be had, or its tokens are not the teacher's.
        """
        if self.is_teacher(subject):
            return self.teacher
        if self._other is None or self._other[0] != subject:
            self._other = None  # before the next is loaded
            if subject.window is None:
                loaded = load(subject.path, self.device, self.dtype)
                check_pair(subject.name, loaded, self.teacher)
            else:
                loaded = Loaded(windowed(self.teacher.model, subject.window, self._sinks), self.teacher.tokenizer)
            self._other = subject, loaded
        return self._other[1]


def stamp(path: str) -> str:
    """What changes when a model or a text does: a digest of the names, sizes and contents of its files, and of large ones of beginnings and
    ends, their own and those of each tensor; of a hub id, its name."""
    place, digest = user_path(path), blake2b(digest_size=12)
    files = sorted(place.glob("*")) if place.is_dir() else [place] if place.exists() else []
    for file in files:
        if place.is_dir() and (file.suffix not in _READ or file.name.startswith(".") or file.is_dir()):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open_file(file) as opened:
            for begin, count in [(0, size)] if size <= _WHOLE else [*_ends(0, size, _LOOKED_AT), *_of_tensors(opened, size)]:
                opened.seek(begin)
                digest.update(opened.read(count))
    return digest.hexdigest() if files else path


def _ends(begin: int, end: int, count: int) -> list[tuple[int, int]]:
    """Where the first and the last `count` bytes lie."""
    return [(begin, min(count, end - begin)), (max(begin, end - count), min(count, end - begin))]


def _of_tensors(opened: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Where the beginnings and ends of tensors lie in a safetensors file; of any other file nothing."""
    opened.seek(0)
    first = 8 + int.from_bytes(opened.read(8), "little")
    try:
        header = json.loads(opened.read(first - 8)) if first <= size else {}
    except ValueError:
        return
    for one in header.values() if isinstance(header, dict) else ():
        match one:
            case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end <= size - first:
                yield from _ends(first + begin, first + end, _OF_A_TENSOR)


def positions(model: Any) -> int | None:
    """How many the model was made for; None where that is not said."""
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found else None


def check_length(model: Any, length: int, option: str) -> None:
    """Refuses ``length`` where the model has an embedding for each position, and not so many.

    Raises:
        ConversionError: it has not.
    """
    most = positions(model)
    if most is not None and length > most and not getattr(model.config.get_text_config(decoder=True), "rope_parameters", None):
        raise ConversionError(f"{option} asks for {length:,} tokens and the model has {most:,} positions; ask for less")
