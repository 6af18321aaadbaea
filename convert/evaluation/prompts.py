"""Prompts that ask for something said before, so many tokens ago.

Four kinds, made from any text and a seed:

    needle        one remark with a key of five digits, in a text; the remark is begun again, and the key is to follow
    one-of-four   four such remarks about different things, one of which is asked about
    key-value     eight pairs of numbers, one of whose first numbers comes again
    associative   eight pairs of words out of the text, likewise

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
_PAIRS = 8


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        ids: its tokens, the start token first.
        answer: what is to follow, without the blank before it.
        place: where in ``ids`` what is asked for ends, ``distance`` tokens before the end.
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

    def _needle(self, rng: random.Random, distance: int, remarks: int = 1) -> Prompt:
        things = rng.sample([f"The number written on the {colour} {thing} is" for colour in _COLOURS for thing in _THINGS], remarks)
        return self._hidden(rng, distance, things, [str(key) for key in rng.sample(range(10000, 100000), remarks)])

    def _one_of_four(self, rng: random.Random, distance: int) -> Prompt:
        return self._needle(rng, distance, remarks=4)

    def _key_value(self, rng: random.Random, distance: int) -> Prompt:
        numbers = [str(number) for number in rng.sample(range(10000, 100000), 2 * _PAIRS)]
        return self._hidden(rng, distance, [f"{number}:" for number in numbers[:_PAIRS]], numbers[_PAIRS:])

    def _associative(self, rng: random.Random, distance: int) -> Prompt:
        if len(self.words) < 2 * _PAIRS:
            raise ConversionError(f"{self.name} has {len(self.words)} different words, too few for pairs of them; give a longer --filler")
        words = rng.sample(self.words, 2 * _PAIRS)
        return self._hidden(rng, distance, [f"{word} ->" for word in words[:_PAIRS]], words[_PAIRS:])

    def _hidden(self, rng: random.Random, distance: int, questions: list[str], answers: list[str]) -> Prompt:
        """Lines of a question and its answer in a text, at the end of which the first question stands again."""
        end, question = self._tokens("." + _LINE), self._tokens(_LINE + questions[0])
        asked, *others = (self._tokens(f"{_LINE}{said} {answer}") for said, answer in zip(questions, answers, strict=True))
        between = distance - len(question) - len(end)
        if between < 0:
            taken = len(question) + len(end)
            raise ConversionError(f"--distances names {distance}, and the question alone takes {taken} tokens; give larger ones")
        before = self.length(distance) - 1 - len(asked) - distance
        sides: tuple[list[list[int]], list[list[int]]] = ([], [])
        for line in ([*other, *end] for other in others):
            room = [size - sum(map(len, side)) - len(line) for size, side in zip((before, between), sides, strict=True)]
            sides[room[1] > 0 and rng.random() * sum(room) < room[1]].append(line)
        lead, after = (self._filled(rng, size, side) for size, side in zip((before, between), sides, strict=True))
        ids = [start_token(self.tokenizer), *lead, *asked, *end, *after, *question]
        return Prompt(ids, answers[0], len(ids) - distance)

    def _filled(self, rng: random.Random, size: int, remarks: list[list[int]]) -> list[int]:
        """So many tokens of filler with the remarks among them."""
        size -= sum(map(len, remarks))
        if size < 0:
            raise ConversionError(f"--recall-length is too small for all remarks of a prompt, by {-size} tokens; give a larger one")
        start, done = rng.randrange(len(self.filler) - size), 0
        out: list[int] = []
        for remark in remarks:
            cut = rng.randrange(done, size + 1)
            out += [*self.filler[start + done : start + cut], *remark]
            done = cut
        return out + self.filler[start + done : start + size]

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
