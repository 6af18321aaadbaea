"""Prompts, and recall of models that are known to recall or not to."""

from __future__ import annotations

import hashlib
import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_models import byte_model, byte_tokenizer

from convert.errors import ConversionError
from convert.evaluation.options import RECALL
from convert.evaluation.prompts import Prompt, Prompts
from convert.evaluation.recall import generated, is_answer, measure_recall

DIGESTS = ("8a7f1238953da787", "45106bab6498a7d3", "034d0771b3179c81", "3632653ad19fe9ae")


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (3000, 5), generator=generator).tolist()
    path = tmp_path_factory.mktemp("filler") / "filler.txt"
    path.write_text(" ".join(bytes(word).decode() for word in letters))
    return path


class Copier:
    """Finds its last tokens again among those before, no further back than it sees, and goes on as it went on there."""

    device = torch.device("cpu")

    def __init__(self, sees: int = 10**9, copies: int = 10**9) -> None:
        self.sees, self.copies = sees, copies

    def generate(self, ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any) -> torch.Tensor:
        return torch.tensor([row + self._after(row, generation_config.max_new_tokens) for row in ids.tolist()])

    def _after(self, row: list[int], tokens: int) -> list[int]:
        for size in (24, 7):
            for at in range(len(row) - size - 1, max(len(row) - self.sees, 0), -1):
                if row[at : at + size] == row[-size:]:
                    return (row[at + size :][: min(tokens, self.copies)] + [1] * tokens)[:tokens]
        return [1] * tokens


@pytest.mark.parametrize("kind", RECALL)
@pytest.mark.parametrize("distance", [80, 300])
def test_prompts_hold_the_answer_once_and_at_its_distance(kind: str, distance: int, filler: Path) -> None:
    tokenizer = byte_tokenizer()
    maker = Prompts(filler, tokenizer, 512)
    made = maker.make(kind, distance, 20)
    assert {len(prompt.ids) for prompt in made} == {512} and maker.length(1900) == 2048
    assert len({prompt.answer for prompt in made}) > 15  # words may come twice
    for prompt in made:
        text = tokenizer.decode(prompt.ids[1:])
        said = tokenizer.decode(prompt.ids[1 : prompt.place])
        question = text[text.rindex("\n") :]
        assert said.endswith(prompt.answer) and said.count(question) == 1 and text.count(question) == 2
        assert text.count(f"{question} {prompt.answer}") == 1
        assert len(prompt.ids) - prompt.place == distance
    signs = {
        "needle": ("The number written on", 2),
        "one-of-four": ("The number written on", 5),
        "key-value": (":", 9),
        "associative": (" ->", 9),
    }
    sign, times = signs[kind]
    assert all(tokenizer.decode(prompt.ids).count(sign) == times for prompt in made)
    assert made == Prompts(filler, tokenizer, 512).make(kind, distance, 20)
    assert made[0] != Prompts(filler, tokenizer, 512, seed=1).make(kind, distance, 1)[0]


