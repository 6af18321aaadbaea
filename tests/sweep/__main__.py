"""`make sweep`: tries every architecture of the installed Transformers and writes docs/architectures.md and .json."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from typing import Any

import torch
import transformers
from sweep import table
from sweep.models import BASE, CAUSAL, MASKED, Case, all_cases
from sweep.pool import forked
from sweep.trials import ERROR, NONE, RIGHT, WRONG, Row, try_case


def main() -> int:
    """0 where every row is right, as its softmax form, refused or not tried for a reason; else 1."""
    options = _options()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    done = table.settled(transformers.__version__) if options.again else set()
    cases = [case for case in all_cases() if _wanted(case, options) and table.key(case.kind, case.model_type) not in done]
    rows, begun = [], time.monotonic()
    for case, row in forked(cases, _work, options.jobs, options.seconds):
        rows.append(row if isinstance(row, dict) else Row(case.model_type, case.kind, died=row).to_dict())
        print(f"{len(rows)}/{len(cases)} {time.monotonic() - begun:.0f}s {_line(rows[-1])}", flush=True)
    print(table.count([row["verdict"] for row in rows]))
    if not options.dry:
        table.store(rows, {"transformers": transformers.__version__, "torch": torch.__version__}, whole=len(cases) == len(all_cases()))
    return int(any(row["verdict"] in (WRONG, ERROR) for row in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sweep", description=__doc__)
    parser.add_argument("--only", action="append", metavar="TYPE", help="a model type to try; all if none is given")
    parser.add_argument("--kind", choices=(CAUSAL, MASKED, BASE), help="causal classes, those with a masked-LM head, or the others")
    parser.add_argument("--again", action="store_true", help="only those that docs/architectures.json has no good verdict for")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=180.0, help="for one architecture")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    return parser.parse_args()


def _wanted(case: Case, options: argparse.Namespace) -> bool:
    return (not options.only or case.model_type in options.only) and options.kind in (None, case.kind)


def _work(case: Case) -> dict[str, Any]:
    return try_case(case).to_dict()


def _line(row: dict[str, Any]) -> str:
    told = [f"{name}: {trial['status']} ({trial['note']})" for name, trial in row["trials"].items() if trial["status"] not in (RIGHT, NONE)]
    return f"{row['kind']} {row['model_type']}: {row['verdict']} | {row['reason'] or '; '.join(told)}"


if __name__ == "__main__":
    sys.exit(main())
