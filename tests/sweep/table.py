"""The results as data, docs/architectures.json, and as a page to read, docs/architectures.md: a column for each version of Transformers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from sweep.models import BASE, CAUSAL, MASKED
from sweep.trials import ERROR, NONE, REFUSED, RIGHT, SOFTMAX, WRONG

DOCS = Path(__file__).parents[2] / "docs"
DATA, PAGE = DOCS / "architectures.json", DOCS / "architectures.md"

INTRODUCTION = f"""# Which architectures

What `attn_implementation="linattn"` does for every model type of Transformers, found by `make sweep`: each is built tiny from its
configuration, with random weights, in float32 on a CPU, and held against a quadratic form of linear attention that shares nothing with the
plugin but the formula: float64 weights 1 + cos(q, k) under the mask that the model itself makes for SDPA, over a cache that keeps every key
and value. Sliding windows and chunks are left out of that mask, for linear layers drop them. Tolerance: 1e-4 of the largest logit, or of 1.

- **{RIGHT}**: a forward pass; a cache filled by a prompt and continued token by token, and in chunks; padding on the left and on the right;
  packed texts (`position_ids` that begin anew); generation of a padded batch. Each padded, packed or cached token gets what it gets alone.
- **{SOFTMAX}**: right but for the calls named, where softmax attention does no better: the architecture itself answers them otherwise than
  a text alone, or not at all. Linear attention gives there what the quadratic form gives for the same call.
- **{REFUSED}**: with the sentence given. Where a model is right and only some calls are refused, they are named.

