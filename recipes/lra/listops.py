"""ListOps (Nangia & Bowman 2018, arXiv:1804.06028) in its Long Range Arena form (Tay et al. 2020, arXiv:2011.04006, appendix A.1).

A node at depth below 10 is a list with probability 1/4, else a digit 0-9; a list is one of MIN, MAX, MED (median, rounded down) or SM
(sum modulo 10) with 2 to 10 arguments. A list counts 2 tokens (operator and closing bracket) plus its arguments; a tree is kept when it
has more than 500 and fewer than 2000 tokens, and its value is the label.

Trees are drawn level by level for a whole batch at once, so that every step is an array operation; a batch depends on (seed, number of
the batch) alone, so the data do not depend on how many processes make them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from .parallel import ordered_map

OPERATORS = ("MIN", "MAX", "MED", "SM")
LIST_PROBABILITY = 0.25
MAX_DEPTH = 10
MIN_ARGUMENTS, MAX_ARGUMENTS = 2, 10
MIN_LENGTH, MAX_LENGTH = 500, 2000
TREES_PER_BATCH = 4096
BARREN_BATCHES = 50  # this many batches without one tree: the bounds are taken to leave no room

# Codes of the written tokens: digits are themselves, an operator carries its number of arguments because the release writes that many
# parentheses.
_OPERATOR, _CLOSE, _CLOSE_ROOT = 10, 80, 81


@dataclass(frozen=True)
class Level:
    """All nodes of one depth in a batch of trees, siblings next to each other, trees in order. Every array is (nodes,)."""

    tree: np.ndarray
    arguments: np.ndarray  # 0 for a digit
    operator: np.ndarray
    digit: np.ndarray

    def keep(self, trees: np.ndarray) -> Level:
        chosen = trees[self.tree]
        return Level(self.tree[chosen], self.arguments[chosen], self.operator[chosen], self.digit[chosen])


def grow(rng: np.random.Generator, count: int, max_depth: int, max_length: int) -> tuple[list[Level], np.ndarray]:
    """`count` random trees whose root is a list: their levels from the root down, and each tree's length in tokens, (count,).

    Trees that reach `max_length` stop growing: their length only says that they are too long."""
    tree = np.arange(count)
    is_list = np.ones(count, bool)
    lengths = np.zeros(count, np.int64)
    levels: list[Level] = []
    for depth in range(1, max_depth + 1):
        arguments = np.where(is_list, rng.integers(MIN_ARGUMENTS, MAX_ARGUMENTS + 1, len(tree)), 0)
        levels.append(Level(tree, arguments, rng.integers(0, len(OPERATORS), len(tree)), rng.integers(0, 10, len(tree))))
        lengths += np.bincount(tree, weights=1 + is_list, minlength=count).astype(np.int64)
        parents = tree[is_list]
        parents = np.repeat(parents[lengths[parents] < max_length], arguments[is_list][lengths[parents] < max_length])
        if not len(parents):
            break
        tree = parents
        is_list = rng.random(len(tree)) <= LIST_PROBABILITY if depth + 1 < max_depth else np.zeros(len(tree), bool)
    return levels, lengths


def evaluate(levels: list[Level]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Value and length in tokens of every node of every level, from the leaves up."""
    values = [level.digit.copy() for level in levels]
    sizes = [np.ones(len(level.tree), np.int64) for level in levels]
    for depth in range(len(levels) - 2, -1, -1):
        lists = np.flatnonzero(levels[depth].arguments)
        if not len(lists):
            continue
        arguments, operator = levels[depth].arguments[lists], levels[depth].operator[lists]
        starts = np.cumsum(arguments) - arguments
        children = values[depth + 1]
        ordered = np.sort(np.repeat(np.arange(len(lists)), arguments) * 10 + children) % 10
        median = (ordered[starts + (arguments - 1) // 2] + ordered[starts + arguments // 2]) // 2
        results = (
            np.minimum.reduceat(children, starts),
            np.maximum.reduceat(children, starts),
            median,
            np.add.reduceat(children, starts) % 10,
        )
        values[depth][lists] = np.choose(operator, results)
        sizes[depth][lists] = 2 + np.add.reduceat(sizes[depth + 1], starts)
    return values, sizes


def lay_out(levels: list[Level], sizes: list[np.ndarray]) -> np.ndarray:
    """Every tree's written tokens one after another in reading order, as codes."""
    codes = np.empty(int(sizes[0].sum()), np.uint8)
    position = np.cumsum(sizes[0]) - sizes[0]
    for depth, (level, size) in enumerate(zip(levels, sizes, strict=True)):
        is_list = level.arguments > 0
        codes[position] = np.where(is_list, _OPERATOR + level.operator * 16 + level.arguments, level.digit)
        lists = np.flatnonzero(is_list)
        codes[position[lists] + size[lists] - 1] = _CLOSE if depth else _CLOSE_ROOT
        if depth + 1 == len(levels):
            break
        before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]
        arguments = level.arguments[lists]
        first = np.cumsum(arguments) - arguments
        position = before + np.repeat(position[lists] + 1 - before[first], arguments)
    return codes


def _written_tokens() -> list[str]:
    """What the release writes for a code. It nests pairs, ((([MAX 2) 9) ]), so an operator opens one pair for each argument and one for
    the bracket."""
    table = [f"{digit} )" for digit in range(10)] + [""] * (_CLOSE_ROOT + 1 - 10)
    for index, name in enumerate(OPERATORS):
        for arguments in range(MIN_ARGUMENTS, MAX_ARGUMENTS + 1):
            table[_OPERATOR + index * 16 + arguments] = "( " * (arguments + 1) + f"[{name}"
    table[_CLOSE], table[_CLOSE_ROOT] = "] ) )", "] )"
    return table


_WRITTEN = _written_tokens()


def make_batch(number: int, seed: int, max_depth: int, min_length: int, max_length: int) -> list[tuple[str, int]]:
    """The accepted trees of batch `number`: (Source as the release writes it, Target)."""
    rng = np.random.default_rng([seed, number])
    levels, lengths = grow(rng, TREES_PER_BATCH, max_depth, max_length)
    accepted = (lengths > min_length) & (lengths < max_length)
    levels = [level for level in (level.keep(accepted) for level in levels) if len(level.tree)]
    if not levels:
        return []
    values, sizes = evaluate(levels)
    codes = lay_out(levels, sizes).tolist()
    ends = np.cumsum(sizes[0]).tolist()
    starts = [0, *ends[:-1]]
    return [
        (" ".join([_WRITTEN[code] for code in codes[start:end]]), value)
        for start, end, value in zip(starts, ends, values[0].tolist(), strict=True)
    ]


def generate(
    count: int, seed: int, processes: int = 1, max_depth: int = MAX_DEPTH, min_length: int = MIN_LENGTH, max_length: int = MAX_LENGTH
) -> Iterator[tuple[str, int]]:
    """`count` different (Source, Target) pairs, the same for any number of processes.

    Raises ValueError where the bounds leave no room for a tree."""
    if max_depth < 2 or not 0 <= min_length < max_length - 1:
        raise ValueError(
            f"ListOps needs a depth of 2 or more and min_length < max_length - 1, got {max_depth}, {min_length} and {max_length}."
        )
    worker = partial(make_batch, seed=seed, max_depth=max_depth, min_length=min_length, max_length=max_length)
    seen: set[bytes] = set()
    barren = 0
    for batch in ordered_map(worker, itertools.count(), processes):
        barren = 0 if batch else barren + 1
        if barren == BARREN_BATCHES:
            raise ValueError(
                f"No ListOps tree of depth {max_depth} has more than {min_length} and fewer than {max_length} tokens: widen the bounds."
            )
        for source, target in batch:
            if len(seen) == count:
                return
            key = hashlib.blake2b(source.encode(), digest_size=8).digest()
            if key not in seen:
                seen.add(key)
                yield source, target
        if len(seen) == count:
            return
