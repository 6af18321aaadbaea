"""A run goes on only from state that is as it wrote it, and its own: else one sentence, and nothing is changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from recipes.common.config import dump
from recipes.common.marks import LOCK, MARK, seal

TRAIN = "recipes.tinystories.train"
Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Where the runs lie: `run`, and finished copies of two of the same settings, `one` and `two`."""
    folder = tmp_path_factory.mktemp("runs")
    return SimpleNamespace(run=folder / "run", one=folder / "one", two=folder / "two", config=folder / "config.yaml")


@pytest.fixture
def stopped(kept: SimpleNamespace, whole: Path, run: Command) -> Path:
    """A run of four steps that was stopped before it wrote model/, with the checkpoint of its last step."""
    settings = {"output": str(kept.run), "model": str(whole / "model"), "train_data": [str(whole / "text.txt")], "valid_stories": 3}
    settings |= {"length": 16, "batch_size": 2, "steps": 4, "log_every": 1, "eval_every": 2, "checkpoint_every": 2, "samples": 0}
    kept.config.write_text(dump(settings), encoding="utf-8")
    for copy in (kept.one, kept.two):
        if not copy.exists():
            shutil.rmtree(kept.run, ignore_errors=True)
            assert run(TRAIN, "--config", kept.config) == (0, "")
            shutil.copytree(kept.run, copy)
    shutil.rmtree(kept.run)
    shutil.copytree(kept.one, kept.run)
    shutil.rmtree(kept.run / "model")
    return Path(kept.run)


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step-00000004"


def another_models_weights(run: Path, kept: SimpleNamespace) -> None:
    path = checkpoint(run) / "model.safetensors"
    save_file({key: value * 0.5 for key, value in load_file(path).items()}, path, metadata={"format": "pt"})


def another_runs_checkpoint(run: Path, kept: SimpleNamespace) -> None:
    shutil.rmtree(checkpoint(run))
    shutil.copytree(checkpoint(kept.two), checkpoint(run))


def a_step_beyond_the_runs_end(run: Path, kept: SimpleNamespace) -> None:
    beyond = checkpoint(run).rename(checkpoint(run).with_name("step-00000005"))
    path = beyond / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 5}))
    seal(beyond, TRAIN)


def a_fact_that_is_known_no_more(run: Path, kept: SimpleNamespace) -> None:
    path = run / "facts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"devices": 8}))


def progress(**changes: object) -> Callable[[Path, SimpleNamespace], None]:
    """Other progress with a mark that fits it: by somebody who knows of marks."""

    def spoil(run: Path, kept: SimpleNamespace) -> None:
        path = checkpoint(run) / "progress.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        seal(path.parent, TRAIN)

    return spoil


def cut(name: str, bytes_kept: int | None = 10) -> Callable[[Path, SimpleNamespace], None]:
    def spoil(run: Path, kept: SimpleNamespace) -> None:
        path = next(run.rglob(name))
        if bytes_kept is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:bytes_kept])

    return spoil


def write(name: str, text: str) -> Callable[[Path, SimpleNamespace], None]:
    return lambda run, kept: (run / name).write_text(text, encoding="utf-8") and None  # type: ignore[func-returns-value]


