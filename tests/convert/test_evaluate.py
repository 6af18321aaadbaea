"""The command: what it stores, that it goes on where it stopped, and what it refuses."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_model, byte_tokenizer
from typer.testing import CliRunner

from convert import evaluate
from convert.card import without_evaluation
from convert.commands import command
from convert.errors import ConversionError
from convert.evaluation.options import EvaluationOptions, chosen, named_model, whole_numbers
from recipes.common import cli
from recipes.common.files import check_target

SHORT = ["--rows", "2", "--length", "32", "--recall", "none", "--decode", "none", "--device", "cpu"]


def run(home: Path, out: Path, *more: str, models: tuple[str, ...] = ("student",), data: str = "text.txt", columns: int = 300) -> Any:
    arguments = [*(str(home / model) for model in models), "--teacher", str(home / "teacher"), "--data", str(home / data)]
    return CliRunner().invoke(cli.app(evaluate.main), [*arguments, "--out", str(out), *SHORT, *more], env={"COLUMNS": str(columns)})


def measured(out: Path) -> dict[str, dict[str, Any]]:
    """What was found, by model and measurement."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(out.glob("measured/*/*.json")):
        stored = json.loads(path.read_text())
        found.setdefault(stored["subject"], {})[path.stem] = stored["found"]
    return found


def test_loss_of_teacher_control_and_student(evaluated: Path, tmp_path: Path) -> None:
    done = run(evaluated, tmp_path / "out", "--window-control", "8")
    assert done.exit_code == 0, done.output
    found = measured(tmp_path / "out")
    assert set(found) == {"teacher", "teacher, window 8 + 4", "student"}
    teacher, control, student = (found[name]["loss-0-32"] for name in ("teacher", "teacher, window 8 + 4", "student"))
    assert "kl" not in teacher and control["kl"] > 0 and student["kl"] > 0 and student["device"].startswith("CPU")
    assert teacher["tokens"] == student["tokens"] == 62
    shown = " ".join(done.stdout.split())
    assert "Students" in shown and "│ attention │ softmax │ softmax, last 8 tokens and first 4, untrained │ linear with decay │" in shown
    assert "Loss by position: text.txt, 32 tokens" in shown and f"│ teacher │ {teacher['nats']:.3f} │" in shown
    assert "report/index.html, report/report.md, measured/" in done.stdout
    page = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "| teacher, window 8 + 4 | softmax, last 8 tokens and first 4, untrained |" in page and "--window-control 8" in page


def test_recall_and_costs(evaluated: Path, tmp_path: Path) -> None:
    asked = ["--recall", "needle,key-value", "--distances", "60,90", "--needles", "3", "--recall-length", "256", "--decode", "8,16"]
    done = run(evaluated, tmp_path / "out", *asked)
    assert done.exit_code == 0, done.output
    found = measured(tmp_path / "out")["student"]
    assert set(found) == {"model", "loss-0-32", "recall-needle", "recall-key-value", "costs"}
    assert set(found["recall-needle"]["by_distance"]) == {"60", "90"} and len(found["recall-needle"]["by_distance"]["60"]["hits"]) == 3
    assert [at["length"] for at in found["costs"]["by_length"]] == [8, 16]
    assert "question alone takes" in run(evaluated, tmp_path / "near", "--recall", "needle", "--distances", "5").stderr


def test_it_goes_on_where_it_stopped(evaluated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(evaluated, out).exit_code == 0
    assert "exists already" in run(evaluated, out).stderr
    before = {path: path.read_bytes() for path in out.glob("measured/*/*.json")}
    lost = next(path for path in before if "student" in str(path) and path.name == "loss-0-32.json")
    lost.unlink()
    done = run(evaluated, out, "--resume", "--length", "32,64", columns=12)
    assert done.stdout.endswith(f"written to {out}: report/index.html, report/report.md, measured/\n")
    assert done.exit_code == 0, done.output
    assert "teacher: loss-0-32\n" not in done.stdout and "student: loss-0-32\n" in done.stdout and "student: loss-0-64\n" in done.stdout
    assert json.loads(lost.read_text())["found"] == json.loads(before[lost])["found"]
    for path in set(before) - {lost}:
        assert path.read_bytes() == before[path]
    assert "with rows = 2, and now it is 3; resume with the same" in run(evaluated, out, "--resume", "--rows", "3").stderr
    assert run(evaluated, out, "--overwrite", "--rows", "3").exit_code == 0


