"""A softmax model in, a linear-attention model out, in a few minutes on two CPU cores.

    python -m recipes.quickstart [--model DIR --data FILE] [--out DIR]

Without --model it first makes a corpus of short stories and trains a small softmax Llama on it. Then: convert, fine-tune against the
original's predictions with noise dropout, evaluate, generate. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from recipes.common import cli
from recipes.common.errors import RecipeError
from recipes.common.files import check_apart, staged_directory, write_json, write_text
from recipes.common.reading import read_json
from recipes.common.state import check_written
from recipes.quickstart.corpus import MARK, stories

HERE = Path(__file__).parent
COMMAND = "recipes.quickstart"
PROJECT = __package__.removesuffix(COMMAND)  # "hf_linattn." in a wheel, which has all of this below it


def main(
    model: Annotated[Path | None, typer.Option(help="A softmax checkpoint to convert instead of a small one trained here.")] = None,
    data: Annotated[Path | None, typer.Option(help="Its text: stories apart by <|endoftext|>.")] = None,
    out: Annotated[Path, typer.Option(help="Everything goes into quickstart/ or quickstart-MODEL/ in it.")] = Path("out"),
    scale: Annotated[float, typer.Option(help="Multiplies the training steps and the corpus.", min=0.001)] = 1.0,
    debug: cli.Debug = False,
) -> None:
    """Convert a softmax model to linear attention, fine-tune it, and compare the two."""
    if (model is None) != (data is None):
        raise RecipeError("--model and --data go together: a checkpoint and text for it; give both, or neither")
    if model is not None and not (model / "config.json").is_file():
        raise RecipeError(f"{model} holds no config.json, so it is no checkpoint; give the folder of one")
    if data is not None and not data.is_file():
        raise RecipeError(f"{data}: no such file; give a text file of stories apart by {MARK}")
    Quickstart(model, data, out / (f"quickstart-{model.resolve().name}" if model else "quickstart"), scale, debug).run()


class Quickstart:
    """The steps, each of which leaves one folder under `out` that is whole once it is there."""

    def __init__(self, model: Path | None, data: Path | None, out: Path, scale: float, debug: bool = False) -> None:
        self.out, self.scale, self.own, self.debug = out, scale, model is None, debug
        self.teacher = model or out / "teacher" / "model"
        self.text = data or out / "corpus" / "stories.txt"
        check_apart(out, [path for path in (model, data) if path])
        self.console = cli.console()
        self.minutes: dict[str, float] = {}
        asked = {"model": str(model and model.resolve()), "data": str(data and data.resolve()), "scale": scale}
        state = out / "quickstart.json"
        if state.is_file():
            if (old := read_json(state)) != asked:
                if not isinstance(old, dict):
                    raise RecipeError(f"{state} is damaged; choose another place with --out, or remove the folder")
                different = next(key for key in asked if old.get(key) != asked[key])
                raise RecipeError(
                    f"{out} holds a quickstart with another {different} ({old.get(different)}, now {asked[different]}); "
                    "choose another place with --out, or remove the folder"
                )
        elif out.exists() and any(out.iterdir()):
            raise RecipeError(f"{out} exists and holds something else; choose another place with --out")
        else:
            write_json(state, asked)

    def run(self) -> None:
        """Do what is not done yet, and show the comparison."""
        out = self.out
        # The last stories of the text are kept out of every training and are those that the models are compared on.
        held_out = max(20, round((300 if self.own else 500) * min(1.0, self.scale)))
        text = [f"train_data=[{json.dumps(str(self.text))}]", f"valid_stories={held_out}"]
        if self.own:
            self.step("1. Make a corpus and its tokenizer", out / "corpus", self.make_corpus)
            settings = [f"output={out}/teacher", f"tokenizer={out}/corpus", f"steps={self.steps(300)}", *text]
            self.step("2. Train a small softmax Llama", self.teacher, lambda: self.train("teacher", settings))
        self.step("3. Convert it", out / "swapped", lambda: self.call(f"{PROJECT}convert.linearize", str(self.teacher), f"{out}/swapped"))
        tuning = [
            f"output={out}/tuned",
            f"model={out}/swapped",
            f"teacher={self.teacher}",
            f"steps={self.steps(150 if self.own else 250)}",
            *text,
        ]
        if not self.own:
            length = self.length()
            tuning += [f"length={length}", f"batch_size={max(1, 4096 // length)}"]
        self.step("4. Fine-tune it with noise dropout", out / "tuned" / "model", lambda: self.train("finetune", tuning))
        named = [f"teacher={self.teacher}", f"swapped={out}/swapped", f"fine-tuned={out}/tuned/model"]
        options = ["--data", str(self.text), "--stories", str(held_out), "--out", f"{out}/evaluation", "--overwrite"]
        self.step("5. Evaluate and generate", None, lambda: self.call(f"{PROJECT}recipes.tinystories.evaluate", *named, *options))
        for name, minutes in self.minutes.items():
            self.console.print(f"{name}: {minutes:.1f} min")
        places = {"table": "evaluation/evaluation.md", "picture": "evaluation/evaluation.png", "model": "tuned/model"}
        self.console.print("   ".join(f"{what}: {out}/{where}" for what, where in places.items()))

    def train(self, config: str, settings: list[str]) -> None:
        """Run the training script on one of the configs beside this file."""
        self.call(f"{PROJECT}recipes.tinystories.train", "--config", f"{HERE}/{config}.yaml", "--resume", "--set", *settings)

    def step(self, title: str, result: Path | None, work: Callable[[], object]) -> None:
        """Do `work`, which leaves `result`, unless that is there already."""
        self.console.rule(title, align="left")
        if result is not None and result.exists():
            check_written(result, "remove that folder to have it made again", compare=False)
            self.console.print(f"{result} is there already")
            return
        began = time.perf_counter()
        work()
        self.minutes[title] = (time.perf_counter() - began) / 60

    def steps(self, number: int) -> int:
        """`number` of training steps, scaled."""
        return max(1, round(number * self.scale))

    def length(self) -> int:
        """Tokens a sequence: 512, or what the given model has positions for."""
        from recipes.common.checkpoint import read_config  # late, as it imports torch

        config = read_config(self.teacher, str(self.teacher))
        positions = config.get("max_position_embeddings", config.get("n_positions"))
        return min(512, positions) if isinstance(positions, int) and positions > 0 else 512

    def call(self, module: str, *arguments: str) -> None:
        """Run a script of the project as a user would."""
        root = str(HERE.parents[__package__.count(".")])
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        arguments += ("--debug",) * self.debug
        self.console.print(f"python -m {module} {' '.join(arguments)}", style="dim")
        status = subprocess.run([sys.executable, "-m", module, *arguments], env={**os.environ, "PYTHONPATH": paths}).returncode
        if status:
            self.console.print(f"{module} stopped with status {status}; start again to go on from there", style="bold")
            raise SystemExit(2 if status == 2 else 1)

    def make_corpus(self) -> None:
        """corpus/: stories.txt and a byte-level BPE tokenizer of 512 tokens trained on it."""
        from recipes.quickstart.tokenizer import trained_on  # late, as it imports torch

        texts = list(stories(max(400, round(6000 * self.scale))))
        with staged_directory(self.out / "corpus", COMMAND) as place:
            write_text(place / "stories.txt", f"\n{MARK}\n".join(texts) + "\n")
            trained_on(texts).save_pretrained(place)


if __name__ == "__main__":
    cli.run(main)
