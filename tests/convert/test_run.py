"""A recipe: its stages one after the other, gone on with where they stopped; and those that come with the package."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from convert.evaluation import options
from convert.recipe import RECIPES, Recipe, flags, recipe_file
from convert.run import Conversion, main
from convert.stages.costs import training_memory
from convert.stages.options import DistillOptions
from recipes.common import documents
from recipes.common.config import build, load_config
from recipes.common.errors import RecipeError


@pytest.fixture
def recipe(tiny, tmp_path):
    """A function: changes -> the values of a very short recipe."""

    def make(**changes):
        training = {"length": 32, "batch_size": 4, "log_every": 1, "save_every": 1, "valid_rows": 2}
        values = {
            "source": str(tiny.teacher), "output": str(tmp_path / "out"), "data": [str(tiny.text)],
            "linearize": {"keep_softmax": "1", "check": False}, "training": training, "transfer": {"tokens": 256},
            "distill": {"tokens": 384},
            "evaluate": {"data": [str(tiny.text)], "rows": 2, "length": "32", "recall": "none", "decode": "8"},
        }  # fmt: skip
        return {**values, **changes}

    return make


@pytest.fixture
def called(monkeypatch):
    """Which commands were run, in this process; the one named in `called.fails` ends with status 2."""

    class Called(list):
        fails = ""
        arguments: dict = {}

    done = Called()

    def run_here(self, module, *arguments):
        done.append(module)
        done.arguments[module] = arguments
        if module == done.fails:
            raise SystemExit(2)
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as exit_:
            assert not exit_.code, (module, arguments)

    monkeypatch.setattr(Conversion, "call", run_here)
    monkeypatch.setattr(Conversion, "launch", run_here)
    yield done
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_stages_follow_one_another_and_go_on_where_they_stopped(recipe, called, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe()))
    called.fails = "convert.distill"
    with pytest.raises(SystemExit):
        main(str(tmp_path / "recipe.yaml"))
    assert called == ["convert.linearize", "convert.transfer", "convert.distill"]
    said = " ".join(capsys.readouterr().out.split())
    assert "MiB a device" in said and said.startswith("Everything goes into ") and "goes on where it was. ┏" in said
    for cell in ("tokens", "rows a step and process", "minutes", "transfer │ 256 │ 4 of 32 tokens │ not measured", "distill │ 384 │"):
        assert cell in said, said
    place, shared = str(tmp_path / "out"), ["--length=32", "--batch-size=4", "--log-every=1", "--save-every=1", "--valid-rows=2"]
    student, output, *told = called.arguments["convert.transfer"]
    assert [student, output, told[-1]] == [f"{place}/swapped", f"{place}/transfer", "--resume"]
    assert {*shared, "--tokens=256"} == {word for word in told[:-1] if not word.startswith(("--teacher", "--data"))}
    called.fails = ""
    called.clear()
    main(str(tmp_path / "recipe.yaml"))
    assert called == ["convert.distill", "convert.evaluate"]
    said = " ".join(capsys.readouterr().out.split())
    assert "distill: 0." in said and "evaluate: 0." in said  # minutes of what was done now
    model = tmp_path / "out" / "distill" / "model"
    assert AutoModelForCausalLM.from_pretrained(model).config.linattn["softmax_layers"] == [1]
    stages = json.loads((model / "conversion.json").read_text())["stages"]
    assert [(stage["stage"], stage["tokens"]) for stage in stages] == [("convert.transfer", 256), ("convert.distill", 384)]
    with pytest.raises(RecipeError, match="holds a recipe with another distill .*choose another output"):
        main(str(tmp_path / "recipe.yaml"), ["distill.tokens=512"])


def test_a_calibration_comes_first(recipe, called, tmp_path):
    recipe = build(Recipe, recipe(calibrate={"tokens": 256}, transfer={"tokens": 128}, distill=None, evaluate=None), "test")
    Conversion(recipe).run()
    assert called == ["convert.linearize", "convert.calibrate", "convert.transfer"]
    stages = json.loads((tmp_path / "out" / "transfer" / "model" / "conversion.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["convert.calibrate", "convert.transfer"]


def test_a_window_alone_has_nothing_to_calibrate(recipe, called, capsys):
    window = {"form": "window", "window": 8, "beside": "none", "check": False}
    Conversion(build(Recipe, recipe(linearize=window, calibrate={}, transfer=None, distill={"tokens": 128}, evaluate=None), "test")).run()
    assert called == ["convert.linearize", "convert.distill"] and "so it is not calibrated" in capsys.readouterr().out


def test_controls_learn_the_same_tokens_and_stand_in_the_table(recipe, called, tmp_path):
    asked = recipe(
        linearize={"form": "window", "window": 8, "sinks": 2, "input_gate": "token", "feature_map": "hedgehog", "output_map": "norm",
                   "check": False},
        transfer=None, calibrate={"tokens": 128}, distill={"tokens": 128, "window_drop": 0.5},
        controls=["window_only", "finetuned_teacher"],
    )  # fmt: skip
    Conversion(build(Recipe, asked, "test")).run()
    trained = ["convert.linearize", "convert.calibrate", "convert.distill"]
    assert called == [*trained, "convert.linearize", "convert.distill", "convert.distill", "convert.evaluate"]
    page = (tmp_path / "out" / "evaluation" / "report" / "report.md").read_text()
    assert "| window only | window 8 + 2 | 128 |" in page and "| finetuned teacher | softmax | 128 |" in page
    beside = "linear with decay, feature_map=hedgehog, input gate per token, output norm"
    assert f"| distill | window 8 + 2, gate per token, beside {beside} | 128 |" in page  # calibrating trains nothing
    card = (tmp_path / "out" / "window_only" / "distill" / "model" / "README.md").read_text()
    assert "## Evaluation" in card and "| window only |" in card and "| finetuned teacher |" not in card


def test_a_stage_may_be_left_out(recipe, called, tmp_path):
    Conversion(build(Recipe, recipe(transfer=None, evaluate=None), "test")).run()
    assert called == ["convert.linearize", "convert.distill"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linearize": {"kernal": "linear"}}, "linearize: unknown key 'kernal'; did you mean 'kernel'?"),
        ({"distill": {"tokens": 0}}, "tokens is 0; expected at least 1"),
        ({"training": {"length": 1}}, "test: training.length is 1; expected at least 2"),
        ({"training": {"length": 16}, "distill": {"length": 1}}, "test: distill.length is 1; expected at least 2"),
        ({"distill": {"length": "x"}}, "test: distill.length: expected a whole number, got 'x'"),
        ({"distill": {"kl_weight": 0.0}}, "test: distill.kl_weight and distill.text_weight are both 0"),
        ({"linearize": {"window": 8}}, "test: linearize.window goes with linearize.form window"),
        ({"linearize": {"keep_softmax": "all"}}, "test: linearize.keep_softmax takes layer numbers from 0"),
        ({"linearize": {"features": 1.5}}, "test: linearize.features: expected a whole number"),
        ({"evaluate": {"data": ["x"], "rows": "0"}}, "test: evaluate.rows is 0; expected at least 1"),
        ({"evaluate": {"data": ["x"], "distances": "a"}}, "test: evaluate.distances 'a': expected whole numbers"),
        ({"evaluate": {"data": ["x"], "recall": "needles"}}, "test: evaluate.recall needles: unknown; give all"),
        ({"evaluate": {"data": ["x"], "dtype": "int8"}}, "test: evaluate.dtype int8: expected one of float32"),
        ({"evaluate": {"data": [1]}}, "test: evaluate.data[0]: expected text, got 1"),
        ({"evaluate": {"data": ["x"], "run": True}}, "test: evaluate.run[0]: expected text, got True"),
        ({"evaluate": {"data": ["x"], "limit": "null"}}, "test: evaluate.limit: expected a whole number"),
        ({"linearize": {"features": "0x10"}}, "test: linearize.features: expected a whole number"),
        ({"linearize": {"temperature": "~"}}, "test: linearize.temperature: expected a number"),
        ({"distill": {"kl_wait": 1}}, "unknown key 'kl_wait'; did you mean 'kl_weight'?"),
        ({"transfer": {"lora": 4}}, "unknown key 'lora'"),
        ({"training": {"lenght": 4}}, "training: unknown key 'lenght'; did you mean 'length'?"),
        ({"distill": {"teacher": "x"}}, "teacher is set by the recipe itself"),
        ({"evaluate": {"rows": 2}}, "data must name files"),
        ({"evaluate": {"data": ["x"], "row": 2}}, "did you mean 'rows'?"),
        ({"data": []}, "data names no text"),
        ({"controls": ["window"]}, "controls: 'window' is unknown; give some of window_only, finetuned_teacher"),
        ({"controls": ["window_only"]}, "is of a student with a window"),
        ({"controls": ["finetuned_teacher"], "distill": None}, "distill is left out"),
        ({"controls": ["finetuned_teacher"], "source": "x.gguf"}, "which cannot be a GGUF file"),
    ],
)
def test_what_no_stage_could_do_is_refused_at_once(recipe, changes, message):
    with pytest.raises(RecipeError) as error:
        build(Recipe, recipe(**changes), "test")
    assert message in str(error.value)


def test_options_are_read_as_the_command_line_would(recipe):
    linearize = {"features": "4", "temperature": 2, "keep_softmax": 1, "dtype": "", "check": False, "decay": None}
    evaluate = {"data": ["x"], "length": 64, "rows": "8", "decode": "none", "recall": "needle,key-value", "filler": "1.txt", "card": True}
    build(Recipe, recipe(linearize=linearize, evaluate=evaluate), "test")


def test_options_on_a_command_line():
    assert flags({"a_b": 1, "c": True, "d": False, "e": ["x", "y"], "f": None, "g": ""}) == ["--a-b=1", "--c", "--no-d", "--e=x", "--e=y"]


def test_what_a_recipe_says_no_to_is_no_word_that_its_command_does_not_know(recipe, called):
    evaluate = {**recipe()["evaluate"], "card": False}
    linearize = {**recipe()["linearize"], "large_state": False, "learnable": False}
    Conversion(build(Recipe, recipe(linearize=linearize, transfer=None, distill=None, evaluate=evaluate), "test")).run()
    assert called == ["convert.linearize", "convert.evaluate"] and "--card" not in called.arguments["convert.evaluate"]


def test_every_recipe_that_comes_with_it_is_valid():
    files = sorted(RECIPES.glob("*.yaml"))
    names = {"stories260k", "smollm2-135m", "pythia-160m", "pythia-410m", "pythia-1.4b", "tinyllama-1.1b", "qwen3-0.6b"}
    assert {file.stem for file in files} == names
    read = [load_config(Recipe, file) for file in files]
    assert len({recipe.output for recipe in read}) == len({recipe.source for recipe in read}) == len(names)
    assert recipe_file("smollm2-135m") == RECIPES / "smollm2-135m.yaml"
    with pytest.raises(RecipeError, match="absent: no such file; give a recipe's, or the name of one of ours: pythia"):
        recipe_file("absent")


def test_minutes_are_foretold_by_rates_of_the_recipes_own_and_not_of_its_base():
    rates = {file.stem: load_config(Recipe, file) for file in RECIPES.glob("*.yaml")}
    told = {name: {stage for stage, rate in read.tokens_per_second.items() if rate} for name, read in rates.items()}
    assert {name for name, stages in told.items() if not stages} == {"stories260k"}
    assert all(stages in (set(), {"transfer", "distill"}) for stages in told.values())
    for name, stages in told.items():
        own = (RECIPES / f"{name}.yaml").read_text()
        assert bool(rates[name].measured_on) == bool(stages) and (not stages or "tokens_per_second:" in own), name


def test_memory_is_told_from_the_sizes_of_the_student(tiny):
    options = {"batch_size": 4, "length": 64, "mixed_precision": "bf16", "gradient_checkpointing": False, "kl_weight": 1.0}
    told = training_memory(tiny.student, options)
    numbers = sum(tensor.numel() for shard in Path(tiny.student).glob("*.safetensors") for tensor in load_file(shard).values())
    states, kept, compared = 18 * numbers / 2**20, 60 * 256 * 32 * 3 / 2**20, 24 * 256 * 257 / 2**20
    assert told.startswith(f"about {states + kept + compared:.1f} MiB a device: {states:.1f} for {numbers:,} numbers of student")
    assert f"{kept:.1f} for activations of 256 tokens, {compared:.1f} to compare" in told and numbers < 10**6
    vast = {"batch_size": 2**12, "length": 2**10}  # 2^22 tokens, of a model with 32 channels and 3 layers and 257 tokens
    GiB, activations = 2**30, 2**22 * 32 * 3
    for changes, kept, compared in (
        ({}, 60, 24 * 2**26),
        ({"mixed_precision": "no"}, 96, 24 * 2**26),
        ({"gradient_checkpointing": True}, 4, 24 * 2**26),
        ({"mixed_precision": "fp16"}, 60, 24 * 2**26),
    ):
        told = training_memory(tiny.student, options | vast | changes)
        rounded = math.ceil(kept * activations / 2**20) / 1024
        assert told.endswith(f"{rounded:.1f} for activations of 4,194,304 tokens, {compared / GiB:.1f} to compare"), told
        assert told.startswith(f"about {(kept * activations + compared) / GiB:.1f} GiB a device")
    of_transfer = {key: value for key, value in (options | vast).items() if key != "kl_weight"}
    assert training_memory(tiny.student, of_transfer).endswith(f"{4 * activations / GiB:.1f} to compare")
    assert f"{24 * 64 * 257 / 2**20:.1f} to compare" in training_memory(tiny.student, options | {"batch_size": 1})
    assert DistillOptions.__dataclass_fields__.keys() >= options.keys()
    assert Path(tiny.student).is_dir()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": ["nothere.txt"]}, "nothere.txt: no such file"),
        ({"valid_data": ["nothere.txt"]}, "nothere.txt: no such file"),
        ({"evaluate": {"data": ["nothere.txt"]}}, "evaluate.data: nothere.txt: no such file"),
        ({"evaluate": {"data": "nothere.txt"}}, "evaluate.data: nothere.txt: no such file"),
        ({"evaluate": {"data": ["text.txt"], "filler": "nothere.txt"}}, "evaluate.filler: nothere.txt: no such file"),
        ({"evaluate": {"data": ["text.txt"], "task_rows": "nothere"}}, "evaluate.task_rows: nothere: no such folder"),
        ({"data": ["nobody/text"]}, "nobody/text is read by the library datasets: `pip install datasets`"),
        ({"valid_data": ["tables"]}, "tables is read by the library datasets"),
        ({"evaluate": {"data": ["text.txt"], "tasks": "piqa"}}, "evaluate.tasks needs the package lm-eval: `pip install lm-eval"),
        ({"source": "./nothere"}, "there is no folder ./nothere"),
        ({"training": {"length": 65}}, "length 65 is more than the 64 positions of .*; give --set training.length=64 or less"),
        ({"distill": {"length": 65}}, "distill: length 65 is more than the 64 positions"),
        ({"linearize": {"keep_softmax": "0,9"}}, "^linearize.keep_softmax names layer 9, but .* has layers 0 to "),
    ],
    ids=str,
)
def test_what_a_later_stage_would_refuse_is_refused_before_anything_is_made(recipe, called, tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    for module in (documents, options):
        monkeypatch.setattr(module, "find_spec", lambda name: None)  # what the extra `convert` does not bring is not there
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "rows.parquet").touch()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(**changes)))
    with pytest.raises(RecipeError, match=said):
        main(str(tmp_path / "recipe.yaml"))
    assert not called and not (tmp_path / "out").exists()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(training={"length": 64})))
    load_config(Recipe, tmp_path / "recipe.yaml", []).check_inputs()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["evaluate.data=[x]", "evaluate.distances=[40]"], "--set evaluate.distances '[40]': expected whole numbers"),
        (["distill.length=1"], "--set distill.length is 1; expected at least 2"),
        (["distill={length: 1}"], "--set distill.length is 1; expected at least 2"),
        (["distill.lenght=1"], "--set distill.lenght: distill: unknown key 'lenght'"),
        (["leraning=1"], "--set leraning: unknown key 'leraning'"),
        (["evaluate.data=[x]", "data=[]"], "--set data names no text"),
        (["training.window_drop=0.1"], "recipe.yaml: transfer.tokens is 0"),  # what the file says is told as the file's
    ],
)
def test_a_setting_of_the_command_line_is_refused_by_its_own_name(recipe, tmp_path, given, said):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(**({"transfer": {"tokens": 0}} if said.startswith("recipe.yaml") else {}))))
    with pytest.raises(RecipeError) as error:
        load_config(Recipe, file, given)
    assert str(error.value).removeprefix(f"{tmp_path}/").startswith(said)


def test_another_recipe_is_refused_where_the_first_one_ended_before_its_first_stage(recipe, called, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(transfer=None, evaluate=None, distill={"tokens": 128})))
    called.fails = "convert.linearize"
    with pytest.raises(SystemExit):
        main(str(tmp_path / "recipe.yaml"))
    called.fails = ""
    before = (tmp_path / "out" / "recipe.json").read_text()
    with pytest.raises(RecipeError, match="holds a recipe with another training"):
        main(str(tmp_path / "recipe.yaml"), ["training.length=16"])
    assert (tmp_path / "out" / "recipe.json").read_text() == before
    main(str(tmp_path / "recipe.yaml"))