@pytest.mark.parametrize(("kind", "digest"), list(zip(RECALL, DIGESTS, strict=True)))
def test_a_seed_gives_the_same_prompts_in_every_version(kind: str, digest: str, filler: Path) -> None:
    """So that figures of one version can be held against those of another."""
    made = [Prompts(filler, byte_tokenizer(), 300, seed=3, from_the_end=end).make(kind, 170, 4) for end in (False, True)]
    assert {len(prompt.ids) for prompt in made[0]} == {384}
    assert hashlib.sha256(repr(made).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("kind", RECALL)
def test_a_model_that_copies_recalls_all_and_one_under_a_window_what_is_in_it(kind: str, filler: Path) -> None:
    tokenizer = byte_tokenizer()
    made = {distance: Prompts(filler, tokenizer, 512).make(kind, distance, 10) for distance in (80, 300)}
    whole, near, first = Copier(), Copier(sees=150), Copier(copies=3)
    for distance, inside in ((80, 1.0), (300, 0.0)):
        assert measure_recall(whole, tokenizer, made[distance], 4)["right"] == 1
        assert measure_recall(near, tokenizer, made[distance], 4)["right"] == inside
        assert measure_recall(first, tokenizer, made[distance], 4)["right"] == 0  # of the key the first digits alone


def test_generated_is_greedy_and_equal_alone_or_in_a_batch() -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    ids = torch.randint(1, 257, (3, 20), generator=torch.Generator().manual_seed(0))
    together = generated(model, tokenizer, ids, 5)
    assert together == [generated(model, tokenizer, row[None], 5)[0] for row in ids]
    row = ids[:1]
    for _ in range(5):
        row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
    assert together[0] == tokenizer.decode(row[0, 20:], skip_special_tokens=True)


def test_the_error_and_what_is_an_answer() -> None:
    tokenizer = byte_tokenizer()
    model = SimpleNamespace(device="cpu", generate=lambda ids, **_: torch.cat([ids, ids], 1))
    prompts = [
        Prompt(tokenizer(f" {text}", add_special_tokens=False)["input_ids"], "12345", 0) for text in ("12345", "12345", "12345", "99999")
    ]
    found = measure_recall(model, tokenizer, prompts, 3)
    assert found["right"] == 0.75 and found["hits"] == [1, 1, 1, 0] and found["right_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    asked = SimpleNamespace(device="cpu", asked=[])

    def generate(ids: torch.Tensor, generation_config: Any, **_: Any) -> torch.Tensor:  # the start token, then the answer
        asked.asked.append((generation_config.max_new_tokens, len(ids)))
        return torch.cat([ids, torch.zeros_like(ids[:, :1]), ids], 1)

    asked.generate = generate
    found = measure_recall(asked, tokenizer, prompts, 3)
    assert found["hits"] == [1, 1, 1, 0] and asked.asked == [(8, 3), (8, 1)]  # a blank, five digits, and two tokens more
    assert found["answers"] == [f" {text}" for text in ("12345", "12345", "12345", "99999")]
    assert is_answer(" 12345.", "12345") and is_answer("12345", "12345") and is_answer("\n lamp,", "lamp")
    assert not is_answer("123456", "12345") and not is_answer("lamps", "lamp") and not is_answer("a lamp", "lamp")


def test_what_just_fits_is_made(filler: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    maker = Prompts(filler, tokenizer, 256)
    assert tokenizer.decode(maker.make("key-value", 9, 1)[0].ids[-9:]).startswith(".\n\n")  # the end of a line, and the question at once
    with pytest.raises(ConversionError, match="--distances names 8, and the question alone takes 9 tokens"):
        maker.make("key-value", 8, 1)
    remark = [1] * 10
    assert maker._filled(random.Random(0), 10, [remark]) == remark
    with pytest.raises(ConversionError, match="by 1 tokens"):
        maker._filled(random.Random(0), 9, [remark])
    words = [f"word{chr(97 + index)}" for index in range(16)]
    for text, said in (("x" * 257, ""), ("x" * 256, "has 256 tokens, too few to hide keys in prompts of 256")):
        (tmp_path / "text").write_text(text)
        with nullcontext() if not said else pytest.raises(ConversionError, match=said):
            Prompts(tmp_path / "text", tokenizer, 256).make("key-value", 60, 1)
    for count in (16, 15):
        (tmp_path / "text").write_text(" ".join(words[:count]) * 9)
        with nullcontext() if count == 16 else pytest.raises(ConversionError, match="has 15 different words, too few for pairs"):
            Prompts(tmp_path / "text", tokenizer, 256).make("associative", 60, 1)


def test_what_does_not_fit_is_refused(filler: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ConversionError, match="--distances names 20, and the question alone takes"):
        Prompts(filler, tokenizer, 256).make("needle", 20, 1)
    (tmp_path / "short").write_text("a few words")
    with pytest.raises(ConversionError, match="short has 11 tokens, too few to hide keys in prompts of 256"):
        Prompts(tmp_path / "short", tokenizer, 256).make("needle", 60, 1)
    (tmp_path / "same").write_text("same words here " * 300)
    with pytest.raises(ConversionError, match="same has 3 different words, too few for pairs"):
        Prompts(tmp_path / "same", tokenizer, 256).make("associative", 60, 1)
    with pytest.raises(ConversionError, match="--recall-length is too small for all remarks"):
        Prompts(filler, tokenizer, 64).make("one-of-four", 90, 1)
