"""Settings: values are checked against their field's type, and every refusal is a sentence that names the key."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from typer.testing import CliRunner

from recipes.common import cli, errors, reading
from recipes.common.config import dump, load_config
from recipes.common.errors import RecipeError, exit_with_sentence, stage
from recipes.common.files import staged_directory, write_json, write_text


@dataclass
class Settings:
    model: str
    steps: int = 3
    rate: float = 0.1
    fast: bool = False
    kind: Literal["a", "b", "no"] = "a"
    limit: int | None = None
    files: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@pytest.fixture
def file(tmp_path):
    (tmp_path / "base.yaml").write_text("model: m\nextra: {x: 1, y: {z: 2}}\n")
    path = tmp_path / "c.yaml"
    path.write_text("base: base.yaml\nrate: 1e-3\nfiles: [one, two]\nextra: {x: 5}\n")
    return path


def test_values_come_from_base_file_and_overrides_in_that_order(file):
    config = load_config(Settings, file, ["steps=7", "extra.y.w=3", "limit=4", "fast=true", "kind=b"])
    assert config == Settings("m", 7, 1e-3, True, "b", 4, ["one", "two"], {"x": 5, "y": {"z": 2, "w": 3}})
    assert load_config(Settings, file, ["limit=null"]).limit is None
    assert yaml.safe_load(dump(config))["rate"] == 1e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("step=1", "unknown key 'step'; did you mean 'steps'?"),
        ("nonsense=1", "unknown key 'nonsense'; the keys are extra, fast"),
        ("steps=many", "steps: expected a whole number, got 'many'"),
        ("steps=2.5", "steps: expected a whole number, got 2.5"),
        ("steps=true", "steps: expected a whole number, got True"),
        ("rate=fast", "rate: expected a number, got 'fast'"),
        ("fast=1", "fast: expected true or false, got 1"),
        ("kind=c", "kind: expected one of a, b, no, got 'c'"),
        ("limit=x", "limit: expected a whole number, got 'x'"),
        ("files=one", "files: expected a list, each of it text, got 'one'"),
        ("files=[1]", "files[0]: expected text, got 1"),
        ("extra=3", "extra: expected a dictionary, got 3"),
        ("model=null", "model: expected text, got None"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("steps", "expected key=value"),
        ("steps=[", "not YAML"),
        ("steps.x=1", "steps: expected a whole number"),
    ],
)
def test_a_wrong_value_is_refused_by_name(file, override, message):
    with pytest.raises(RecipeError) as error:
        load_config(Settings, file, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"- a\n- b\n", "expected lines of 'key: value', got a list"),
        (b"model: [\n", "not YAML"),
        (b"model: \xff\xfe\n", "not UTF-8 text"),
        (b"steps: 2\n", "model must be given"),
        (b"model: a\nmodel: b\n", "the key 'model' stands twice, line 2"),
        (b"extra: {x: 1, x: 2}\n", "the key 'x' stands twice, line 1"),
        (b"extra: " + b"[" * 60 + b"]" * 60, "nested more than 50 deep"),
        (b"extra: &a {x: *a}\n", "once its aliases are written out"),
        (
            b"a: &a [x, x]\n" + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in b"bcdefgh"),
            "more than 100,000 values",
        ),
        (b"#" * (2**20 + 1), "larger than 1 MiB"),
        (b"model: m\nrate: .nan\n", "rate: expected a number, got nan"),
        (b'base: "a\\0b"\n', "base: expected the path of another YAML file"),
        (b"base: c.yaml\n", "leads back to itself"),
        (b"base: absent.yaml\n", "absent.yaml cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(text)
    with pytest.raises(RecipeError, match="c.yaml|absent.yaml") as error:
        load_config(Settings, path)
    assert message in str(error.value)


def test_whole_numbers_are_those_of_64_bits(file):
    for number in (2**63 - 1, 1 - 2**63):
        assert load_config(Settings, file, [f"limit={number}"]).limit == number
    for number in (2**63, -(2**63)):
        with pytest.raises(RecipeError, match=f"limit: {number} is too large a number"):
            load_config(Settings, file, [f"limit={number}"])


def test_the_word_no_is_a_choice_where_it_is_one(file):
    """YAML 1.1 reads it as false."""
    assert load_config(Settings, file, ["kind=no"]).kind == "no"


def test_an_error_becomes_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as exit_, exit_with_sentence():
        raise RecipeError("wrong")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: wrong\n"
    with pytest.raises(SystemExit) as exit_, exit_with_sentence():
        raise OSError(28, "No space left on device", "out/file")
    assert exit_.value.code == 2
    assert "out/file: No space left on device; free some space" in capsys.readouterr().err


def test_a_bug_of_ours_says_so_and_shows_its_traceback_only_when_asked():
    def broken(how: str = "bug") -> None:
        """Fails."""
        with stage("reading that file", "give another") if how == "stage" else nullcontext():
            {}["absent"]

    def run(*arguments):
        return CliRunner().invoke(cli.app(broken), arguments)

    assert run().exit_code == 1
    assert run().stderr.startswith("error: KeyError ('absent') in test_common_config.py, line ") and "a bug of this program" in run().stderr
    assert len(run().stderr.splitlines()) == 1
    debugged = run("--debug")
    assert debugged.exit_code == 1 and "Traceback" in debugged.stderr and debugged.stderr.endswith(run().stderr)
    staged = run("--how", "stage")
    assert (staged.exit_code, staged.stderr) == (2, "error: reading that file failed ('absent'); give another\n")
    assert "KeyError: 'absent'" in run("--how", "stage", "--debug").stderr
    assert run("--no-such-option").exit_code == 2


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9")],
    ids=["Python", "a GPU", "torch"],
)
def test_memory_that_does_not_suffice_is_no_bug(error):
    def greedy() -> None:
        """Asks for too much."""
        raise error

    done = CliRunner().invoke(cli.app(greedy))
    assert done.exit_code == 2 and done.stderr.startswith("error: memory does not suffice") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("written", [False, True])
def test_ctrl_c_says_what_stays_and_how_to_go_on(written, tmp_path, monkeypatch):
    def training(output: Path, resume: cli.Resume = False) -> None:
        """Trains."""
        raise KeyboardInterrupt

    def conversion(output: Path) -> None:
        """Converts."""
        raise KeyboardInterrupt

    def told(command, *arguments):
        done = CliRunner().invoke(cli.app(command), ["out", *arguments])
        assert done.exit_code == 130
        return done.stderr

    monkeypatch.chdir(tmp_path)
    Path("out" if written else "other").mkdir()
    before = "stopped; out is as it was before; give the same command again\n"
    kept = "stopped; out keeps what was done up to the last checkpoint or measurement, and"
    assert told(conversion) == before
    assert told(training) == (f"{kept} the same command with --resume goes on from there\n" if written else before)
    assert told(training, "--resume") == (f"{kept} the same command goes on from there\n" if written else before)
    monkeypatch.setenv("_HF_LINATTN_STATUS_FILE", str(tmp_path / "status"))
    assert told(training) == ""  # whoever started it says so


def test_a_staged_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(KeyError), staged_directory(target, "test") as aside:
        write_text(aside / "x", "1")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with staged_directory(target, "test") as aside:
        write_text(aside / "x", "1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    with pytest.raises(RecipeError, match="exists already"), staged_directory(target, "test"):
        pass
    with pytest.raises(KeyError), staged_directory(target, "test", overwrite=True) as aside:
        raise KeyError
    assert (target / "x").read_text() == "1"
    with staged_directory(target, "test", overwrite=True) as aside:
        write_text(aside / "y", "2")
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "y", ".hf_linattn.json"}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n  "x": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_place_of_a_bug_is_a_line_of_our_own(monkeypatch):
    """In a checkout its environment's libraries may lie below it; a wheel's files lie among the libraries."""
    monkeypatch.setattr(errors, "_ROOT", Path("/home/me/checkout"))
    assert errors._is_ours(Path("/home/me/checkout/recipes/common/cli.py"))
    assert not errors._is_ours(Path("/home/me/checkout/.venv/lib/python3.11/site-packages/torch/nn/modules/module.py"))
    assert not errors._is_ours(Path("/usr/lib/python3.11/json/decoder.py"))
    monkeypatch.setattr(errors, "_ROOT", Path("/lib/site-packages/hf_linattn"))
    assert errors._is_ours(Path("/lib/site-packages/hf_linattn/convert/linearize.py"))
    assert not errors._is_ours(Path("/lib/site-packages/torch/nn/modules/module.py"))


def test_aliases_count_as_often_as_they_stand(monkeypatch):
    monkeypatch.setattr(reading, "MOST_YAML_VALUES", 11)
    most = "a: &x [1, 2]\nb: [*x, *x]\n"
    assert reading.parse_yaml(most.replace("[*x, *x]", "[*x, 3]"), "x") == {"a": [1, 2], "b": [[1, 2], 3]}
    with pytest.raises(RecipeError, match="more than 11 values"):
        reading.parse_yaml(most, "x")


@pytest.mark.parametrize("parse", [reading.parse_yaml, reading.parse_json])
def test_as_deep_as_is_told_and_no_deeper(parse):
    deepest = "[" * (reading.DEEPEST - 1) + "1" + "]" * (reading.DEEPEST - 1)
    parse(deepest, "x")
    with pytest.raises(RecipeError, match=f"more than {reading.DEEPEST} deep"):
        parse(f"[{deepest}]", "x")
