"""What is wrong with the arguments is said at once: before torch is imported, and before the hub is asked."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from convert import options
from convert.errors import ConversionError, one_line
from convert.options import LinearizeOptions, layer_numbers
from hf_linattn import forms
from hf_linattn.forms import feature_map, input_gate, output_map, polynomial, window
from recipes.common.reading import refuse_missing_folder

RUN = """
import json, runpy, sys
module, *calls = sys.argv[1:]
for call in calls:
    sys.argv = [module, *json.loads(call)]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        print("status", end.code, *({"torch", "transformers"} & set(sys.modules)), flush=True)
"""
SETTINGS = "model: ./absent\noutput: new\ntrain_data: [text]\n"
# By command: arguments, and what the sentence says; nothing where the command ends well.
ARGUMENTS: dict[str, dict[str, str]] = {
    "convert.linearize": {
        "--help": "",
        "absent/model new --dtype int8": "error: --dtype is int8; expected one of float32, bfloat16, float16; convert.linearize --help",
        "absent/model new --window 8": "error: --window goes with --form window; the form polynomial has no such option",
        "absent/model new --form window --window 0": "error: --window is 0; expected at least 1",
        "absent/model new --features 1.5": "error: --features is 1.5; expected a whole number; convert.",
        "absent/model new --dropout 1": "error: --dropout is 1.0; expected a number from 0 to below 1",
        "absent/model new --keep-softmax a": "--keep-softmax",
        "absent/model new --temperature nan": "temperature",
        "./absent new": "there is no folder",
        "absent/model there": "there exists already and was not written by convert.linearize; choose another place",
        "absent/model thesis/new --overwrite": "cannot be written",
        "absent/model thesis": "thesis exists already and is no folder; choose another place",
    },
    "convert.select_layers": {
        "--help": "",
        "t --data text": "Missing option '--out'",
        "t --data absent.txt --out new": "absent.txt: no such file",
        "t --data text --out thesis": "thesis exists already; choose another file\n",
        "t --data text --out there": "there is a folder",
        "t --data text --out absent/new": "there is no folder",
        "t --data text --out new --distances 60": "which the window of 64 reaches",
        "./absent --data text --out new": "there is no folder",
    },
    "convert.evaluate": {
        "--help": "",
        "x --teacher t": "Missing option '--data'",
        "x --teacher t --data absent.txt": "absent.txt: no such file",
        "x --teacher t --data text --length 1": "--length",
        "x --teacher t --data text --rows 0": "error: --rows is 0; expected a whole number, at least 1; convert.evaluate --help",
        "x --teacher t --data text --dtype int8": "error: --dtype int8: expected one of float32",
        "x --teacher t --data text --out there": "exists already",
        "x --teacher ./absent --data text": "there is no folder",
    },
    "convert.transfer": {
        "--help": "",
        "absent new --data text": "no teacher is given",
        "absent new --teacher t": "no text is given",
        "absent new --teacher t --data text --length 1": "error: --length is 1; expected a whole number, at least 2; convert.",
        "absent new --teacher t --data text --train all": "error: --train is all; expected one of attention, new; convert.",
        "absent new --teacher t --data text --warmup nan": "error: --warmup is nan; expected a number from 0 to 0.5; convert.",
        "absent new --teacher t --data text --learning-rate 0": "error: --learning-rate is 0.0; expected a number above 0",
        "absent new --teacher t --data text --learning-rate inf": "error: --learning-rate: expected a number, got inf",
        "absent new --teacher t --data text --save-every 3": "error: --save-every (3) must be a multiple of --log-every (10)",
        "absent there --teacher t --data text": "there exists already and was not written by convert.transfer; choose another place",
        "absent there --teacher t --data text --resume": "holds no mark",
        "./absent new --teacher t --data text": "there is no folder ./absent",
    },
    "convert.distill": {
        "--help": "",
        "absent new --teacher t --data text --kl-weight 0": "nothing would be learned",
        "absent new --teacher t --data text --long-length 1000": "divide the tokens of a batch",
        "there new --teacher ./absent --data text": "there is no folder ./absent",
    },
    "convert.run": {
        "--help": "",
        "absent": "no such file; give a recipe's, or the name of one of ours",
        "thesis": "thesis",
        "smollm2-135m --set training.lenght=8": "did you mean 'length'",
        "smollm2-135m --set source=./absent output=new": "there is no folder ./absent",
        "smollm2-135m --set linearize.window=0": "--set linearize.window is 0; expected at least 1",
        "smollm2-135m --set linearize.form=polynomial": "linearize.window goes with linearize.form window",
        "smollm2-135m --set linearize.keep_softmax=a": "linearize.keep_softmax takes layer numbers",
        "smollm2-135m --set source=there data=[text] linearize.keep_softmax='@absent'": "absent cannot be read",
        "smollm2-135m --set training.length=1": "--set training.length is 1; expected at least 2",
        "smollm2-135m --set distill.length=1": "--set distill.length is 1; expected at least 2",
        "smollm2-135m --set evaluate.rows=0 evaluate.data=[text]": "--set evaluate.rows is 0; expected at least 1",
        "smollm2-135m --set evaluate.recall=all_ evaluate.data=[text]": "--set evaluate.recall all_: unknown; give all",
        "smollm2-135m --set evaluate.length=[8,9] evaluate.data=[text]": "evaluate.length '[8, 9]': expected whole numbers",
        "smollm2-135m --set output=there": "holds something else",
    },
    "recipes.tinystories.train": {
        "--help": "",
        "--config absent.yaml": "absent.yaml",
        "--config thesis": "thesis",
        "--config train.yaml --set lenght=8": "did you mean 'length'",
        "--config train.yaml --set length=1": "length must be at least 2",
        "--config train.yaml --set output=there": "exists already",
        "--config train.yaml --set output=there --overwrite": "holds no mark",
        "--config train.yaml --set output=there --resume": "holds no mark",
        "--config train.yaml": "there is no folder",
    },
    "recipes.tinystories.evaluate": {
        "--help": "",
        "x --data text --dtype int8": "--dtype int8",
        "x --data text --decode 0": "--decode",
        "x --data text --stories 0": "--stories",
        "x --data text --out there": "exists already",
        "name=./absent --data text": "there is no folder",
    },
    "recipes.tinystories.compare": {"--help": "", "absent": "holds no config.yaml", "absent --out there": "exists already", "": "RUN"},
    "recipes.lra.train": {
        "--help": "",
        "--config absent.yaml": "absent.yaml",
        "--config lra.yaml --set task=chess": "task is 'chess'",
        "--config lra.yaml --set seeds=[0]": "exists already",
        "--config lra.yaml --set seeds=[1]": "absent-data",
    },
    "recipes.lra.prepare": {
        "--help": "",
        "chess --out new": "is no task",
        "listops --out there": "exists",
        "listops --out x --test 0": "--test",
    },
    "recipes.lra.report": {"--help": "", "absent --out new": "no such file or folder", "there --out new": "no result.json"},
    "recipes.quickstart": {
        "--help": "",
        "--model there": "go together",
        "--model there --data text": "no config.json",
        "--scale 0": "scale",
        "--out text": "/text is no folder that can be; choose another place",
    },
}


@pytest.mark.parametrize("module", ARGUMENTS)
def test_torch_is_not_imported_for_it(module: str, tmp_path: Path) -> None:
    for folder in ("there", "out/seed-0"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("thesis", "text", "there/thesis"):
        (tmp_path / name).write_text("years of work")
    (tmp_path / "train.yaml").write_text(SETTINGS)
    (tmp_path / "lra.yaml").write_text("task: listops\ndata: absent-data\noutput: out\n")
    before = sorted(tmp_path.rglob("*"))
    calls = [json.dumps(arguments.split()) for arguments in ARGUMENTS[module]]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, module, *calls], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("status ")]
    assert told == [f"status {2 if said else 0}" for said in ARGUMENTS[module].values()], done.stderr
    for said in filter(None, ARGUMENTS[module].values()):
        assert said in done.stderr
    assert not {"Traceback", "Input should", "Value error"} & set(re.findall("Traceback|Input should|Value error", done.stderr))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_choices_are_those_that_the_forms_name() -> None:
    named = {
        options.Form: forms.FORMS, options.Kernel: polynomial.KERNELS, options.Decay: polynomial.DECAYS,
        options.InputGate: input_gate.CHOICES, options.FeatureMap: feature_map.CHOICES, options.OutputMap: output_map.CHOICES,
        options.Gate: window.GATES, options.Beside: window.BESIDE,
    }  # fmt: skip
    assert {choices: get_args(choices) for choices in named} == {choices: tuple(known) for choices, known in named.items()}
    own = {field.name for form in forms.FORMS.values() for field in dataclasses.fields(form.Options)}
    assert set(options.OF_THE_WINDOW) == {field.name for field in dataclasses.fields(window.WindowOptions)} - {
        field.name for field in dataclasses.fields(polynomial.PolynomialOptions)
    }
    assert set(options.OF_THE_FORM) == own - {"a", "b", "c", "normalize_qk"}  # which a conversion leaves as they are


@pytest.mark.parametrize(
    ("text", "layers"),
    [("", ()), ("3", (3,)), ("0-5,8", (0, 1, 2, 3, 4, 5, 8)), (" 4 , 1-2,", (1, 2, 4)), ("2-2,1,2", (1, 2)), ("9998-9999", (9998, 9999))],
)
def test_layer_numbers(text: str, layers: tuple[int, ...]) -> None:
    assert layer_numbers(text) == layers


def test_layers_of_a_selection(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text('{"chosen": [5, 1, 5]}')
    assert layer_numbers(f"@{path}") == (1, 5)
    for content in ("[1]", "{}", '{"chosen": [true]}', '{"chosen": [-1]}', '{"chosen": ["1"]}'):
        path.write_text(content)
        with pytest.raises(ConversionError, match="names no layers as chosen"):
            layer_numbers(f"@{path}")
    with pytest.raises(ConversionError, match="cannot be read"):
        layer_numbers(f"@{tmp_path / 'absent'}")


@pytest.mark.parametrize("text", ["a", "-1", "3-", "5-3", "1.5", "10000", "0-10000", "1--2", "٣-"])
def test_no_layer_numbers(text: str) -> None:
    with pytest.raises(ConversionError, match="--keep-softmax"):
        layer_numbers(text)


@pytest.mark.parametrize(
    "options",
    [
        *({"kernel": "cubic"}, {"decay": "layer"}, {"dtype": "int8"}),
        *({"temperature": -1.0}, {"temperature": 0.0}, {"temperature": float("nan")}, {"temperature": float("inf")}),
        *({"dropout": 1.0}, {"dropout": -0.00001}, {"dropout": float("nan")}),
        *({"features": 0}, {"window": 0, "form": "window"}, {"sinks": -1, "form": "window"}, {"gate": "head"}),
    ],
    ids=str,
)
def test_options_out_of_bounds(options: dict) -> None:
    with pytest.raises(ConversionError, match=next(iter(options))):
        LinearizeOptions(**options)


def test_a_missing_folder_is_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("./absent", "../absent", "~/absent", "/absent", "a/b/c", "models/absent", "absent/", "a\\b"):
        with pytest.raises(ConversionError, match="there is no folder"):
            refuse_missing_folder(name)
    with pytest.raises(ConversionError, match="no folder models/absent, though models exists, so the hub is not asked"):
        refuse_missing_folder("models/absent")
    for name in ("models", "models/", "gpt2", "EleutherAI/pythia-14m"):
        refuse_missing_folder(name)


def test_another_librarys_words_on_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines" and one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("a" * 300)) == "a" * 300 and one_line(ValueError("a" * 301)) == "a" * 300 + " ..."
    assert one_line(ValueError("abc"), longest=2) == "ab ..."
