"""The tables of an evaluation, of what was found: for the page, the screen and a model's card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from convert.evaluation.costs import QUIET, break_even, is_spread
from convert.evaluation.loss import standard_error

Results = dict[str, dict[str, dict[str, Any]]]
"""What was found, by model and measurement; the teacher first."""

_LOSS = re.compile(r"loss-(\d+)-(\d+)")


@dataclass(frozen=True)
class Table:
    """A table: its title, its cells by row, the header first, and a line below it."""

    title: str
    cells: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """The table alone, as Markdown."""
        lines = [[cell.replace("|", "\\|") for cell in row] for row in self.cells]
        lines.insert(1, ["---"] * len(self.cells[0]))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def all_tables(results: Results) -> list[Table]:
    """Those that something was measured for."""
    tables = [students(results), *by_position(results), *recall(results), tasks(results), costs(results)]
    return [table for table in tables if len(table.cells) > 1 and len(table.cells[0]) > 1]


def students(results: Results) -> Table:
    """One row a model: what it is, how near it is to the teacher, what it keeps and what it costs."""
    teacher = next(iter(results.values()))
    losses = _losses(teacher)
    header = ["model", "attention", "tokens trained"]
    header += [f"loss above the teacher's: {teacher[key]['text']}, {length:,} tokens" for key, length in losses]
    header += ["KL", "same likeliest token", "needle, share of the teacher's at " + _distances(teacher, "recall-needle")]
    header += ["tasks kept", "cache bytes", "ms a token", "smaller cache from"]
    rows = [[name, *_student(found, teacher, losses)] for name, found in results.items()]
    note = "± is one standard error, of differences row by row for losses. KL and agreement are of the first text."
    note += _beyond(teacher, max(length for _, length in losses)) + _busy(results)
    return Table("Students", _without_empty([header, *rows]), note)


def by_position(results: Results) -> list[Table]:
    """Loss above the teacher's by the number of tokens before the one predicted, a table for each text and length."""
    teacher_name, teacher = next(iter(results.items()))
    tables = []
    for key, length in _losses(teacher):
        spans = [f"{span['from']:,}-{span['to'] - 1:,}" for span in teacher[key]["by_position"]]
        cells = [["model", *spans], [teacher_name, *(f"{span['nats']:.3f}" for span in teacher[key]["by_position"])]]
        for name, found in list(results.items())[1:]:
            pairs = zip(found[key]["by_position"], teacher[key]["by_position"], strict=True)
            cells.append([name, *(f"{span['nats'] - truth['nats']:+.3f}" for span, truth in pairs)])
        title = f"Loss by position: {teacher[key]['text']}, {length:,} tokens"
        tables.append(Table(title, cells, "Nats a token, the models' above the teacher's." + _beyond(teacher, length)))
    return tables


def recall(results: Results) -> list[Table]:
    """Whole answers that were generated, by kind and distance, and in brackets the share of the teacher's."""
    teacher = next(iter(results.values()))
    tables = []
    for key in (key for key in teacher if key.startswith("recall-")):
        distances = list(teacher[key]["by_distance"])
        cells = [["model", *(f"{int(distance):,} tokens" for distance in distances)]]
        for name, found in results.items():
            cells.append([name, *(_recalled(found[key]["by_distance"][at], teacher[key]["by_distance"][at]) for at in distances)])
        number = len(teacher[key]["by_distance"][distances[0]]["hits"]) if distances else 0
        note = f"{number} prompts a cell, answers generated greedily through each model's own cache; whole answers alone count."
        tables.append(Table(f"Recall: {key.removeprefix('recall-')}", cells, note))
    return tables


def tasks(results: Results) -> Table:
    """Scores of the tasks and their mean."""
    teacher = next(iter(results.values()))
    keys = [key for key in teacher if key.startswith("task-")]
    cells = [["model", *(f"{key.removeprefix('task-')} ({teacher[key]['metric']})" for key in keys), *(["mean"] if keys else [])]]
    for name, found in results.items() if keys else ():
        scores = [f"{100 * found[key]['score']:.1f} ± {100 * found[key]['score_error']:.1f}" for key in keys]
        cells.append([name, *scores, f"{100 * _mean_score(found):.2f}"])
    examples = ", ".join(f"{key.removeprefix('task-')} {teacher[key]['examples']:,}" for key in keys)
    version = next((teacher[key]["lm_eval"] for key in keys), "")
    return Table("Tasks", cells, f"lm-eval {version}, no examples before the question; so many: {examples}.")


def costs(results: Results) -> Table:
    """Bytes of the cache and the time of a token, by length."""
    with_costs = {name: found for name, found in results.items() if "costs" in found}
    lengths = [at["length"] for found in list(with_costs.values())[:1] for at in found["costs"]["by_length"]]
    cells = [["model", *(f"cache at {n:,} tokens, bytes" for n in lengths), *(f"ms a token after {n:,}" for n in lengths)]]
    for name, found in with_costs.items():
        at = found["costs"]["by_length"]
        cells.append([name, *(f"{x['cache_bytes']:,}" for x in at), *(_ms(x) for x in at)])
    device = next((found["costs"]["device"] for found in with_costs.values()), "")
    why = "What a linear layer keeps, and the time it takes, are the same after any number of tokens, and more than softmax's after a few."
    how = "In brackets the fastest token and what nine in ten do not exceed." + _busy(with_costs)
    return Table("Generating, one sequence", cells, f"Measured on {device}; without compiling. {how} {why}")