DAMAGE: dict[str, tuple[Callable[[Path, SimpleNamespace], object], str]] = {
    "optimizer cut": (cut("optimizer.bin"), "optimizer.bin is not as it was written"),
    "weights cut": (cut("model.safetensors"), "model.safetensors is not as it was written"),
    "schedule lost": (cut("scheduler.bin", None), "scheduler.bin is missing"),
    "random states lost": (cut("random_states_0.pkl", None), "random_states_0.pkl is missing"),
    "progress cut": (cut("progress.json"), "progress.json is not as it was written"),
    "weights of equal shapes": (another_models_weights, "model.safetensors is not as it was written"),
    "another run's checkpoint": (another_runs_checkpoint, "this checkpoint is another run's"),
    "an empty checkpoint": (lambda run, kept: [path.unlink() for path in checkpoint(run).iterdir()], "no mark"),
    "a step beyond the run's end": (a_step_beyond_the_runs_end, "its step is 5, which is no step of this run"),
    "a fact that is known no more": (a_fact_that_is_known_no_more, "belongs to another run: devices was 8"),
    "a step of 10^9": (progress(step=10**9), "no step of this run"),
    "a step before the first": (progress(step=-4), "no step of this run"),
    "a step that is text": (progress(step="4"), "no step of this run"),
    "seconds that are none": (progress(seconds=[1]), "seconds is [1]"),
    "an empty model": (lambda run, kept: (run / "model").mkdir(), "model has no mark"),
    "a model without weights": (
        lambda run, kept: shutil.copytree(kept.one / "model", run / "model", ignore=shutil.ignore_patterns("*.safetensors")),
        "model.safetensors is missing",
    ),
    "facts cut": (cut("facts.json"), "facts.json is not readable as JSON"),
    "settings that grow": (write("config.yaml", "a: &a [x, x]\nb: &b [*a, *a]\n"), "belongs to another run"),
    "a record that is none": (write("metrics.jsonl", '{"step": 1}\n{"loss": 2}\n'), "metrics.jsonl, line 2 holds no object with a step"),
    "a record cut in the middle": (write("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 2}\n'), "metrics.jsonl, line 2 is not readable"),
}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (MARK, LOCK)}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_state_is_refused_by_name_and_kept(kind: str, stopped: Path, kept: SimpleNamespace, run: Command) -> None:
    spoil, expected = DAMAGE[kind]
    spoil(stopped, kept)
    before = content(stopped)
    status, error = run(TRAIN, "--config", kept.config, "--resume")
    assert status == 2 and expected in error, error
    assert content(stopped) == before


def test_what_is_whole_is_gone_on_from(stopped: Path, kept: SimpleNamespace, run: Command) -> None:
    """A last record that a kill cut short, and a folder that only looks like a checkpoint, do no harm."""
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (stopped / "checkpoints" / "step-x").mkdir()
    assert run(TRAIN, "--config", kept.config, "--resume") == (0, "")
    assert load_file(stopped / "model" / "model.safetensors").keys() == load_file(kept.one / "model" / "model.safetensors").keys()
    assert all(json.loads(line)["step"] <= 4 for line in (stopped / "metrics.jsonl").read_text().splitlines())


COMPARED = {
    "no records": ("metrics.jsonl", "", "no validation loss yet"),
    "no settings": ("config.yaml", "[1]", "holds no settings"),
    "settings that grow": (
        "config.yaml",
        "a: &a [x]\n" + "".join(f"{n}: &{n} [{', '.join(['*' + m] * 9)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)),
        "aliases",
    ),
    "a loss that is text": ("metrics.jsonl", '{"step": 1, "seconds": 1, "valid_loss": "low"}\n{"step": 1, "tokens": 4}\n', "valid_loss is"),
    "a record without seconds": (
        "metrics.jsonl",
        '{"step": 1, "seconds": 1, "valid_loss": 2}\n{"step": 1, "tokens": 4}\n',
        "tokens_per_second is null",
    ),
    "no JSON": ("metrics.jsonl", "{\n{\n", "line 1"),
    "a step of 10^400": ("metrics.jsonl", f'{{"step": {10**400}}}\n', "is too large"),
    "a step of 10^20": ("metrics.jsonl", f'{{"step": {10**20}}}\n', "no object with a step"),
    "a loss of 10^308": (
        "metrics.jsonl",
        '{"step": 1, "seconds": 1, "valid_loss": 1e308}\n{"step": 1, "tokens": 4}\n',
        "valid_loss is 1e+308",
    ),
}


@pytest.mark.parametrize("name", ["$\\x$", "[/]", "a[/b]", "_$_$"])
def test_things_are_called_what_the_user_likes(name: str, stopped: Path, whole: Path, run: Command, tmp_path: Path) -> None:
    """Neither a markup of the screen's nor of the picture's is read out of a name."""
    assert run("recipes.tinystories.compare", f"{name}={stopped}", "--out", tmp_path / "runs" / name) == (0, "")
    assert json.loads((tmp_path / "runs" / name / "comparison.json").read_text())[0]["name"] == name
    short = ["--stories", 2, "--length", 16, "--decode", 8, "--tokens", 1, "--device", "cpu"]
    model, out = f"{name}={whole / 'model'}", tmp_path / "models" / name
    assert run("recipes.tinystories.evaluate", model, "--data", whole / "text.txt", "--out", out, *short) == (0, "")
    assert run("convert.linearize", whole / "model", tmp_path / "converted" / name, "--no-check") == (0, "")


def test_records_that_are_a_pipe(stopped: Path, run: Command, tmp_path: Path) -> None:
    (stopped / "metrics.jsonl").unlink()
    os.mkfifo(stopped / "metrics.jsonl")
    status, error = run("recipes.tinystories.compare", stopped, "--out", tmp_path / "out")
    assert status == 2 and "metrics.jsonl is no file" in error


@pytest.mark.parametrize("kind", COMPARED)
def test_runs_that_are_compared_are_doubted(kind: str, stopped: Path, run: Command, tmp_path: Path) -> None:
    name, text, expected = COMPARED[kind]
    (stopped / name).write_text(text, encoding="utf-8")
    status, error = run("recipes.tinystories.compare", stopped, "--out", tmp_path / "out")
    assert status == 2 and expected in error, error
    assert not (tmp_path / "out").exists()
