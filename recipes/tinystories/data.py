"""Stories without duplicates, some of them held out for validation. Where they come from and what they become is `recipes.common`'s."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from recipes.common.documents import Render, Source, read_all, unique
from recipes.common.errors import RecipeError


@dataclass(frozen=True)
class Stories:
    """Training and validation stories, no story twice and none in both; read anew each time they are asked for.

    Attributes:
        held_out: where there is no `validation`, so many of the last distinct stories of `training` are.
        render: what makes text of a conversation.
    """

    training: Sequence[Source]
    validation: Sequence[Source] = ()
    held_out: int = 500
    render: Render | None = None

    def train(self) -> Iterator[str]:
        """The stories to train on."""
        seen: set[bytes] = set()
        for _ in unique(read_all(self.validation, self.render), seen):
            pass
        texts = unique(read_all(self.training, self.render), seen)
        if self.validation:
            yield from texts
            return
        last: deque[str] = deque()
        for text in texts:
            last.append(text)
            if len(last) > self.held_out:
                yield last.popleft()
        self._refuse_too_few(len(last), len(seen))

    def valid(self) -> Iterator[str]:
        """The stories to validate on."""
        seen: set[bytes] = set()
        texts = unique(read_all(self.validation or self.training, self.render), seen)
        if self.validation:
            yield from texts
            return
        last = deque(texts, maxlen=self.held_out)
        self._refuse_too_few(len(last), len(seen))
        yield from last

    def key(self, part: str) -> list[Any]:
        """What tells the stories of a part, "train" or "valid", from others."""
        stamps = [[source.stamp() for source in sources] for sources in (self.training, self.validation)]
        return ["stories", part, *stamps, 0 if self.validation else self.held_out]

    def _refuse_too_few(self, held_out: int, all_of_them: int) -> None:
        if held_out == all_of_them:
            raise RecipeError(
                f"{held_out} stories are too few to hold {self.held_out} out for validation; lower valid_stories or give valid_data"
            )


def last_stories(sources: Sequence[Source], number: int) -> list[str]:
    """The last `number` distinct stories of `sources`."""
    return list(deque(unique(read_all(sources), set()), maxlen=number))


def first_words(stories: Iterator[str] | Sequence[str], number: int, words: int) -> list[str]:
    """The first `words` words of each of the first `number` stories: prompts to go on from."""
    return [" ".join(story.split()[:words]) for story in islice(stories, number)]
