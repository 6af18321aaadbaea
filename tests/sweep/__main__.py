"""`make sweep`: tries every architecture of the installed Transformers and writes docs/architectures.md."""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

from sweep.models import Case, all_cases
from sweep.pool import forked
from sweep.trials import try_case


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sweep", description=__doc__)
    parser.add_argument("--only", action="append", metavar="TYPE", help="model types to try, all if not given")
    parser.add_argument("--kind", choices=("causal", "masked", "base"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=120.0, help="time for one architecture")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    cases = [c for c in all_cases() if (not options.only or c.model_type in options.only) and options.kind in (None, c.kind)]
    rows, begun = [], time.monotonic()
    for case, row in forked(cases, _work, options.jobs, options.seconds):
        if isinstance(row, str):
            row = {"model_type": case.model_type, "kind": case.kind, "class_name": "", "trials": {}, "reason": row, "verdict": "error"}
        rows.append(row)
        notes = row["reason"] or "; ".join(f"{n}: {o['status']} ({o['note']})" for n, o in row["trials"].items() if o["status"] not in ("right", "-"))
        print(f"{len(rows)}/{len(cases)} {time.monotonic() - begun:.0f}s {row['model_type']} {row['kind']}: {row['verdict']} | {notes}", flush=True)
    counts = collections.Counter(row["verdict"] for row in rows)
    print(dict(counts))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return int(any(row["verdict"] in ("wrong", "error") for row in rows))


def _work(case: Case) -> dict:
    return try_case(case).to_dict()


if __name__ == "__main__":
    sys.exit(main())
