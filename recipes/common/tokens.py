"""Text as tokens: a file of them, made once for each text and tokenizer, mapped into memory wherever it is used.

A document is tokenized as it stands behind one start token (the tokenizer's bos, or its eos where there is no bos). Documents follow one
another without a gap.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from recipes.common.documents import Render
from recipes.common.errors import RecipeError, stage
from recipes.common.files import staged_directory, write_json
from recipes.common.reading import read_json
from recipes.common.tokenizing import start_token

COMMAND = "recipes.common.tokens"
CACHE = "HF_LINATTN_CACHE"
"""The environment's name of the folder that keeps tokens; by default hf_linattn in Hugging Face's own."""
_VERSION = 1
_TOGETHER = 2**20 * max(1, min(4, (os.cpu_count() or 1) // 4))
"""Characters that are tokenized at once, on all cores, which takes a hundred times as many bytes."""


class Tokens:
    """The tokens of a text.

    Attributes:
        ids: all of them, (n,) uint16 or uint32, in a file that is mapped into memory.
        start: the token that stands in front of every document.
        digest: a short digest of all tokens.
        documents: how many there are.
    """

    def __init__(self, folder: Path) -> None:
        about = read_json(folder / "tokens.json")
        self.ids: np.ndarray = (
            np.memmap(folder / "tokens.bin", dtype=about["dtype"], mode="r") if about["tokens"] else np.zeros(0, np.uint16)
        )
        self.start, self.digest, self.documents = int(about["start"]), str(about["digest"]), int(about["documents"])
        if len(self.ids) != about["tokens"]:
            raise RecipeError(f"{folder} holds {len(self.ids):,} tokens and {about['tokens']:,} were written; remove that folder")

    def __len__(self) -> int:
        return len(self.ids)


def tokenized(documents: Callable[[], Iterable[str]], key: list[Any], tokenizer: PreTrainedTokenizerBase, what: str = "text") -> Tokens:
    """The tokens of `documents`, from the cache if they are there.

    Args:
        documents: the texts, asked for only if they are needed.
        key: what tells these documents from others, plain values: the stamps of their sources, and what was left out of them.
        what: named by the progress bar.

    Raises:
        RecipeError: a document cannot be read, or the tokens cannot be kept.
    """
    start = start_token(tokenizer)
    name = _digest([_VERSION, key, sorted(tokenizer.get_vocab().items()), _rules(tokenizer), start])
    folder = cache() / f"tokens-{name}"
    with stage(f"keeping the tokens in {folder}", f"free some space, or set {CACHE}"):
        if not folder.exists():
            try:
                with staged_directory(folder, COMMAND) as aside:
                    _write(aside, documents(), tokenizer, start, what)
            except RecipeError:
                if not folder.exists():  # which another process made meanwhile
                    raise
        return Tokens(folder)


def cache() -> Path:
    """The folder that keeps tokens."""
    return Path(os.environ.get(CACHE) or Path(HF_HOME) / "hf_linattn").expanduser()


def chat_template(tokenizer: PreTrainedTokenizerBase) -> Render | None:
    """What makes text of a conversation; None where the tokenizer has no template."""
    if not tokenizer.chat_template:
        return None
    return lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False))


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


def _write(folder: Path, documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, start: int, what: str) -> None:
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
    whole, count, number = hashlib.blake2b(digest_size=8), 0, 0
    with (folder / "tokens.bin").open("wb") as file, tqdm(unit="char", unit_scale=True, desc=f"tokenizing the {what}", delay=1) as bar:
        for together in by_size(documents):
            for ids in _ids(tokenizer, together):
                data = np.asarray([start, *ids], dtype=dtype).tobytes()
                whole.update(data)
                file.write(data)
                count += len(ids) + 1
            number += len(together)
            bar.update(sum(map(len, together)))
    about = {"tokens": count, "documents": number, "start": start, "dtype": dtype.name, "digest": whole.hexdigest()}
    write_json(folder / "tokens.json", about)


def _ids(tokenizer: Any, texts: list[str]) -> Iterator[list[int]]:
    if not tokenizer.is_fast:
        yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return
    # Straight to the Rust library, on all cores and without offsets and masks, which is twice as fast.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
        yield encoding.ids


def _rules(tokenizer: Any) -> str:
    """What else than the vocabulary decides how text becomes tokens."""
    return tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else type(tokenizer).__name__


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
