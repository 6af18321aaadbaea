"""Prompts that ask for something said before, so many tokens ago.

Four kinds, made from any text and a seed:

    needle        one remark with a key of five digits, in a text; the remark is begun again, and the key is to follow
    one-of-four   four such remarks about different things, one of which is asked about
    key-value     a list of pairs of numbers, one of whose first numbers comes again
    associative   a list of pairs of words out of the text, likewise

All prompts of one kind and distance have the same number of tokens, so a batch needs no padding. Tokens are put together from pieces that
are tokenized one by one.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import ConversionError
from convert.evaluation.text import first_documents, last_documents
from recipes.common.tokenizing import start_token

_COLOURS = ("red", "blue", "green", "white", "black", "brown", "golden", "silver")
_THINGS = ("kettle", "ladder", "wagon", "drum", "lamp", "basket", "clock", "gate", "bottle", "mirror", "saddle", "anchor")
_FILLER_CHARACTERS = 2**20
_LINE = "\n"


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        ids: its tokens, the start token first.
        answer: what is to follow, without the blank before it.
        place: where in ``ids`` what is asked for ends, ``distance`` tokens before the end; in lists as many whole pairs as that holds.
    """

    ids: list[int]
    answer: str
    place: int


class Prompts:
    """Makes prompts.

    Args:
        filler: text that keys are hidden in.
        tokenizer: of the models.
        length: least number of tokens of a prompt.
        seed: another one for other prompts.
        from_the_end: of the text, and not from its beginning.

    """

    def __init__(self, filler: Path, tokenizer: Any, length: int, seed: int | str = 0, from_the_end: bool = False) -> None:
        self.tokenizer, self.least, self.seed = tokenizer, length, seed
        whole = _LINE.join((last_documents if from_the_end else first_documents)(filler, _FILLER_CHARACTERS))
        self.filler = self._tokens(whole)
        self.words = sorted(set(re.findall(r"\b[a-z]{4,8}\b", whole)))
        self.name = Path(filler).name

    def length(self, distance: int) -> int:
        """Tokens of a prompt whose key is so far back: at least 124 stand before it."""
        return max(self.least, -(-(distance + 124) // 128) * 128)

    def make(self, kind: str, distance: int, number: int) -> list[Prompt]:
        """So many prompts of a kind.

        Raises:
            ConversionError: the question alone takes more than ``distance`` tokens, or the text has too few tokens or words.
        """
        if len(self.filler) <= self.length(distance):
            have = f"{self.name} has {len(self.filler):,} tokens"
            raise ConversionError(f"{have}, too few to hide keys in prompts of {self.length(distance):,}; give a longer --filler")
        make = {"needle": self._needle, "one-of-four": self._one_of_four, "key-value": self._key_value, "associative": self._associative}
        return [make[kind](random.Random(f"{self.seed}/{kind}/{distance}/{index}"), distance) for index in range(number)]

    def _needle(self, rng: random.Random, distance: int, others: int = 0) -> Prompt:
        things = rng.sample([f"the {colour} {thing}" for colour in _COLOURS for thing in _THINGS], 1 + others)
        keys = rng.sample(range(10000, 100000), 1 + others)
        end = self._tokens("." + _LINE)
        remark, *decoys = (self._tokens(f"{_LINE}The number written on {x} is {key}") for x, key in zip(things, keys, strict=True))
        question = self._tokens(f"{_LINE}The number written on {things[0]} is")
        between = self._room(distance - len(question) - len(end), distance, len(question) + len(end))
        before = self.length(distance) - 1 - len(remark) - distance
        sides: tuple[list[list[int]], list[list[int]]] = ([], [])
        for decoy in ([*decoy, *end] for decoy in decoys):
            room = [size - sum(map(len, side)) - len(decoy) for size, side in zip((before, between), sides, strict=True)]
            sides[room[1] > 0 and rng.random() * sum(room) < room[1]].append(decoy)
        lead, after = (self._filled(rng, size, side) for size, side in zip((before, between), sides, strict=True))
        ids = [start_token(self.tokenizer), *lead, *remark, *end, *after, *question]
        return Prompt(ids, str(keys[0]), len(ids) - distance)

    def _one_of_four(self, rng: random.Random, distance: int) -> Prompt:
        return self._needle(rng, distance, others=3)

    def _filled(self, rng: random.Random, size: int, remarks: list[list[int]]) -> list[int]:
        """So many tokens of filler with the remarks among them."""
        size -= sum(map(len, remarks))
        if size < 0:
            raise ConversionError(f"--recall-length is too small for four remarks in a prompt, by {-size} tokens; give a larger one")
        start, done = rng.randrange(len(self.filler) - size), 0
        out: list[int] = []
        for remark in remarks:
            cut = rng.randrange(done, size + 1)
            out += [*self.filler[start + done : start + cut], *remark]
            done = cut
        return out + self.filler[start + done : start + size]

    def _key_value(self, rng: random.Random, distance: int) -> Prompt:
        numbers = [str(number) for number in rng.sample(range(10000, 100000), 2 * self._most_pairs(distance))]
        return self._listed(distance, numbers[::2], numbers[1::2], ":")

    def _associative(self, rng: random.Random, distance: int) -> Prompt:
        firsts = rng.sample(self.words, min(len(self.words), self._most_pairs(distance)))
        return self._listed(distance, firsts, rng.choices(self.words, k=len(firsts)), " ->")

    def _most_pairs(self, distance: int) -> int:
        return self.length(distance) // 3 + 8  # a pair is a line's end, two words and a sign

    def _listed(self, distance: int, firsts: list[str], values: list[str], sign: str) -> Prompt:
        lines = [f"{_LINE}{first}{sign} {value}" for first, value in zip(firsts, values, strict=True)]
        asked, *others = self.tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
        question = self._tokens(f"{_LINE}{firsts[0]}{sign}")
        room = self._room(distance - len(question), distance, len(question))
        after: list[int] = []
        while others and len(after) + len(others[-1]) <= room:
            after += others.pop()
        before = self.length(distance) - 1 - len(asked) - len(after) - len(question)
        lead = [token for pair in others for token in pair]
        if len(lead) < before:
            raise ConversionError(f"{self.name} has {len(self.words):,} different words, too few for such prompts; give a longer --filler")
        ids = [start_token(self.tokenizer), *lead[len(lead) - before :], *asked, *after, *question]
        return Prompt(ids, values[0], len(ids) - len(after) - len(question))

    def _room(self, room: int, distance: int, taken: int) -> int:
        if room < 0:
            raise ConversionError(f"--distances names {distance}, and the question alone takes {taken} tokens; give larger ones")
        return room

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
