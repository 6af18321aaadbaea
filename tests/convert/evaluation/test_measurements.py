"""The plan of an evaluation: what is measured of which model, how much of it at a time, and what tells one question from another."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_models import byte_model, byte_tokenizer
from safetensors.torch import save_file
from transformers import BloomConfig, GPT2Config, GPT2LMHeadModel

from convert.errors import ConversionError
from convert.evaluation import measurements, models
from convert.evaluation.measurements import Measurement, measure_all
from convert.evaluation.models import Loaded, Models, check_length, positions, stamp, tokens_at_once, usable_dtype
from convert.evaluation.options import EvaluationOptions, Subject


class Remembering:
    """In place of a store: whatever was asked is measured."""

    def __init__(self) -> None:
        self.asked: dict[tuple[str, str], dict[str, Any]] = {}

    def find(self, subject: str, measurement: str) -> None:
        return None

    def measure(self, subject: str, measurement: str, asked: dict[str, Any], work: Any) -> dict[str, Any]:
        self.asked[subject, measurement] = asked
        return work()


def test_what_is_measured_and_how_much_at_a_time(evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Loaded(byte_model(), byte_tokenizer())
    monkeypatch.setattr(models, "load", lambda *args: teacher)
    monkeypatch.setattr(measurements, "require_lm_eval", lambda: None)
    monkeypatch.setattr(measurements, "measure_loss", lambda model, other, rows, batch: {"size": (*rows.ids.shape, batch), "of": other})
    monkeypatch.setattr(measurements, "measure_recall", lambda model, tokenizer, made, batch: (len(made), len(made[0].ids), batch))
    monkeypatch.setattr(measurements, "measure_task", lambda model, tokenizer, *asked: {"asked": asked})
    text, told = evaluated / "text.txt", []
    options = EvaluationOptions(
        models=(str(evaluated / "student"),), teacher=str(evaluated / "teacher"), data=(text, text), rows=6, lengths=(32, 64, 512),
        windows=(8,), recall=("needle",), distances=(90, 300), needles=3, recall_length=256, tasks=("piqa",), limit=5, decode=(8,),
        batch_tokens=600, device="cpu",
    )  # fmt: skip
    store = Remembering()
    found = measure_all(options, store, told.append)  # type: ignore[arg-type]
    sizes = (6, 32, 18), (3, 64, 9), (1, 512, 1)
    losses = {f"loss-{file}-{size[1]}": size for file in (0, 1) for size in sizes}
    assert list(found) == ["teacher", "teacher, window 8 + 4", "student"]
    for name, of in found.items():
        assert {key: of[key]["size"] for key in losses} == losses and all((of[key]["of"] is None) == (name == "teacher") for key in losses)
        assert of["recall-needle"]["by_distance"] == {"90": (3, 256, 9), "300": (3, 512, 4)}
        assert of["task-piqa"]["asked"] == ("piqa", None, 5, 2) and of["task-piqa"]["dtype"] == "float32"
        assert ("costs" in of) == ("window" not in name)
    assert store.asked["student", "loss-1-64"].keys() == {"model", "teacher", "dtype", "data", "rows", "length"}
    assert store.asked["student", "loss-1-64"]["rows"] == 3 and store.asked["student", "recall-needle"]["distances"] == [90, 300]
    assert "student: loss-0-32" in told and "teacher, window 8 + 4: recall-needle" in told


def test_what_cannot_be_measured_is_said_before_anything_is(evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    monkeypatch.setattr(models, "load", lambda *args: Loaded(GPT2LMHeadModel(config), byte_tokenizer()))
    given: dict[str, Any] = {"teacher": str(evaluated / "teacher"), "data": (evaluated / "text.txt",), "rows": 1, "device": "cpu"}
    for asked, said in (
        ({"lengths": (65,), "recall": (), "decode": ()}, "--length asks for 65 tokens and the model has 64 positions"),
        ({"lengths": (64,), "recall": (), "decode": (41,)}, "--decode asks for 65 tokens"),
        ({"lengths": (64,), "recall": ("needle",), "distances": (80,), "decode": ()}, "--distances asks for 1,024 tokens"),
    ):
        told: list[str] = []
        with pytest.raises(ConversionError, match=said):
            measure_all(EvaluationOptions(**given, **asked), Remembering(), told.append)  # type: ignore[arg-type]
        assert not told


def test_what_is_taken_where_nothing_is_asked_for() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [tokens_at_once(asked, device) for asked in (0, 7) for device in (cpu, gpu)] == [4096, 32768, 7, 7]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float16]
    assert [usable_dtype(name, device) for name in ("", "float16") for device in (cpu, gpu)] == dtypes


def test_positions_bind_a_model_that_has_an_embedding_for_each() -> None:
    learned = SimpleNamespace(config=GPT2Config(n_positions=64))
    check_length(learned, 64, "--length")
    with pytest.raises(ConversionError, match="--length asks for 65 tokens and the model has 64 positions"):
        check_length(learned, 65, "--length")
    rotary = byte_model(max_position_embeddings=64)
    check_length(rotary, 65, "--length")
    assert positions(rotary) == positions(learned) == 64
    unsaid = SimpleNamespace(config=BloomConfig())
    assert positions(unsaid) is None
    check_length(unsaid, 10**6, "--length")


def test_a_stamp_changes_with_what_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_WHOLE", 0)
    monkeypatch.setattr(models, "_LOOKED_AT", 4)
    for name, text in {"config.json": "{1234567890}", "b.safetensors": "weights that are long"}.items():
        (tmp_path / name).write_text(text)
    before = stamp(str(tmp_path))
    for name in ("README.md", ".hidden.json"):
        (tmp_path / name).write_text("x")
    assert stamp(str(tmp_path)) == before and stamp("hub/id") == "hub/id"
    seen = {before}
    for text in ("{1234567891}", "{0234567890}", "{12345678900}"):  # the end, the beginning, the size
        (tmp_path / "config.json").write_text(text)
        seen.add(stamp(str(tmp_path)))
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    seen |= {stamp(str(tmp_path)), stamp(str(tmp_path / "other.json"))}
    assert len(seen) == 6


@pytest.mark.parametrize("large", [True, False])
def test_a_stamp_changes_with_any_tensor(large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings and the last norm, where a file begins and ends, stay as they are where LoRA or new numbers alone have learned."""
    if large:
        monkeypatch.setattr(models, "_WHOLE", 0)
        monkeypatch.setattr(models, "_LOOKED_AT", 4)
        monkeypatch.setattr(models, "_OF_A_TENSOR", 4)
    tensors, seen = {f"{layer}.weight": torch.zeros(64) for layer in range(9)}, set()
    for layer in ("", *tensors):
        save_file(tensors | ({layer: torch.ones(64)} if layer else {}), tmp_path / "model.safetensors")
        seen.add(stamp(str(tmp_path)))
    assert len(seen) == 10
    for header in (b"[1]", b'{"a": {"data_offsets": [-5, "x"]}, "b": 3}', b"{"):  # is not this function's to refuse
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(99))
        seen.add(stamp(str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(bytes(3) + b"\xff" * 99)
    assert len(seen | {stamp(str(tmp_path))}) == 14


@pytest.mark.parametrize("name", ["arc_easy.jsonl", "arc_easy.jsonl.xz", "vocab.txt", "chat_template.jinja"])
def test_a_stamp_changes_with_rows_of_tasks_and_words_of_tokenizers(name: str, tmp_path: Path) -> None:
    seen = set()
    for text in ("one row", "two row"):
        (tmp_path / name).write_text(text)
        seen.add(stamp(str(tmp_path)))
    assert len(seen) == 2


def test_a_control_is_no_teacher() -> None:
    opened = Models.__new__(Models)
    opened._teacher_path = "t"
    subjects = Subject("teacher", "t"), Subject("any", "t"), Subject("x", "t", 8), Subject("x", "s")
    assert [opened.is_teacher(subject) for subject in subjects] == [True, True, False, False]
    of_controls, others = (Measurement("x", {}, lambda *_: {}, of_controls=asked) for asked in (True, False))
    assert of_controls.is_of(Subject("x", "t", 8)) and others.is_of(Subject("x", "t")) and not others.is_of(Subject("x", "t", 8))
