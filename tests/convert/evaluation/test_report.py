"""The tables and the page, of figures that are known."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from convert.card import with_evaluation, without_evaluation
from convert.evaluate import _show
from convert.evaluation.curves import Curves, read_curves
from convert.evaluation.options import EvaluationOptions
from convert.evaluation.report import write_report
from convert.evaluation.tables import above_teacher, all_tables, card_section
from convert.stages.result import _card as trained_card
from recipes.common import cli

WHERE = {"device": "a device", "torch": "2", "transformers": "5", "dtype": "float32"}


def found(nats: list[float], right: float, score: float, size: int, kl: float | None = None, **model: Any) -> dict[str, Any]:
    loss = {"text": "held_out.txt", "nats": sum(nats) / len(nats), "row_nats": nats}
    near = {} if kl is None else {"kl": kl, "agreement": 0.875}
    spans = [{"from": low, "to": high, "nats": nats[0] + low / 64} for low, high in ((0, 64), (64, 128))]
    at = {"right": right, "right_error": 0.01, "hits": [1, 0]}
    said = {"attention": "softmax", "positions": 64, "trained_tokens": None, "learned": {}, **model}
    sizes = [{"length": length, "cache_bytes": size if kl else size * length, "ms": 2.5} for length in (100, 200)]
    return {
        "model": said | WHERE,
        "loss-0-128": {**loss, **near, "by_position": spans, **WHERE},
        "recall-needle": {"by_distance": {"40": at, "400": {**at, "right": right / 2}}, **WHERE},
        "costs": {"by_length": sizes, **WHERE},
        "task-piqa": {"score": score, "score_error": 0.01, "metric": "acc", "examples": 50, "lm_eval": "0.4.13", **WHERE},
    }


RESULTS = {
    "teacher": found([2.0, 4.0], 0.8, 0.5, 10),
    "a|<b>": found([2.5, 4.1], 0.4, 0.45, 1500, kl=0.25, trained_tokens=1_000_000, learned={"log_decay": [(0, [-0.5, -0.01])]}),
}


def test_what_a_student_keeps_and_costs() -> None:
    students = all_tables(RESULTS)[0].cells
    row = dict(zip(students[0], students[2], strict=True))
    assert row["tokens trained"] == "1,000,000" and row["KL"] == "0.250" and row["same likeliest token"] == "87.5%"
    assert row["loss above the teacher's: held_out.txt, 128 tokens"] == "+0.300 ± 0.200"
    assert row["needle, share of the teacher's at 40 / 400"] == "0.50 / 0.50" and row["tasks kept"] == "90.0%"
    assert row["cache bytes"] == "1,500 at 200" and row["smaller cache from"] == "150 tokens"
    teacher = dict(zip(students[0], students[1], strict=True))
    assert teacher["needle, share of the teacher's at 40 / 400"] == "0.80 / 0.40" and teacher["smaller cache from"] == ""


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_no_number_is_cut_on_the_screen(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _show(cli.console(), RESULTS)
    shown = capsys.readouterr().out
    there = set(re.split(r"[\s│┃]+", shown))
    assert " ".join(shown.split()).count("Positions from 64 on are beyond those the teacher was made for.") == 2
    assert {word for table in all_tables(RESULTS) for row in table.cells for cell in row for word in cell.split()} <= there
    assert max(map(len, shown.splitlines())) <= columns


def test_differences_are_taken_row_by_row() -> None:
    mean, error = above_teacher(RESULTS["a|<b>"]["loss-0-128"], RESULTS["teacher"]["loss-0-128"])
    assert mean == pytest.approx(0.3) and error == pytest.approx(0.2)


def test_the_other_tables() -> None:
    by_title = {table.title: table for table in all_tables(RESULTS)}
    position = by_title["Loss by position: held_out.txt, 128 tokens"]
    assert position.cells == [["model", "0-63", "64-127"], ["teacher", "2.000", "3.000"], ["a|<b>", "+0.500", "+0.500"]]
    assert "from 64 on are beyond those the teacher was made for" in position.note
    assert by_title["Recall: needle"].cells[2] == ["a|<b>", "0.40 ± 0.01 (50%)", "0.20 ± 0.01 (50%)"]
    assert by_title["Tasks"].cells[2] == ["a|<b>", "45.0 ± 1.0", "45.00"]
    assert by_title["Generating, one sequence"].cells[1] == ["teacher", "1,000", "2,000", "2.50", "2.50"]
    few = {name: {key: value for key, value in one.items() if key in ("model", "loss-0-128")} for name, one in RESULTS.items()}
    assert [table.title for table in all_tables(few)] == ["Students", "Loss by position: held_out.txt, 128 tokens"]


def test_a_table_has_a_column_or_is_left_out() -> None:
    one: dict[str, dict[str, Any]] = {}
    for name, of in RESULTS.items():
        loss, costs = {**of["loss-0-128"]}, of["costs"]["by_length"][:1]
        loss["by_position"], by_distance = loss["by_position"][:1], {"40": of["recall-needle"]["by_distance"]["40"]}
        one[name] = {
            "model": of["model"], "loss-0-128": loss, "costs": {**of["costs"], "by_length": costs},
            "recall-needle": {"by_distance": by_distance}, "recall-key-value": {"by_distance": {}},
        }  # fmt: skip
    by_title = {table.title: table.cells for table in all_tables(one)}
    assert list(by_title) == ["Students", "Loss by position: held_out.txt, 128 tokens", "Recall: needle", "Generating, one sequence"]
    assert by_title["Recall: needle"] == [["model", "40 tokens"], ["teacher", "0.80 ± 0.01"], ["a|<b>", "0.40 ± 0.01 (50%)"]]
    assert by_title["Loss by position: held_out.txt, 128 tokens"][0] == ["model", "0-63"]


def test_what_tells_nothing_is_left_open() -> None:
    """A teacher that recalls nothing has no shares, and one of unknown or enough positions none beyond them."""
    for positions, beyond in ((None, False), (128, False), (127, True)):
        weak = found([2.0, 4.0], 0.0, 0.0, 10, positions=positions)
        results = {"teacher": weak, "b": found([2.0, 4.0], 0.2, 0.0, 2000, kl=0.5)}
        by_title = {table.title: table for table in all_tables(results)}
        students = [dict(zip(by_title["Students"].cells[0], row, strict=True)) for row in by_title["Students"].cells[1:]]
        assert students[1]["needle, share of the teacher's at 40 / 400"] == "- / -" and "tasks kept" not in students[0]
        assert "tokens trained" not in students[0] and students[1]["smaller cache from"] == "200 tokens"
        assert by_title["Recall: needle"].cells[1:] == [
            ["teacher", "0.00 ± 0.01", "0.00 ± 0.01"],
            ["b", "0.20 ± 0.01", "0.10 ± 0.01"],
        ]
        assert "2 prompts a cell" in by_title["Recall: needle"].note and "piqa 50." in by_title["Tasks"].note
        for title in ("Students", "Loss by position: held_out.txt, 128 tokens"):
            assert ("are beyond those" in by_title[title].note) == beyond
        assert by_title["Loss by position: held_out.txt, 128 tokens"].note.startswith("Nats a token")


class Page(HTMLParser):
    """What stands in a page, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.notes = 0
        self.sources: list[str] = []
        self.headings: list[str] = []
        self.blocks: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [tag] * (tag not in ("meta", "img"))
        self.notes += ("class", "note") in attrs
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        self.headings += [data] * (self.open[-1:] == ["th"])
        self.blocks += [(self.open[-1], data)] if self.open[-1:] and self.open[-1] in ("h1", "h2", "p", "pre", "title") else []