def test_a_model_that_changed_is_not_taken_for_the_one_measured(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "student", tmp_path / "student")
    shutil.copytree(evaluated / "teacher", tmp_path / "teacher")
    shutil.copy(evaluated / "text.txt", tmp_path)
    assert run(tmp_path, tmp_path / "out").exit_code == 0
    byte_model(5).save_pretrained(tmp_path / "student")
    assert "was measured with model =" in run(tmp_path, tmp_path / "out", "--resume").stderr


def test_of_a_stages_run_the_model_is_measured_and_its_curves_are_shown(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "student", tmp_path / "run" / "model")
    records: list[dict[str, Any]] = [{"step": 0, "valid_kl": 2.0}, {"step": 4, "tokens": 400}, {"step": 4, "valid_kl": 1.0}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = run(evaluated, tmp_path / "out", models=(str(tmp_path / "run"),))
    assert done.exit_code == 0, done.output
    assert set(measured(tmp_path / "out")) == {"teacher", "run"} and (tmp_path / "out" / "report" / "training-kl.png").is_file()
    byte_model(5).save_pretrained(tmp_path / "run" / "model")
    assert "was measured with model =" in run(evaluated, tmp_path / "out", "--resume", models=(str(tmp_path / "run"),)).stderr


def test_the_tables_stand_in_the_card_and_the_folder_stays_its_commands(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "student", tmp_path / "student")
    models, card = (str(tmp_path / "student"),), tmp_path / "student" / "README.md"
    before = card.read_text()
    done = run(evaluated, tmp_path / "out", "--card", models=models)
    assert done.exit_code == 0, done.output
    first = card.read_text()
    assert str(card) in done.output.replace("\n", "")
    assert "## Evaluation" in first and "| teacher | softmax |" in first and "has not been measured" not in first
    assert "has not been measured" in before and without_evaluation(first) == before
    assert run(evaluated, tmp_path / "out", "--card", "--resume", models=models).exit_code == 0 and card.read_text() == first
    check_target(tmp_path / "student", "convert.linearize", overwrite=True)
    card.write_text(first + "\nMine.\n")
    assert run(evaluated, tmp_path / "out", "--card", "--resume", models=models).exit_code == 0 and card.read_text().endswith("Mine.\n")
    with pytest.raises(ConversionError, match="holds README.md, not written by convert.linearize or changed since"):
        check_target(tmp_path / "student", "convert.linearize", overwrite=True)
    shutil.copytree(evaluated / "teacher", tmp_path / "other")
    said = run(evaluated, tmp_path / "none", "--card", models=(str(tmp_path / "other"),)).stderr
    assert "--card: no model is a folder that convert or one of its stages wrote" in said


def test_another_vocabulary_or_tokenizer_is_refused(evaluated: Path, tmp_path: Path) -> None:
    byte_model(vocab_size=300).save_pretrained(tmp_path / "more")
    byte_tokenizer().save_pretrained(tmp_path / "more")
    byte_model().save_pretrained(tmp_path / "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["mill"])
    tokenizer.save_pretrained(tmp_path / "other")
    for name, said in {"more": "more has 300 tokens and the teacher 257", "other": "the tokenizer of other is not the teacher's"}.items():
        done = run(evaluated, tmp_path / f"out-{name}", models=(str(tmp_path / name),))
        assert done.exit_code == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--length", "99999"], "too few for a row of 99,999"),
        (["--length", "1"], "--length '1': expected whole numbers from 2"),
        (["--recall", "passkey"], "--recall passkey: unknown; give all, none, or some of needle"),
        (["--tasks", "mmlu"], "--tasks mmlu: unknown"),
        (["--dtype", "int8"], "--dtype int8: expected one of float32"),
        (["--device", "meta"], "--device meta: not usable here"),
        (["--filler", "absent.txt"], "absent.txt: no such file"),
        (["--task-rows", "absent"], "--task-rows absent: no such folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(more: list[str], said: str, evaluated: Path, tmp_path: Path) -> None:
    done = run(evaluated, tmp_path / "out", *more)
    assert done.exit_code == 2 and said in done.stderr and "Traceback" not in done.stderr, done.output


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("there/a=b", ("", "there/a=b")),
        ("one=there/a=b", ("one", "there/a=b")),
        ("one=two=there/a=b", ("one=two", "there/a=b")),
        ("one=hub/id", ("one", "hub/id")),
        ("one=two=hub/id", ("one=two", "hub/id")),
        ("hub/id", ("", "hub/id")),
    ],
)
def test_a_name_and_a_path_may_hold_what_stands_between_them(
    given: str, found: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`linattn run` with such an output gave its models so, and evaluate asked the hub for b."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "a=b").mkdir(parents=True)
    assert named_model(given) == found


def test_rows_have_names_of_their_own(evaluated: Path, tmp_path: Path) -> None:
    student, data = str(evaluated / "student"), (evaluated / "text.txt",)
    twice: dict[str, Any] = {"models": (student, student), "teacher": str(evaluated / "teacher"), "data": data}
    with pytest.raises(ConversionError, match="two models are called student"):
        EvaluationOptions(**twice)
    (tmp_path / "run" / "model").mkdir(parents=True)
    named = EvaluationOptions(**twice | {"models": (f"first={student}", str(tmp_path / "run" / "model"))})
    assert [subject.name for subject in named.subjects()] == ["teacher", "first", "run"]
    teacher = EvaluationOptions(**twice | {"models": (), "teacher": f"softmax={twice['teacher']}"})
    assert [(subject.name, subject.path) for subject in teacher.subjects()] == [("softmax", str(twice["teacher"]))]


def test_the_command_that_is_told_asks_for_the_same(evaluated: Path, tmp_path: Path) -> None:
    for name in ("more text.txt", "layers.json", "run/metrics.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    student, teacher, text = (str(evaluated / name) for name in ("student", "teacher", "text.txt"))
    told: dict[str, Any] = {"models": (f"a b={student}", student), "teacher": teacher, "data": (Path(text), tmp_path / "more text.txt")}
    files = {"filler": Path(text), "ranking": tmp_path / "layers.json", "runs": (str(tmp_path / "run"),), "task_rows": tmp_path}
    numbers = {"rows": 3, "lengths": (32, 64), "windows": (8, 16), "sinks": 0, "distances": (60,), "needles": 5, "recall_length": 128}
    more = {
        "recall": (),
        "tasks": ("piqa", "sciq"),
        "limit": 2,
        "decode": (),
        "batch_tokens": 7,
        "dtype": "float16",
        "seed": 4,
        "card": True,
    }
    got: list[Any] = []
    app = cli.app(command(EvaluationOptions, lambda options, out: got.append((options, out)), evaluate._OUT))
    for given in (told, told | files | numbers | more, told | {"recall": ("needle",), "device": "cpu"}):
        options = EvaluationOptions(**given)
        words = shlex.split(options.commands("some where")[0])
        assert words[:3] == ["python", "-m", "convert.evaluate"]
        done = CliRunner().invoke(app, words[3:])
        assert done.exit_code == 0 and got.pop() == (options, Path("some where")), done.output


def test_lists() -> None:
    assert whole_numbers("1", "--x") == (1,) and whole_numbers(str(2**24), "--x") == (2**24,) and whole_numbers("2", "--x", 2) == (2,)
    for text, low in ((str(2**24 + 1), 1), ("1", 2)):
        with pytest.raises(ConversionError, match=rf"--x '{text}': expected whole numbers from {low} to 16,777,216 with commas"):
            whole_numbers(text, "--x", low)
    assert whole_numbers("512, 128,512", "--x") == (128, 512) and whole_numbers("none", "--x") == ()
    assert chosen("b,a", "--x", ("a", "b", "c")) == ("a", "b") and chosen("all", "--x", ("a", "b")) == ("a", "b")
    for text in ("a", "0", "-1", "1.5", str(2**40)):
        with pytest.raises(ConversionError, match="--x"):
            whole_numbers(text, "--x")
