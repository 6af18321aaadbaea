"""What lies under every output: names that change places, locks, marks and plain files; where a file system has less than others too."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from recipes.common import files
from recipes.common.errors import RecipeError
from recipes.common.files import discard, rewrite, staged_directory, write_json, write_text
from recipes.common.lock import LOCK, lock
from recipes.common.marks import read_mark
from recipes.common.state import check_written
from recipes.common.swap import exchange


def written(place: Path, **texts: str) -> Path:
    with staged_directory(place, "test", overwrite=True) as aside:
        for name, text in texts.items():
            write_text(aside / name, text)
    return place


def test_two_names_change_places(tmp_path: Path) -> None:
    one, other = written(tmp_path / "one", a="1"), written(tmp_path / "other", b="2")
    assert exchange(one, other) and (one / "b").read_text() == "2" and (other / "a").read_text() == "1"
    with pytest.raises(FileNotFoundError, match="absent"):
        exchange(one, tmp_path / "absent")


def test_where_they_cannot_the_old_steps_aside_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    place = written(tmp_path / "out", a="1")
    assert (written(place, a="2") / "a").read_text() == "2" and [path.name for path in tmp_path.iterdir()] == ["out"]
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(RecipeError, match="writing .*out failed .*No space left.*; free some space"):
        written(place, a="3")
    assert (place / "a").read_text() == "2" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_locked_holds_a_file_that_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def of_files_alone(descriptor: int, operation: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, "folders are not locked here")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_files_alone)
    held = lock(tmp_path)
    assert held is not None and (tmp_path / LOCK).is_file() and lock(tmp_path) is None
    held.release()
    again = lock(tmp_path)
    assert again is not None
    again.release()


def test_files_are_written_as_they_are_called_and_said(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "folder" / "a.json", {"höher": ["Ω"]})
    text = (tmp_path / "new" / "folder" / "a.json").read_text(encoding="utf-8")
    assert "höher" in text and "Ω" in text and text.endswith("}\n") and json.loads(text) == {"höher": ["Ω"]}
    write_text(tmp_path / "new" / "folder" / "a.json", "again")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["a.json"]


def test_a_file_that_is_rewritten_stays_its_commands_unless_somebody_changed_it(tmp_path: Path) -> None:
    place = written(tmp_path / "out", a="1", b="1")
    rewrite(place / "a", "2")
    check_written(place, "start anew")
    (place / "a").write_text("mine")
    rewrite(place / "a", "3")
    with pytest.raises(RecipeError, match="a is not as it was written; start anew"):
        check_written(place, "start anew")
    check_written(place, "start anew", compare=False)
    (place / "b").unlink()
    with pytest.raises(RecipeError, match="b is missing; start anew"):
        check_written(place, "start anew", compare=False)


def test_what_we_did_not_write_stays_and_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = written(tmp_path / "out", a="1")
    (place / "thesis").write_text("years of work")
    discard(place)
    assert [path.name for path in place.iterdir() if not path.name.startswith(".")] == ["thesis"] and read_mark(place) is not None
    assert capfd.readouterr().err == f"note: {place} holds what test did not write, such as ['thesis']; it was left there\n"
    (place / "thesis").unlink()
    discard(place)
    discard(place)
    assert not place.exists() and capfd.readouterr().err == ""
