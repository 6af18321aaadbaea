"""What a model is said to be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from byte_models import byte_model, byte_tokenizer
from transformers import AutoModelForCausalLM

from convert.evaluation.describe import describe, trained_tokens
from convert.evaluation.models import Loaded
from convert.evaluation.options import Subject
from convert.linearize import linearize
from convert.options import LinearizeOptions


def test_a_student_says_its_form_and_its_numbers(evaluated: Path) -> None:
    loaded = Loaded(AutoModelForCausalLM.from_pretrained(evaluated / "student", dtype=torch.bfloat16), byte_tokenizer())
    found = describe(loaded, Subject("student", str(evaluated / "student")), 4)
    assert found["attention"] == "linear with decay" and found["layers"] == 3 and found["positions"] == 512
    layers = dict(found["learned"]["log_decay"])
    assert sorted(layers) == [0, 1, 2]
    assert [-1 / rate for rate in layers[0]] == pytest.approx([1.5 * (512 / 1.5) ** (head / 3) for head in range(4)], rel=1e-4)
    assert found["trained_tokens"] is None


def test_numbers_that_hidden_states_change_are_those_at_rest(evaluated: Path, tmp_path: Path) -> None:
    linearize(evaluated / "teacher", tmp_path / "student", LinearizeOptions(decay="token", keep_softmax=(1,), check=False))
    loaded = Loaded(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), byte_tokenizer())
    found = describe(loaded, Subject("student", str(tmp_path / "student")), 4)
    assert found["attention"].endswith("; softmax in layers 1 of 3")
    assert [layer for layer, _ in found["learned"]["log_decay"]] == [0, 2]
    assert all(len(heads) == 2 for _, heads in found["learned"]["log_decay"])  # key heads


def test_a_control_is_softmax_under_a_window() -> None:
    found = describe(Loaded(byte_model(), byte_tokenizer()), Subject("control", "x", 64), 4)
    assert found["attention"] == "softmax, last 64 tokens and first 4, untrained" and found["learned"] == {}


def test_tokens_are_those_of_all_stages_that_train(evaluated: Path, tmp_path: Path) -> None:
    shutil.copy(evaluated / "student" / "conversion.json", tmp_path)
    report = json.loads((tmp_path / "conversion.json").read_text())
    stages = [{"stage": "convert.calibrate", "tokens": 9000}, {"stage": "convert.transfer", "tokens": 1000}, {"tokens": 500}]
    (tmp_path / "conversion.json").write_text(json.dumps(report | {"stages": stages}))
    assert trained_tokens(tmp_path) == 1500 and trained_tokens(tmp_path / "absent") is None