def test_the_page_holds_everything(tmp_path: Path) -> None:
    curves = Curves({"a": {"kl": [(0, 1.0), (10**6, 0.5)]}}, {"a": ([1.0, 1.0], [0.1, 0.2])})
    layers = [{"layer": n, "kl": 0.1, "key_nats": 1.0 + n, "hits": 0.5} for n in range(3)]
    ranking = {"layers": layers, "teacher": {"kl": 0.0, "key_nats": 0.5, "hits": 0.75}, "chosen": [2]}
    (tmp_path / "report").mkdir()
    write_report(tmp_path / "report", RESULTS, curves, ranking, ["python -m convert.evaluate a"])
    pictures = {"loss-0-128.png", "recall.png", "training-kl.png", "layers.png", "ranking.png", "learned-1.png"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == pictures | {"report.md", "index.html"}
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(f"({name})" in text for name in pictures) and "a\\|<b>" in text and "python -m convert.evaluate a" in text
    assert "| 2 | 0.100 | 3.000 | 0.50 | yes |" in text and "Measured on a device, with PyTorch 2" in text
    page = Page()
    page.feed((tmp_path / "report" / "index.html").read_text())
    assert page.open == [] and "Evaluation: " + ", ".join(list(RESULTS)[1:]) in page.text and len(page.sources) == len(pictures)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    said = {tag: [text for kind, text in page.blocks if kind == tag] for tag, _ in page.blocks}
    assert said["title"] == said["h1"] == ["Evaluation: a|<b>"] and said["pre"] == ["python -m convert.evaluate a"]
    assert said["h2"][0] == "Students" and said["h2"][-2:] == ["Layers, one at a time under a window", "Commands"]
    assert said["p"][0].startswith("Measured on a device") and "By convert.select_layers, on text and keys of its own." in said["p"]
    assert page.notes == len(pictures) + sum(bool(table.note) for table in all_tables(RESULTS)) + 1
    assert page.headings[:2] == ["model", "attention"] and not {"teacher", "a|<b>"} & set(page.headings)


def test_the_card_takes_the_tables_and_takes_them_again() -> None:
    section = card_section(RESULTS, "a|<b>")
    assert "Students" in section and "+0.300 ± 0.200" in section
    plain = "# A model\n\nHow well it predicts now has not been measured.\n"
    card = with_evaluation(plain, section)
    assert card.startswith("# A model\n\nHow well it predicts now is told below.\n\n<!--") and with_evaluation(card, section) == card
    later = card + "\n## More\n"
    assert "Students" not in with_evaluation(later, "new") and with_evaluation(later, "new").endswith("end -->\n\n## More\n")
    stage = {"stage": "convert.distill", "options": {"teacher": "t"}, "tokens": 1, "steps": 1}
    assert "Students" not in trained_card(card, [stage]) and "`convert.distill`" in trained_card(card, [stage])
    assert without_evaluation(card) == plain and without_evaluation(later) == plain + "\n## More\n"


def test_curves_stand_beside_a_runs_model(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"step": 0, "valid_kl": 2.0, "valid_layer_errors": [1.0, 1.0]}]
    records += [{"step": 5, "tokens": 500, "loss": 1.0}, {"step": 10, "tokens": 1000, "loss": 0.5}]
    records += [{"step": 10, "valid_kl": 1.0, "valid_layer_errors": [0.5, 0.25]}]
    for name in ("run", "other"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "text").write_text("text")
    options = EvaluationOptions(
        models=(str(tmp_path / "run" / "model"),),
        teacher=str(tmp_path / "run"),
        data=(tmp_path / "text",),
        runs=(f"transfer={tmp_path / 'other'}",),
    )
    curves = read_curves(options)
    assert curves.by_tokens == {name: {"kl": [(0, 2.0), (1000, 1.0)]} for name in ("transfer", "run")}
    assert curves.by_layer["run"] == ([1.0, 1.0], [0.5, 0.25])
    # a run that has not come to a first step tells of no tokens, and one line that is broken off of no layers
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 0, "valid_kl": 2.0, "valid_layer_errors": []}) + "\n")
    curves = read_curves(options)
    assert set(curves.by_tokens) == {"transfer"} and set(curves.by_layer) == {"transfer"}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 4, "tokens": 8}) + "\n")
    assert set(read_curves(options).by_tokens) == {"transfer"}
