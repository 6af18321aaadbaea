"""Stories from the hub or from text files, without duplicates, tokenized and packed to sequences of one length.

A story is tokenized as it stands behind one start token (the tokenizer's bos, or its eos where there is no bos). Stories follow one
another in a stream that is cut every `length` tokens; what is left at the end is dropped.

Text is read as a stream: memory holds stories, and of those a few at a time. One longer than `LONGEST_STORY` is cut into several.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from recipes.common.errors import RecipeError, sentence, stage
from recipes.common.reading import is_data_set
from recipes.common.tokenizing import start_token

_TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
LONGEST_STORY = 2**18
"""Characters, about 65,000 tokens. What goes on longer is cut here, at a blank, and goes on as a story of its own."""
_TOGETHER = 2**20
"""Characters that are tokenized at once, which takes a hundred times as many bytes."""
_ROWS = 100
_CACHE_VERSION = 2


@dataclass(frozen=True)
class Source:
    """One place that stories come from.

    name: a text file (stories apart by `separator`), a .jsonl, .json, .parquet or .csv file (one story in each row's `column`), or
        a data set's id on the hub (`split` of it).
    """

    name: str
    split: str = "train"
    column: str = "text"
    separator: str = "<|endoftext|>"

    def __post_init__(self) -> None:
        if not self.separator:
            raise RecipeError("the separator is empty; give what stands between the stories of a text file")

    def stamp(self) -> list[Any]:
        """What changes when the source does: for a local file its path, size and time of change."""
        path = Path(self.name)
        place = [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else [self.name, self.split]
        return [*place, self.column, self.separator]


def read_stories(source: Source) -> Iterator[str]:
    """The stories of `source`, stripped, empty ones left out.

    Raises:
        RecipeError: no such file or data set, not UTF-8, or no text in it.
    """
    path = Path(source.name)
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; give the text file itself, or several of them")
    if path.exists() and path.suffix not in _TABLES:
        texts: Iterable[str] = _split_file(path, source.separator)
    elif path.exists() or (is_data_set(source.name) and path.suffix not in {".txt", *_TABLES}):
        texts = _rows(source)
    else:
        raise RecipeError(f"{source.name}: no such file; give a text file, or a data set's id on the hub such as roneneldan/TinyStories")
    found = False
    for text in texts:
        if stripped := text.strip():
            found = True
            yield stripped
    if not found:
        raise RecipeError(f"{source.name} holds no text; give a file with stories in it, apart by {source.separator}")


def unique(stories: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    """`stories` without those met before; `seen` collects their digests and may be shared between streams."""
    for story in stories:
        digest = hashlib.blake2b(story.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield story


def split_stories(train: Sequence[Source], valid: Sequence[Source], held_out: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and validation stories (a column "text"), no story twice and none in both.

    Without `valid`, the last `held_out` distinct stories of `train` are held out.
    """
    key = ["stories", [s.stamp() for s in train], [s.stamp() for s in valid], 0 if valid else held_out]

    def generate(part: str) -> Iterator[dict[str, str]]:
        seen: set[bytes] = set()
        if valid:
            validation = unique(chain.from_iterable(map(read_stories, valid)), seen)
            if part == "valid":
                yield from ({"text": text} for text in validation)
                return
            for _ in validation:
                pass
            yield from ({"text": text} for text in unique(chain.from_iterable(map(read_stories, train)), seen))
            return
        last: deque[str] = deque()
        whole = False
        for text in unique(chain.from_iterable(map(read_stories, train)), seen):
            last.append(text)
            if len(last) > held_out:
                first, whole = last.popleft(), True
                if part == "train":
                    yield {"text": first}
        if not whole:
            raise RecipeError(
                f"{len(last)} stories are too few to hold {held_out} out for validation; lower valid_stories or give valid_data"
            )
        if part == "valid":
            yield from ({"text": text} for text in last)

    return _cached(generate, [*key, "train"], part="train"), _cached(generate, [*key, "valid"], part="valid")


def last_stories(sources: Sequence[Source], number: int) -> list[str]:
    """The last `number` distinct stories of `sources`."""
    return list(deque(unique(chain.from_iterable(map(read_stories, sources)), set()), maxlen=number))


def by_size(texts: Iterable[str], most: int = _TOGETHER) -> Iterator[list[str]]:
    """`texts` in lists of at most `most` characters each, or of one text."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > most:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def pack(stories: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> datasets.Dataset:
    """Sequences of exactly `length` tokens, in a column "input_ids".

    Raises:
        RecipeError: all stories together are shorter than one sequence.
    """
    start = start_token(tokenizer)
    vocabulary = hashlib.blake2b(json.dumps(sorted(tokenizer.get_vocab().items())).encode(), digest_size=16).hexdigest()

    def generate() -> Iterator[dict[str, list[int]]]:
        stream: list[int] = []
        found = False
        texts = (text for batch in stories.iter(batch_size=_ROWS) for text in batch["text"])
        for together in by_size(texts):
            for ids in tokenizer(together, add_special_tokens=False, verbose=False)["input_ids"]:
                stream += [start, *ids]
            whole = len(stream) - len(stream) % length
            for begin in range(0, whole, length):
                found = True
                yield {"input_ids": stream[begin : begin + length]}
            del stream[:whole]
        if not found:
            raise RecipeError(
                f"the text is {len(stream)} tokens, shorter than one sequence of {length}; give more text or a smaller length"
            )

    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    key = ["packed", stories._fingerprint, tokenizer.name_or_path, vocabulary, start, length]
    return _cached(generate, key, features).with_format("torch")


def digest(packed: datasets.Dataset) -> str:
    """A short digest of all tokens, to notice that a run is resumed on other data."""
    whole = hashlib.blake2b(digest_size=8)
    for batch in packed.with_format("numpy").iter(batch_size=1000):
        whole.update(batch["input_ids"].tobytes())
    return whole.hexdigest()


class Collator:
    """Rows of `pack` to a batch: input_ids (B, N) int64 and, with `separate`, position_ids (B, N) that restart at every story.

    Positions that restart tell the attention that the stories are separate: none sees another.
    """

    def __init__(self, start: int, separate: bool) -> None:
        self.start = start
        self.separate = separate

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = torch.stack([row["input_ids"] for row in rows]).long()
        if not self.separate:
            return {"input_ids": ids}
        position = torch.arange(ids.shape[1]).expand_as(ids)
        first = torch.where(ids == self.start, position, 0).cummax(dim=1).values
        return {"input_ids": ids, "position_ids": position - first}


class EpochSampler(torch.utils.data.Sampler[int]):
    """Indices below `size` in an order that depends on (seed, epoch) alone, from any point of the epoch on.

    Each epoch gives `per_epoch` of them (a multiple of what one optimizer step takes) and leaves the rest to chance.
    """

    def __init__(self, size: int, per_epoch: int, seed: int) -> None:
        self.size, self.per_epoch, self.seed = size, per_epoch, seed
        self.begin_at(0, 0)

    def begin_at(self, epoch: int, position: int) -> None:
        """Go on in `epoch` after its first `position` indices."""
        self.epoch, self.position = epoch, position

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator)
        return iter(order[self.position : self.per_epoch].tolist())

    def __len__(self) -> int:
        return self.per_epoch - self.position


def _split_file(path: Path, separator: str, chunk: int = 1 << 20) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, offset = "", 0
    with path.open("rb") as file:
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
            for story in whole:
                yield from _parts(story)
            # The last characters may be the first of a separator.
            while len(rest) > LONGEST_STORY + len(separator):
                at = _cut(rest)
                yield rest[:at]
                rest = rest[at:]
    if decoder.getstate()[0]:
        raise RecipeError(f"{path} is not UTF-8 text (its last character is cut off); convert it to UTF-8")
    yield from _parts(rest)


def _parts(story: str) -> Iterator[str]:
    """`story` in parts of at most LONGEST_STORY characters."""
    while len(story) > LONGEST_STORY:
        at = _cut(story)
        yield story[:at]
        story = story[at:]
    yield story


def _cut(text: str) -> int:
    """Where a text that is too long is cut: at the last blank of what may stand, if there is one in its second half."""
    at = max(text.rfind(blank, LONGEST_STORY // 2, LONGEST_STORY) for blank in " \n")
    return at if at > 0 else LONGEST_STORY


def _rows(source: Source) -> Iterator[str]:
    path = Path(source.name)
    try:
        if path.exists():
            data = datasets.load_dataset(_TABLES[path.suffix], data_files=str(path), split="train", trust_remote_code=False)
        else:
            data = datasets.load_dataset(source.name, split=source.split, trust_remote_code=False)
    except Exception as error:  # datasets, huggingface_hub, pyarrow and the network each raise their own
        raise RecipeError(f"{source.name}: the data set cannot be loaded ({sentence(error)})") from None
    if source.column not in data.column_names:
        raise RecipeError(f"{source.name} has no column {source.column!r}; set text_column to one of {', '.join(data.column_names)}")
    return (part for batch in data.iter(_ROWS) for row in batch[source.column] for part in _parts(str(row)))


def _cached(generate: Any, key: list[Any], features: datasets.Features | None = None, **arguments: Any) -> datasets.Dataset:
    """`datasets`' on-disk copy of a generator's rows, made once for each `key`."""
    name = hashlib.blake2b(json.dumps([_CACHE_VERSION, *key]).encode(), digest_size=16).hexdigest()
    with stage(f"keeping the text in {datasets.config.HF_DATASETS_CACHE}", "free some space, or set HF_DATASETS_CACHE"):
        try:
            return datasets.Dataset.from_generator(
                generate, features=features, gen_kwargs=arguments, fingerprint=name, writer_batch_size=_ROWS
            )
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None


def first_words(stories: Sequence[str], number: int, words: int) -> list[str]:
    """The first `words` words of each of the first `number` stories: prompts to go on from."""
    return [" ".join(story.split()[:words]) for story in islice(stories, number)]
