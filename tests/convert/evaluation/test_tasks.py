"""lm-eval on local rows; where it is not installed, what a stand-in is asked for."""

from __future__ import annotations

import json
import lzma
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from byte_models import byte_model, byte_tokenizer

from convert.errors import ConversionError
from convert.evaluation import options, tasks
from convert.evaluation.options import TASKS

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the package lm-eval")
GOALS = ["mend the gate", "mend the lamp", "mend the oven"]
ROWS = [{"goal": goal, "sol1": "with a hammer", "sol2": "by waiting", "label": n % 2} for n, goal in enumerate(GOALS)]


def test_it_is_said_that_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match="pip install lm-eval==0.4.13"):
        tasks.measure_task(None, None, "piqa", None, None, 1)


def test_local_rows_are_found_and_those_of_a_test_split_first(tmp_path: Path) -> None:
    for name in ("arc_easy_validation.jsonl.xz", "arc_easy_test.jsonl.xz", "boolq_superglue_validation.jsonl"):
        (tmp_path / name).touch()
    assert tasks.local_rows(tmp_path, "arc_easy").name == "arc_easy_test.jsonl.xz"
    assert tasks.local_rows(tmp_path, "boolq").name == "boolq_superglue_validation.jsonl"
    with pytest.raises(ConversionError, match="has no piqa"):
        tasks.local_rows(tmp_path, "piqa")


class StandIn:
    """What is asked of lm-eval, by its names, and an answer."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, Any] = {}
        self.task: dict[str, Any] = {}
        self.rows = ""
        place = SimpleNamespace(__file__=str(folder / "lm_eval" / "__init__.py"), __version__="0.4.13", simple_evaluate=self._evaluate)
        parts = {"models": None, "models.huggingface": SimpleNamespace(HFLM=self._wrap), "tasks": SimpleNamespace(TaskManager=self._manage)}
        for name, module in {"lm_eval": place, **{f"lm_eval.{name}": part or SimpleNamespace() for name, part in parts.items()}}.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(options, "find_spec", lambda name: place)

    def _wrap(self, **told: Any) -> str:
        self.asked |= told
        return "wrapped"

    def _manage(self, include_path: str | None) -> str:
        if include_path is not None:
            (path,) = Path(include_path).glob("*.yaml")
            self.task = {"file": path.name, **yaml.safe_load(path.read_text())}
            self.rows = Path(self.task["dataset_kwargs"]["data_files"]["test"]).read_text()
        return "manager"

    def _evaluate(self, model: Any, **told: Any) -> dict[str, Any]:
        self.asked |= {"model": model, **told}
        (name,) = told["tasks"]
        values = {"acc,none": 0.25, "acc_norm,none": 0.75, "acc_stderr,none": "N/A", "alias": name}
        return {"results": {name: values}, "n-samples": {name: {"effective": 4, "original": 9}}}


@pytest.mark.parametrize("packed", [False, True])
def test_lm_eval_is_asked_for_the_stock_task_on_local_rows(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, path = StandIn(tmp_path, monkeypatch), tmp_path / ("rows.jsonl" + ".xz" * packed)
    path.write_bytes(lzma.compress(b"a row\n") if packed else b"a row\n")
    found = tasks.measure_task("model", "tokenizer", "arc_easy", path, 7, 3)
    error = (0.25 * 0.75 / 3) ** 0.5
    assert found == {
        "score": 0.25, "score_error": pytest.approx(error), "metric": "acc", "metrics": {"acc": 0.25, "acc_norm": 0.75}, "examples": 4,
        "lm_eval": "0.4.13",
    }  # fmt: skip
    room = Path(asked.task["dataset_kwargs"]["cache_dir"])
    stock = str(tmp_path / "lm_eval" / "tasks" / "arc/arc_easy.yaml")
    assert asked.rows == "a row\n" and not room.exists() and asked.task.pop("dataset_kwargs")["data_files"].keys() == {"test"}
    assert asked.task == {
        "file": "arc_easy.yaml", "include": stock, "task": "arc_easy_of_local_rows", "tag": [], "dataset_path": "json",
        "dataset_name": None, "training_split": None, "validation_split": None, "test_split": "test",
    }  # fmt: skip
    assert asked.asked == {
        "pretrained": "model", "tokenizer": "tokenizer", "backend": "causal", "batch_size": 3, "model": "wrapped", "limit": 7,
        "tasks": ["arc_easy_of_local_rows"], "task_manager": "manager", "bootstrap_iters": 0, "log_samples": False, "verbosity": "ERROR",
    }  # fmt: skip


def test_without_local_rows_lm_eval_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = StandIn(tmp_path, monkeypatch)
    found = tasks.measure_task("model", "tokenizer", "hellaswag", None, None, 3)
    assert asked.asked["tasks"] == ["hellaswag"] and not asked.task and found["metric"] == "acc_norm" and found["score"] == 0.75
    assert {name: metric for name, (_, metric) in tasks._STOCK.items() if metric != "acc"} == {
        "arc_challenge": "acc_norm",
        "hellaswag": "acc_norm",
    }
    assert tuple(tasks._STOCK) == TASKS


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
    ids = question + tokenizer(f" {row[choice]}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return sum(log_p[at - 1, ids[at]].item() for at in range(len(question), len(ids)))
