"""ListOps: every label by an independent evaluator that reads the written text, and the distributions by an independent generator."""

from __future__ import annotations

import hashlib
import math
import random
import statistics
from collections import Counter
from functools import lru_cache
from itertools import islice

import numpy as np
import pytest

from recipes.lra.listops import OPERATORS, generate

SEED = 3


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, int]]:
    return list(generate(800, SEED))


@lru_cache(maxsize=4096)
def words(source: str) -> list[str]:
    return [word for word in source.split() if word not in "()"]


def median(values: list[int]) -> int:
    return int(statistics.median(values))


def evaluate(source: str) -> int:
    """Reads the tokens from left to right with a stack, by the rules of the task."""
    stack: list[list] = [[]]
    for word in words(source):
        if word == "]":
            operator, *arguments = stack.pop()
            assert 2 <= len(arguments) <= 10
            results = {"[MIN": min, "[MAX": max, "[SM": lambda x: sum(x) % 10, "[MED": median}
            stack[-1].append(results[operator](arguments))
        elif word.startswith("["):
            stack.append([word])
        else:
            stack[-1].append(int(word))
    ((value,),) = stack
    return value


def depth(source: str) -> int:
    deepest = now = 0
    for word in words(source):
        now += word.startswith("[") - (word == "]")
        deepest = max(deepest, now)
    return deepest


def pairs_nested(source: str) -> str:
    """The text again from the tree, in the release's form: ((([MAX 2) 9) ])."""

    def text(node) -> str:
        if isinstance(node, str):
            return node
        nested = node[0]
        for child in [*node[1:], "]"]:
            nested = f"( {nested} {text(child)} )"
        return nested

    stack: list[list] = [[]]
    for word in words(source):
        if word == "]":
            node = stack.pop()
            stack[-1].append(node)
        elif word.startswith("["):
            stack.append([word])
        else:
            stack[-1].append(word)
    return text(stack[0][0])


def drawn_one_by_one(rng: random.Random, level: int = 1) -> tuple[int, int, int]:
    """(length, value, depth) of a tree, by the published recursion; a tree far too long ends early."""
    if level > 1 and (level >= 10 or rng.random() > 0.25):
        return 1, rng.randrange(10), 0
    length, values, deepest = 2, [], 0
    for _ in range(rng.randint(2, 10)):
        n, value, below = drawn_one_by_one(rng, level + 1)
        length, deepest = length + n, max(deepest, below)
        values.append(value)
        if length >= 2000:
            break
    operator = rng.choice([min, max, median, lambda x: sum(x) % 10])
    return length, operator(values), deepest + 1


@pytest.fixture(scope="module")
def reference() -> list[tuple[int, int, int]]:
    rng = random.Random(0)
    trees = []
    while len(trees) < 500:
        tree = drawn_one_by_one(rng)
        if 500 < tree[0] < 2000:
            trees.append(tree)
    return trees


def test_every_label_is_the_value_of_its_expression(pairs):
    assert all(evaluate(source) == target for source, target in pairs)


def test_every_operator_and_number_of_arguments_occurs_at_random(pairs):
    operators = Counter(word for source, _ in pairs for word in words(source) if word.startswith("["))
    assert set(operators) == {f"[{name}" for name in OPERATORS}
    assert max(operators.values()) < 1.05 * min(operators.values())
    digits = Counter(word for source, _ in pairs for word in words(source) if word.isdigit())
    assert set(digits) == set("0123456789") and max(digits.values()) < 1.05 * min(digits.values())


def test_lengths_and_depths_stay_in_bounds_and_reach_them(pairs):
    lengths = [len(words(source)) for source, _ in pairs]
    depths = Counter(depth(source) for source, _ in pairs)
    assert min(lengths) > 500 and max(lengths) < 2000
    assert min(lengths) < 530 and max(lengths) > 1930
    assert max(depths) == 9  # a list at depth 10 would need digits below the limit


def test_the_text_nests_pairs_as_the_release_does(pairs):
    for source, _ in pairs[:50]:
        assert source == pairs_nested(source)


def test_lengths_depths_and_answers_are_distributed_as_by_the_published_recursion(pairs, reference):
    def differ(ours, theirs, tolerance=4.0):
        error = math.sqrt(np.var(ours) / len(ours) + np.var(theirs) / len(theirs))
        return abs(np.mean(ours) - np.mean(theirs)) > tolerance * error

    ours = [(len(words(source)), target, depth(source)) for source, target in pairs]
    for column in (0, 2):
        assert not differ([tree[column] for tree in ours], [tree[column] for tree in reference])
    for answer in range(10):
        assert not differ([tree[1] == answer for tree in ours], [tree[1] == answer for tree in reference])
    for quarter in (750, 1000, 1500):
        assert not differ([tree[0] < quarter for tree in ours], [tree[0] < quarter for tree in reference])


def test_answers_are_as_unbalanced_as_min_and_max_make_them(pairs):
    share = np.bincount([target for _, target in pairs], minlength=10) / len(pairs)
    assert share[0] > 0.12 and share[9] > 0.12 and share.min() > 0.03


def test_no_expression_comes_twice(pairs):
    assert len({source for source, _ in pairs}) == len(pairs)


def test_the_same_for_any_number_of_processes_and_another_for_another_seed(pairs):
    assert list(generate(800, SEED, processes=2)) == pairs
    assert next(generate(1, SEED + 1)) != pairs[0]


def test_small_bounds_and_bounds_without_room():
    small = list(islice(generate(20, 0, max_depth=3, min_length=5, max_length=30), 20))
    assert all(5 < len(words(source)) < 30 and depth(source) <= 2 and evaluate(source) == target for source, target in small)
    # trees that reach the bound exactly stop growing too, and in a batch there are hundreds of them
    tight = list(islice(generate(50, 0, max_depth=5, min_length=5, max_length=12), 50))
    assert {len(words(source)) for source, _ in tight} == set(range(6, 12)) and all(evaluate(source) == target for source, target in tight)
    with pytest.raises(ValueError, match="widen the bounds"):
        list(generate(1, 0, max_depth=2, min_length=50, max_length=60))
    with pytest.raises(ValueError, match="needs a depth"):
        list(generate(1, 0, max_depth=1))


def test_a_seed_gives_the_same_data_in_every_version():
    """Where others are meant, `rules` of `recipes.lra.prepare.Generator` are raised by one."""
    text = "".join(f"{source}\t{target}\n" for source, target in generate(50, 0))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "737f71ba2aa880fe"
