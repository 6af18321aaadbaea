"""`make mutants`: puts small slips into a copy of the code, one at a time, and tells which of them no test notices.

Named mutants by default; `--random N` draws as many that nobody chose, another sample for each `--seed`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from . import of_converter, of_kernels, of_operator, of_plugin, of_recipes, slips
from .mutant import CONVERTER, KERNELS, OPERATOR, PLUGIN, RECIPES, Mutant
from .trial import CAUGHT, Outcome, attempt, copy_checkout, import_what_is_slow

ROOT = Path(__file__).resolve().parents[2]
KINDS = (OPERATOR, PLUGIN, CONVERTER, RECIPES, KERNELS)
_copy = Path()  # of the process that tries mutants
NAMED = [*of_operator.MUTANTS, *of_plugin.MUTANTS, *of_converter.MUTANTS, *of_recipes.MUTANTS, *of_kernels.MUTANTS]


def main() -> int:
    """0 where every mutant applied and was caught, else 1."""
    options = _options()
    mutants = _chosen(options)
    if options.list:
        for mutant in mutants:
            print(f"{mutant.kind}: {mutant.name}\n  {mutant.file}\n  - {mutant.old.strip()}\n  + {mutant.new.strip()}")
        return 0
    outcomes: list[tuple[Mutant, Outcome]] = []
    for mutant, outcome in _attempts(mutants, options.jobs, options.seconds):
        outcomes.append((mutant, outcome))
        told = f"{outcome.seconds:.0f}s {mutant.kind}: {mutant.name} ({mutant.file}): {outcome.verdict} {outcome.by}"
        print(f"{len(outcomes)}/{len(mutants)} {told}", flush=True)
    return _summary(outcomes)


def _attempts(mutants: list[Mutant], jobs: int, seconds: float) -> Iterator[tuple[Mutant, Outcome]]:
    """What becomes of each, as it is known. Every job is a process with a copy of the checkout to itself."""
    import_what_is_slow()
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="mutants-") as place, fork.Pool(jobs, _begin, (place,)) as pool:
        yield from pool.imap_unordered(_try, [(mutant, seconds) for mutant in mutants])


def _begin(place: str) -> None:
    """A process that tries mutants begins: it copies the checkout to a folder of its own."""
    global _copy
    _copy = Path(place) / str(os.getpid())
    _copy.mkdir()
    copy_checkout(ROOT, _copy)


def _try(asked: tuple[Mutant, float]) -> tuple[Mutant, Outcome]:
    mutant, seconds = asked
    return mutant, attempt(mutant, _copy, seconds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("--kind", action="append", choices=KINDS, help="all if none is given; the kernels' are built, a minute each")
    parser.add_argument("--only", metavar="WORDS", help="those whose name or file holds this")
    parser.add_argument("--sample", type=int, metavar="N", help="as many of the named ones, drawn by --seed")
    parser.add_argument("--random", type=int, metavar="N", help="as many slips at random places instead, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time, each with a copy of the checkout")
    parser.add_argument("--seconds", type=float, default=600.0, help="for the tests of one mutant; more count as caught")
    parser.add_argument("--list", action="store_true", help="show them and run nothing")
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> list[Mutant]:
    kinds = options.kind or KINDS
    if options.random:
        found = slips.draw(ROOT, [kind for kind in kinds if kind != KERNELS], options.random, options.seed)
    else:
        found = [mutant for mutant in NAMED if mutant.kind in kinds]
        found = random.Random(options.seed).sample(found, options.sample) if options.sample else found
    return [mutant for mutant in found if not options.only or options.only in f"{mutant.file} {mutant.name}"]


def _summary(outcomes: list[tuple[Mutant, Outcome]]) -> int:
    for mutant, outcome in outcomes:
        if outcome.verdict != CAUGHT:
            print(f"\n{outcome.verdict}: {mutant.name} ({mutant.kind}, {mutant.file}) {outcome.by}")
            print(f"  - {mutant.old.strip()}\n  + {mutant.new.strip()}")
    every, caught = (Counter(mutant.kind for mutant, outcome in outcomes if among(outcome)) for among in (bool, _is_caught))
    print("\n" + ", ".join(f"{kind} {caught[kind]} of {every[kind]}" for kind in KINDS if every[kind]))
    print(f"{caught.total()} of {every.total()} caught")
    return int(caught.total() < every.total())


def _is_caught(outcome: Outcome) -> bool:
    return outcome.verdict == CAUGHT


if __name__ == "__main__":
    sys.exit(main())
