"""Stories: none comes twice, none is in both parts."""

from __future__ import annotations

import pytest

from recipes.common.documents import Source
from recipes.common.errors import RecipeError
from recipes.tinystories.data import Stories, first_words, last_stories

MARK = "<|endoftext|>"


def test_no_story_comes_twice_and_none_is_in_both_parts(tmp_path):
    texts = [f"story {n}" for n in range(30)]
    one, other = Source(str(tmp_path / "a.txt")), Source(str(tmp_path / "b.txt"))
    (tmp_path / "a.txt").write_text(MARK.join(texts[:20] + texts[:5]))
    (tmp_path / "b.txt").write_text(MARK.join(texts[15:]))
    stories = Stories([one, other], held_out=4)
    assert list(stories.train()) == texts[:26]
    assert list(stories.valid()) == texts[26:]
    stories = Stories([one], [other], held_out=4)
    assert list(stories.train()) == texts[:15]
    assert list(stories.valid()) == texts[15:]


def test_a_changed_file_has_another_key(tmp_path):
    stories = Stories([Source(str(tmp_path / "a.txt"))], held_out=1)
    (tmp_path / "a.txt").write_text(MARK.join("abc"))
    key = stories.key("train")
    assert stories.key("valid") != key == stories.key("train")
    (tmp_path / "a.txt").write_text(MARK.join("xyzw"))
    assert stories.key("train") != key
    assert list(stories.train()) == ["x", "y", "z"]


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    for part in ("train", "valid"):
        with pytest.raises(RecipeError, match="1 stories are too few to hold 5 out"):
            list(getattr(Stories([Source(str(tmp_path / "a.txt"))], held_out=5), part)())


def test_the_last_stories_and_first_words(tmp_path):
    (tmp_path / "a.txt").write_text(MARK.join(["a", "b", "c d e", "a", "f g"]))
    last = last_stories([Source(str(tmp_path / "a.txt"))], 2)
    assert last == ["c d e", "f g"]
    assert first_words(last, 5, 2) == ["c d", "f g"]
