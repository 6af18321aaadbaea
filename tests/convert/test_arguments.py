"""What is wrong with the arguments is said at once: before torch is imported, and before the hub is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from convert.errors import ConversionError
from convert.options import LinearizeOptions, layer_numbers
from recipes.common.reading import refuse_missing_folder

RUN = """
import runpy, sys
module, *sys.argv = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__")
except SystemExit as end:
    print("status", end.code, "torch" in sys.modules, "transformers" in sys.modules)
"""


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["convert.linearize", "x", "--help"], 0),
        (["convert.linearize", "x", "absent/model", "OUT", "--dtype", "int8"], 2),
        (["convert.linearize", "x", "absent/model", "OUT", "--keep-softmax", "a"], 2),
        (["convert.linearize", "x", "absent/model", "OUT", "--temperature", "nan"], 2),
        (["convert.linearize", "x", "./absent", "OUT"], 2),
        (["convert.linearize", "x", "absent/model", "."], 2),
        (["recipes.lra.prepare", "x", "--help"], 0),
        (["recipes.lra.report", "x", "--help"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_torch_is_not_imported_for_it(command: list[str], status: int, tmp_path: Path) -> None:
    command = [str(tmp_path / "out") if part == "OUT" else part for part in command]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120
    )
    assert done.stdout.splitlines()[-1] == f"status {status} False False", done.stderr


@pytest.mark.parametrize(
    ("text", "layers"),
    [("", ()), ("3", (3,)), ("0-5,8", (0, 1, 2, 3, 4, 5, 8)), (" 4 , 1-2,", (1, 2, 4)), ("2-2,1,2", (1, 2))],
)
def test_layer_numbers(text: str, layers: tuple[int, ...]) -> None:
    assert layer_numbers(text) == layers


@pytest.mark.parametrize("text", ["a", "-1", "3-", "5-3", "1.5", "0-99999999", "1--2", "٣-"])
def test_no_layer_numbers(text: str) -> None:
    with pytest.raises(ConversionError, match="--keep-softmax"):
        layer_numbers(text)


@pytest.mark.parametrize("options", [{"kernel": "cubic"}, {"decay": "token"}, {"dtype": "int8"}, {"temperature": -1.0}, {"dropout": 1.0}])
def test_options_out_of_bounds(options: dict) -> None:
    with pytest.raises(ConversionError, match=next(iter(options))):
        LinearizeOptions(**options)


def test_a_missing_folder_is_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("./absent", "../absent", "~/absent", "/absent", "a/b/c", "models/absent", "absent/", "a\\b"):
        with pytest.raises(ConversionError, match="there is no folder"):
            refuse_missing_folder(name)
    for name in ("models", "models/", "gpt2", "EleutherAI/pythia-14m"):
        refuse_missing_folder(name)
