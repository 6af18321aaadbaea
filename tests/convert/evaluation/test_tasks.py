"""lm-eval on local rows; where it is not installed, only that this is said."""

from __future__ import annotations

import json
import lzma
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_model, byte_tokenizer

from convert.errors import ConversionError
from convert.evaluation import tasks

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the package lm-eval")
GOALS = ["mend the gate", "mend the lamp", "mend the oven"]
ROWS = [{"goal": goal, "sol1": "with a hammer", "sol2": "by waiting", "label": n % 2} for n, goal in enumerate(GOALS)]


def test_it_is_said_that_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match="pip install lm-eval==0.4.13"):
        tasks.measure_task(None, None, "piqa", None, None, 1)


def test_local_rows_are_found_and_those_of_a_test_split_first(tmp_path: Path) -> None:
    for name in ("arc_easy_validation.jsonl.xz", "arc_easy_test.jsonl.xz", "boolq_superglue_validation.jsonl"):
        (tmp_path / name).touch()
    assert tasks.local_rows(tmp_path, "arc_easy").name == "arc_easy_test.jsonl.xz"
    assert tasks.local_rows(tmp_path, "boolq").name == "boolq_superglue_validation.jsonl"
    with pytest.raises(ConversionError, match="has no piqa"):
        tasks.local_rows(tmp_path, "piqa")


@needs_lm_eval
@pytest.mark.parametrize("packed", [False, True])
def test_a_score_is_that_of_likelihoods_computed_apart(packed: bool, tmp_path: Path) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    path = tmp_path / ("piqa_validation.jsonl" + ".xz" * packed)
    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path.write_bytes(lzma.compress(data) if packed else data)
    found = tasks.measure_task(model, tokenizer, "piqa", path, None, 2)
    right = [int(_likelihood(model, tokenizer, row, "sol2") > _likelihood(model, tokenizer, row, "sol1")) == row["label"] for row in ROWS]
    assert found["score"] == pytest.approx(sum(right) / 3) and found["examples"] == 3 and found["metric"] == "acc"
    assert tasks.measure_task(model, tokenizer, "piqa", path, 2, 2)["examples"] == 2


@needs_lm_eval
def test_rows_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_text('{"other": 1}\n')
    with pytest.raises(ConversionError, match="running lm-eval's piqa failed"):
        tasks.measure_task(byte_model(), byte_tokenizer(), "piqa", path, None, 2)


def _likelihood(model: Any, tokenizer: Any, row: dict[str, Any], choice: str) -> float:
    question = tokenizer(f"Question: {row['goal']}\nAnswer:")["input_ids"]
    ids = question + tokenizer(f" {row[choice]}")["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return sum(log_p[at - 1, ids[at]].item() for at in range(len(question), len(ids)))
