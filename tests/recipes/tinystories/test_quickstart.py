"""The main job from end to end, very small; and its grammar of stories."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from typer.testing import CliRunner

from recipes.common import cli
from recipes.common.errors import RecipeError
from recipes.common.files import staged_directory
from recipes.quickstart import __main__ as quickstart_module
from recipes.quickstart.__main__ import Quickstart, main
from recipes.quickstart.corpus import COLOURS, stories


def test_stories_are_the_same_for_a_seed_and_differ_otherwise():
    some = list(stories(300, seed=5))
    assert some == list(stories(300, seed=5))
    assert some[:100] == list(stories(100, seed=5))
    assert len(set(some)) > 295
    assert not set(some) & set(stories(300, seed=6))
    assert all(60 < len(story.split()) < 220 and "{" not in story for story in some)


def test_a_story_comes_back_to_what_it_began_with():
    asked = [story for story in stories(300) if "The bear came with the" in story]
    assert asked
    for story in asked:
        colour = story.split("came with the ")[1].split()[0]
        assert colour in COLOURS
        assert story.count(colour) > 1


def test_the_whole_job(tmp_path, monkeypatch):
    def run_here(self, module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as exit_:
            assert not exit_.code, (module, arguments)

    monkeypatch.setattr(Quickstart, "call", run_here)
    main(model=None, data=None, out=tmp_path, scale=0.005)
    out = tmp_path / "quickstart"
    report = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert [x["name"] for x in report["models"]] == ["teacher", "window alone", "swapped", "fine-tuned"]
    linear = "window 64 + 4, gate per token, beside quadratic with decay per key head, temperature from 2.0"
    assert [x["attention"] for x in report["models"]] == ["softmax", "window 64 + 4", linear, linear]
    assert (out / "evaluation" / "evaluation.png").exists()


def commands(monkeypatch, quickstart) -> list[str]:
    """What a quickstart would run, in order."""
    asked: list[str] = []
    monkeypatch.setattr(quickstart, "call", lambda module, *arguments: asked.append(" ".join([module, *arguments])))
    monkeypatch.setattr(quickstart, "make_corpus", lambda: asked.append("make_corpus"))
    quickstart.run()
    return asked


def told(capsys, out) -> tuple[bool, bool]:
    """Whether it was said where the results are, and how a real model did by the same commands."""
    said = capsys.readouterr().out
    assert "Interrupted, the same command goes on where it was." in " ".join(said.split()) and "(gate per token)" in " ".join(said.split())
    text = said.replace("\n", "")
    places = f"table: {out}/evaluation/evaluation.md", f"picture: {out}/evaluation/evaluation.png", f"model: {out}/tuned/model"
    real = "A real language model by the same commands" in text
    assert ("What linear attention saves here is memory." in " ".join(said.split())) == real
    return all(place in text for place in places), real


@pytest.mark.parametrize(("scale", "steps", "held"), [(1.0, (300, 100), 300), (0.5, (150, 50), 150), (4.0, (1200, 400), 300)])
def test_what_the_job_consists_of(scale, steps, held, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    text = f'train_data=["{out}/corpus/stories.txt"] valid_stories={held}'
    configs = Path(quickstart_module.__file__).parent
    assert commands(monkeypatch, Quickstart(None, None, out, scale)) == [
        "make_corpus",
        f"recipes.tinystories.train --config {configs}/teacher.yaml --resume --set output={out}/teacher tokenizer={out}/corpus "
        f"steps={steps[0]} {text}",
        f"convert.linearize {out}/teacher/model {out}/swapped --form window --window 64 --kernel quadratic --decay key_head",
        f"convert.linearize {out}/teacher/model {out}/window --form window --window 64 --beside none",
        f"recipes.tinystories.train --config {configs}/finetune.yaml --resume --set output={out}/tuned model={out}/swapped "
        f"teacher={out}/teacher/model steps={steps[1]} {text}",
        f"recipes.tinystories.evaluate teacher={out}/teacher/model window alone={out}/window swapped={out}/swapped "
        f"fine-tuned={out}/tuned/model --data {out}/corpus/stories.txt --stories {held} --out {out}/evaluation --overwrite",
    ]
    assert told(capsys, out) == (True, True)


@pytest.mark.parametrize(("positions", "length", "batch"), [(256, 256, 16), (4096, 512, 8), (8192, 512, 8), (None, 512, 8)])
def test_what_the_job_of_ones_own_model_consists_of(positions, length, batch, tiny, tmp_path, monkeypatch, capsys):
    out, model = tmp_path / "out", tmp_path / "model"
    model.mkdir()
    config = {"model_type": "llama"} | ({"max_position_embeddings": positions} if positions else {})
    (model / "config.json").write_text(json.dumps(config))
    asked = commands(monkeypatch, Quickstart(model, tiny.text, out, 0.5))
    assert [command.split()[0] for command in asked] == [
        "convert.linearize",
        "convert.linearize",
        "recipes.tinystories.train",
        "recipes.tinystories.evaluate",
    ]
    assert asked[2].endswith(f"steps=75 train_data=[{json.dumps(str(tiny.text))}] valid_stories=250 length={length} batch_size={batch}")
    assert f"teacher={model} window alone={out}/window swapped={out}/swapped" in asked[3] and told(capsys, out) == (True, False)


def test_a_step_that_fails_ends_the_job_with_its_status(tiny, tmp_path, capfd):
    quickstart = Quickstart(tiny.model, tiny.text, tmp_path / "out", 1.0)
    with pytest.raises(SystemExit) as exit_:
        quickstart.call("json.tool", "absent.json")
    assert exit_.value.code == 2
    assert "once that is mended, the same command goes on from there" in " ".join(capfd.readouterr().out.split())


def test_two_in_one_folder_are_refused(tiny, tmp_path):
    at_work = Quickstart(tiny.model, tiny.text, tmp_path / "out", 1.0)
    with at_work.working(), pytest.raises(RecipeError, match="out is being written by another process"):
        Quickstart(tiny.model, tiny.text, tmp_path / "out", 1.0).run()


@pytest.mark.parametrize("flags", [[], ["--debug"]])
def test_debug_is_passed_on(flags, tiny, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("recipes.common.chain.run_to_its_end", lambda command, *_: started.append(command) or 2)
    CliRunner().invoke(cli.app(main), ["--model", str(tiny.model), "--data", str(tiny.text), "--out", str(tmp_path / "out"), *flags])
    assert started and all(("--debug" in command) == bool(flags) for command in started)


def test_what_does_not_go_together_is_refused(tiny, tmp_path):
    with pytest.raises(RecipeError, match="go together"):
        main(model=tiny.model, data=None, out=tmp_path / "out")
    with pytest.raises(RecipeError, match=r"holds no config.json"):
        main(model=tmp_path, data=tiny.text, out=tmp_path / "out")
    with pytest.raises(RecipeError, match="no such file"):
        main(model=tiny.model, data=tmp_path / "absent.txt", out=tmp_path / "out")
    with pytest.raises(RecipeError, match="overlaps the input"):
        main(model=tiny.model, data=tiny.text, out=tiny.model / "out")
    assert not (tmp_path / "out").exists()


def test_another_quickstarts_folder_is_refused_and_ones_own_is_gone_on_with(tiny, tmp_path):
    Quickstart(tiny.model, tiny.text, tmp_path / "out", 1.0)
    Quickstart(tiny.model, tiny.text, tmp_path / "out", 1.0)
    with pytest.raises(RecipeError, match="another model"):
        Quickstart(None, None, tmp_path / "out", 1.0)
    with pytest.raises(RecipeError, match="another scale"):
        Quickstart(tiny.model, tiny.text, tmp_path / "out", 0.5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(RecipeError, match="holds something else"):
        Quickstart(None, None, tmp_path / "mine", 1.0)


def test_a_step_that_is_done_is_not_done_again(tiny, tmp_path):
    quickstart = Quickstart(tiny.model, tiny.text, tmp_path / "out", 1.0)
    done = []
    with staged_directory(tmp_path / "there", "a.command") as place:
        (place / "result").write_text("x")
    quickstart.step("one", tmp_path / "there", lambda: done.append(1))
    assert not done
    (tmp_path / "there" / "result").unlink()
    with pytest.raises(RecipeError, match="result is missing"):
        quickstart.step("one", tmp_path / "there", lambda: done.append(1))
    quickstart.step("two", tmp_path / "absent", lambda: done.append(2))
    assert done == [2]
