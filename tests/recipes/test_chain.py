"""A chain of commands: what is there is not made again, another chain's folder is left alone, and what stops it is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from recipes.common.chain import Chain
from recipes.common.errors import RecipeError

REMEDY = "choose another folder"


def chain(out: Path, **asked: object) -> Chain:
    return Chain(out, asked, "trial", REMEDY)


def test_a_command_that_fails_ends_it_and_says_how_to_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        chain(tmp_path / "out").call("recipes.absent", "--no", "matter")
    told = capfd.readouterr().out
    assert ended.value.code == 1 and "python -m recipes.absent --no matter" in told
    assert "recipes.absent stopped with status 1; start again to go on from there" in " ".join(told.split())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_the_working_directory_does_not_stand_before_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a checkout's linattn.py would stand before an installed linattn."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes.py").write_text("raise SystemExit(1)")
    chain(tmp_path / "out").call("recipes.lra.listops", "--help")


def test_what_is_there_is_not_made_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made, work = chain(tmp_path / "out"), []
    made.step("first", None, lambda: work.append(1))
    made.step("first", tmp_path / "absent", lambda: work.append(2))
    made.tell_minutes()
    assert work == [1, 2] and "first: 0.0 min" in capfd.readouterr().out


def test_another_chains_folder_is_refused(tmp_path: Path) -> None:
    chain(tmp_path / "out", model="a", steps=3)
    chain(tmp_path / "out", model="a", steps=3)
    with pytest.raises(RecipeError, match=rf"a trial with another steps \(3, now 4\); {REMEDY}, or remove the folder"):
        chain(tmp_path / "out", model="a", steps=4)
    (tmp_path / "out" / "trial.json").write_text("[1]")
    with pytest.raises(RecipeError, match="is damaged"):
        chain(tmp_path / "out", model="a", steps=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    with pytest.raises(RecipeError, match=f"holds something else; {REMEDY}"):
        chain(tmp_path / "mine")