Encoders have no cache, and most ignore `position_ids` that begin anew; what sees pictures or hears sounds got a forward pass. Models made
of several parts (text beside pictures or sounds) were tried with text alone; their parts have rows of their own.
"""
HEADINGS = {
    CAUSAL: "Causal language models",
    MASKED: "Encoders with a masked language model's head",
    BASE: "Other models, without a head: encoders of text, pictures and sounds, decoders of mixed models, and the rest",
}


def store(rows: list[dict[str, Any]], versions: dict[str, str], whole: bool) -> None:
    """Puts the rows of one version of Transformers in the place of its old ones; of all of them if the sweep was `whole`."""
    found = load()
    column = found.get(versions["transformers"], {"rows": {}})
    kept = {} if whole else column["rows"]
    for row in rows:
        kept[key(row["kind"], row["model_type"])] = {k: row[k] for k in ("class_name", "verdict", "reason", "trials")}
    found[versions["transformers"]] = {"torch": versions["torch"].split("+")[0], "rows": dict(sorted(kept.items()))}
    DOCS.mkdir(exist_ok=True)
    DATA.write_text(_json(found), encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")


def load() -> dict[str, Any]:
    """{{version of Transformers: {{"torch": version, "rows": {{"causal/llama": row}}}}}}, the newest first."""
    found = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    return dict(sorted(found.items(), key=lambda item: [int(n) for n in item[0].split(".")[:2]], reverse=True))


def key(kind: str, model_type: str) -> str:
    """The name of a row."""
    return f"{kind}/{model_type}"


def settled(version: str) -> set[str]:
    """The rows of a version that are right, as their softmax form, or refused."""
    rows = load().get(version, {"rows": {}})["rows"]
    return {name for name, row in rows.items() if row["verdict"] in (RIGHT, SOFTMAX, REFUSED)}


def right_types(kind: str = CAUSAL) -> list[str]:
    """The model types that are right, or no worse than their softmax form, in every version that was tried and has them."""
    columns = [column["rows"] for column in load().values()]
    names = {name for rows in columns for name in rows if name.startswith(f"{kind}/")}
    fine = [name for name in names if all(rows[name]["verdict"] in (RIGHT, SOFTMAX) for rows in columns if name in rows)]
    return sorted(name.split("/")[1] for name in fine)


def _json(found: dict[str, Any]) -> str:
    """One line a row, so that what changed can be read off a diff."""
    columns = []
    for version, column in found.items():
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in column["rows"].items())
        columns.append(f'{json.dumps(version)}: {{"torch": {json.dumps(column["torch"])}, "rows": {{\n{rows}\n}}}}')
    return "{\n" + ",\n".join(columns) + "\n}\n"


def page(found: dict[str, Any]) -> str:
    """The whole page, from the stored results."""
    parts = [INTRODUCTION, _counts(found)]
    for kind, heading in HEADINGS.items():
        parts.append(f"## {heading}\n\n{_table(found, kind)}")
    parts.append(f"## Not tried, and why\n\n{_untried(found)}")
    return "\n".join(parts)


def _counts(found: dict[str, Any]) -> str:
    versions = [f"Transformers {version}, torch {column['torch']}" for version, column in found.items()]
    lines = [f"| | {' | '.join(versions)} |", f"|---|{'---|' * len(found)}"]
    for kind, heading in HEADINGS.items():
        cells = [count([row["verdict"] for name, row in c["rows"].items() if name.startswith(f"{kind}/")]) for c in found.values()]
        lines.append(f"| {heading.split(',')[0].split(' with')[0]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def count(verdicts: list[str]) -> str:
    """How often each verdict, in words."""
    counts = Counter(verdicts)
    told = [f"{counts[verdict]} {verdict}" for verdict in (RIGHT, SOFTMAX, REFUSED, WRONG, ERROR) if counts[verdict]]
    return ", ".join([*told, f"{counts[NONE]} not tried"])


def _names(found: dict[str, Any], kind: str) -> list[str]:
    return sorted({name for column in found.values() for name in column["rows"] if name.startswith(f"{kind}/")})


def _table(found: dict[str, Any], kind: str) -> str:
    lines = [f"| model type | class | {' | '.join(found)} | |", f"|---|---|{'---|' * len(found)}---|"]
    for name in _names(found, kind):
        rows = [column["rows"].get(name) for column in found.values()]
        if all(row is None or row["verdict"] == NONE for row in rows):
            continue
        verdicts = ["not there" if row is None else "not tried" if row["verdict"] == NONE else row["verdict"] for row in rows]
        notes = list(dict.fromkeys(note for row in rows if row is not None for note in [_note(row)] if note))
        shown = next(row["class_name"] for row in rows if row is not None and row["verdict"] != NONE)
        lines.append(f"| {name.split('/')[1]} | {shown} | {' | '.join(verdicts)} | {'; '.join(notes)} |")
    return "\n".join(lines) + "\n"


def _note(row: dict[str, Any]) -> str:
    """What a reader needs beside the verdict: the calls that it does not hold for, or the sentence."""
    if row["verdict"] == NONE:
        return row["reason"]
    trials = row["trials"]
    if row["verdict"] == REFUSED:
        return _cell(trials["forward"]["note"])
    notes = []
    as_softmax = [name for name, trial in trials.items() if trial["status"] == SOFTMAX]
    if as_softmax:
        notes.append(", ".join(as_softmax))
    for sentence in dict.fromkeys(trial["note"] for trial in trials.values() if trial["status"] == REFUSED):
        refused = [name for name, trial in trials.items() if trial["status"] == REFUSED and trial["note"] == sentence]
        notes.append(f"{', '.join(refused)} refused: {_cell(sentence)}")
    notes += [f"{name}: {_cell(trial['note'])}" for name, trial in trials.items() if trial["status"] in (WRONG, ERROR)]
    return "; ".join(notes) or _cell(row["reason"])


def _untried(found: dict[str, Any]) -> str:
    """Reasons, and whom each keeps out, of the newest version that has the model type."""
    reasons: dict[str, list[str]] = {}
    for kind in HEADINGS:
        for name in _names(found, kind):
            row = next(column["rows"][name] for column in found.values() if name in column["rows"])
            if row["verdict"] == NONE:
                reasons.setdefault(row["reason"], []).append(name.split("/")[1])
    lines = [f"| {_cell(reason)} | {', '.join(names)} |" for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1]))]
    return "\n".join(["| why | model types |", "|---|---|", *lines]) + "\n"


def _cell(text: str) -> str:
    """On one line, and without what to do instead, which is the same for all."""
    return text.split('; leave attn_implementation="linattn" out')[0].replace("|", "\\|").replace("\n", " ")