def card_section(results: Results, name: str) -> str:
    """The tables of one model beside its teacher, as a section of its card."""
    chosen = {key: found for key, found in results.items() if key == name or key == next(iter(results))}
    tables = all_tables(chosen)
    parts = [f"**{table.title}**\n\n{table.markdown()}" + (f"\n\n{table.note}" if table.note else "") for table in tables]
    return "\n\n".join(["## Evaluation", *parts])


def above_teacher(found: dict[str, Any], teacher: dict[str, Any]) -> tuple[float, float]:
    """Nats a token above the teacher's, and the standard error of the rows' differences."""
    differences = [own - truth for own, truth in zip(found["row_nats"], teacher["row_nats"], strict=True)]
    return sum(differences) / len(differences), standard_error(differences)


def _beyond(teacher: dict[str, Any], length: int) -> str:
    """Which positions of a text of `length` tokens the teacher was not made for, where that is known."""
    positions = teacher["model"]["positions"]
    return f" Positions from {positions:,} on are beyond those the teacher was made for." if positions and positions < length else ""


def _student(found: dict[str, Any], teacher: dict[str, Any], losses: Sequence[tuple[str, int]]) -> list[str]:
    own, first, model = found is teacher, losses[0][0], found["model"]
    above = [f"{teacher[key]['nats']:.3f}" if own else _plus_minus(*above_teacher(found[key], teacher[key])) for key, _ in losses]
    near = ["", ""] if own else [f"{found[first]['kl']:.3f}", f"{100 * found[first]['agreement']:.1f}%"]
    kept = _shares(found, teacher, "recall-needle")
    score = f"{100 * _mean_score(found) / _mean_score(teacher):.1f}%" if _mean_score(teacher) else ""
    trained = f"{model['trained_tokens']:,}" if model["trained_tokens"] else ""
    return [model["attention"], trained, *above, *near, kept, score, *_cost(found, teacher)]


def _cost(found: dict[str, Any], teacher: dict[str, Any]) -> list[str]:
    if "costs" not in found:
        return ["", "", ""]
    at, even = found["costs"]["by_length"][-1], break_even(found["costs"], teacher["costs"])
    unknown = found is teacher or len(found["costs"]["by_length"]) < 2
    smaller = "" if unknown else "never" if even is None else f"{even:,} tokens"
    return [f"{at['cache_bytes']:,} at {at['length']:,}", _ms(at), smaller]


def _ms(at: dict[str, Any]) -> str:
    """The time of a token and its spread, which evaluations of earlier versions do not hold."""
    spread = " ({:.2f} to {:.2f})".format(*at["ms_spread"]) if "ms_spread" in at else ""
    return f"{at['ms']:.2f}{spread}"


def _busy(results: Results) -> str:
    """A warning, where times were taken beside other work."""
    alike: dict[tuple[Any, ...], dict[str, float]] = {}
    busy = set()
    for name, found in results.items():
        for at in found.get("costs", {"by_length": []})["by_length"]:
            model = found.get("model", {})
            form = (model.get("attention"), model.get("parameters"), at["length"], at["cache_bytes"])
            alike.setdefault(form, {})[name] = at["ms"]
            if is_spread(at):
                busy.add(name)
    for times in alike.values():  # models of one form take the same time
        busy |= {name for name, ms in times.items() if ms > QUIET * min(times.values())}
    told = ", ".join(name for name in results if name in busy)
    return f" Other work was under way as tokens of {told} were timed: the fastest tell more." if told else ""


def _plus_minus(value: float, error: float) -> str:
    return f"{value:+.3f} ± {error:.3f}"


def _losses(teacher: dict[str, Any]) -> list[tuple[str, int]]:
    return [(key, int(match[2])) for key in teacher if (match := _LOSS.fullmatch(key))]


def _recalled(found: dict[str, Any], truth: dict[str, Any]) -> str:
    share = "" if found is truth or not truth["right"] else f" ({100 * found['right'] / truth['right']:.0f}%)"
    return f"{found['right']:.2f} ± {found['right_error']:.2f}{share}"


def _shares(found: dict[str, Any], teacher: dict[str, Any], key: str) -> str:
    if key not in teacher:
        return ""
    pairs = [(found[key]["by_distance"][at], truth) for at, truth in teacher[key]["by_distance"].items()]
    if found is teacher:
        return " / ".join(f"{truth['right']:.2f}" for _, truth in pairs)
    return " / ".join("-" if not truth["right"] else f"{own['right'] / truth['right']:.2f}" for own, truth in pairs)


def _distances(teacher: dict[str, Any], key: str) -> str:
    return " / ".join(f"{int(distance):,}" for distance in teacher.get(key, {"by_distance": {}})["by_distance"])


def _mean_score(found: dict[str, Any]) -> float:
    scores = [found[key]["score"] for key in found if key.startswith("task-")]
    return sum(scores) / len(scores) if scores else 0.0


def _without_empty(cells: list[list[str]]) -> list[list[str]]:
    """Without the columns in which no row says anything."""
    kept = [column for column in range(len(cells[0])) if any(row[column] for row in cells[1:])]
    return [[row[column] for column in kept] for row in cells]
