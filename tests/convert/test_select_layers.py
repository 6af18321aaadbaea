"""The command: its file, which linearize takes, and that its text is not evaluation's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_tokenizer
from sweep.tiny import tiny_config
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from convert import evaluate, linearize, select_layers
from convert.errors import ConversionError
from convert.evaluation import models
from convert.evaluation.selection_options import SelectOptions
from convert.evaluation.text import first_rows, last_rows
from recipes.common import cli

SHORT = ["--rows", "2", "--length", "256", "--distances", "90", "--needles", "2", "--window", "8", "--count", "1", "--device", "cpu"]


def run(home: Path, out: Path, *more: str, columns: int = 80) -> Any:
    arguments = [str(home / "teacher"), "--data", str(home / "text.txt"), "--out", str(out), *SHORT, *more]
    return CliRunner().invoke(cli.app(select_layers.main), arguments, env={"COLUMNS": str(columns)})


def test_the_layers_it_chooses_stay_softmax(evaluated: Path, tmp_path: Path) -> None:
    out = tmp_path / "layers.json"
    done = run(evaluated, out)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert len(found["layers"]) == len(found["attention"]) == 3 and len(found["steps"]) == 2 and found["even"] == [1]
    assert f"--keep-softmax {found['chosen'][0]}," in done.stdout and done.stdout.count("softmax in ") == 3
    by_name = {one["name"]: one for one in found["sets"]}
    assert f"softmax in {found['chosen'][0]} (chosen): KL {by_name['chosen']['kl']:.3f}" in done.stdout
    assert "exists already" in run(evaluated, out).stderr
    narrow = run(evaluated, out, "--overwrite", columns=20).stdout.splitlines()  # what may be copied from the screen stays on a line
    assert narrow[-1] == f"written to {out}; convert with --keep-softmax {found['chosen'][0]}, or --keep-softmax @{out}"
    assert sum(line.endswith("of keys right") for line in narrow) == 3 and sum(line.startswith("layer 0 under") for line in narrow) == 1
    arguments = [str(evaluated / "teacher"), str(tmp_path / "student"), "--keep-softmax", f"@{out}", "--no-check"]
    done = CliRunner().invoke(cli.app(linearize.main), arguments)
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["linattn"]["softmax_layers"] == found["chosen"]
    arguments = ["--teacher", str(evaluated / "teacher"), "--data", str(evaluated / "text.txt"), "--out", str(tmp_path / "out")]
    more = ["--rows", "1", "--length", "32", "--recall", "none", "--decode", "", "--ranking", str(out)]
    done = CliRunner().invoke(cli.app(evaluate.main), [*arguments, *more])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "ranking.png" in page and "Layers, one at a time under a window" in page


@pytest.mark.parametrize("theirs", ["years of work", '{"chosen": [1]}', "[]"])
def test_a_file_of_somebody_elses_is_left_alone(theirs: str, evaluated: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis.json"
    out.write_text(theirs)
    done = run(evaluated, out, "--overwrite")
    assert done.exit_code == 2 and "was not written by linattn select-layers, so --overwrite leaves it alone" in done.stderr
    assert out.read_text() == theirs


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_layers, "select_layers", lambda *_: pytest.fail("it measures"))
    monkeypatch.setattr("os.access", lambda place, mode, **_: place != tmp_path)
    done = run(evaluated, tmp_path / "layers.json")
    assert done.exit_code == 2 and f"since {tmp_path} is no folder that can be; choose another place" in done.stderr


def test_by_attention_alone(evaluated: Path, tmp_path: Path) -> None:
    for again in ([], ["--overwrite"]):
        done = run(evaluated, tmp_path / "layers.json", "--attention-only", *again)
        assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "layers.json").read_text())
    best = max(found["attention"], key=lambda one: max(one["heads"]))
    assert found["chosen"] == [best["layer"]] and "layers" not in found


def test_what_cannot_be_chosen_is_refused(evaluated: Path, tmp_path: Path) -> None:
    out = tmp_path / "layers.json"
    for more, said in {("--count", "3"): "--count 3: the teacher has 3 layers", ("--length", "99999"): "too few"}.items():
        done = run(evaluated, out, *more)
        assert done.exit_code == 2 and said in done.stderr and not out.exists(), done.output
    arguments = [str(evaluated / "student"), "--data", str(evaluated / "text.txt"), "--out", str(out), *SHORT]
    done = CliRunner().invoke(cli.app(select_layers.main), arguments)
    assert done.exit_code == 2 and "a window with sinks is put on softmax attention" in done.stderr


def test_its_text_is_none_that_evaluation_scores(evaluated: Path) -> None:
    tokenizer = byte_tokenizer()
    first, last = (rows(evaluated / "text.txt", tokenizer, 64, 4).ids.tolist() for rows in (first_rows, last_rows))
    assert not [row for row in first if row in last]


def test_prompts_and_their_answers_fit_a_model_that_has_an_embedding_for_each_position(
    evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of 256 tokens, and sixteen for an answer."""
    sizes = {"vocab_size": 257, "n_embd": 16, "n_layer": 2, "n_head": 2}
    given: dict[str, Any] = {"teacher": str(evaluated / "teacher"), "data": (evaluated / "text.txt",), "distances": (90,), "length": 256}
    options = SelectOptions(**given, rows=2, needles=2, window=8, count=1, device="cpu", seed=5)
    for positions in (271, 272):
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=positions)).eval()
        monkeypatch.setattr(models, "load", lambda *args, model=model: models.Loaded(model, byte_tokenizer()))
        if positions == 271:
            with pytest.raises(ConversionError, match="--distances asks for 272 tokens and the model has 271 positions"):
                select_layers.select_layers(options)
        else:
            told: list[str] = []
            found = select_layers.select_layers(options, told.append)
    assert found["asked"]["seed"] == 5 and found["asked"]["data"] == [str(evaluated / "text.txt")] and len(found["asked"]["stamps"]) == 2
    assert found["even"] == [1] and found["device"].startswith("CPU") and len(told) == 3


@pytest.mark.parametrize("model_type", ["qwen3_next", "zamba2"])
def test_of_a_model_with_other_layers_between_those_with_attention_are_chosen(
    model_type: str, evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(model_type)
    config.vocab_size, config.max_position_embeddings = 257, 512
    model = AutoModelForCausalLM.from_config(config).eval()
    monkeypatch.setattr(models, "load", lambda *args: models.Loaded(model, byte_tokenizer()))
    given: dict[str, Any] = {"teacher": str(evaluated / "teacher"), "data": (evaluated / "text.txt",), "distances": (90,), "length": 256}
    options = SelectOptions(**given, rows=2, needles=2, window=8, count=1, device="cpu")
    if model_type == "zamba2":
        with pytest.raises(ConversionError, match="one attention serves several of its layers"):
            select_layers.select_layers(options)
        return
    found = select_layers.select_layers(options)
    assert [one["layer"] for one in found["layers"]] == [1, 3] and found["even"] == [3]
    assert [one["softmax"] for one in found["sets"] if one["name"] == "even"] == [[3]] and found["chosen"][0] in (1, 3)
    with pytest.raises(ConversionError, match="has 2 layers with attention"):
        select_layers.select_layers(replace(options, count=2))
