"""A softmax model in, a linear-attention model out, in some eight minutes on two CPU cores.

    python -m recipes.quickstart [--model DIR --data FILE] [--out DIR]
    python -m recipes.quickstart --model smollm2 [--data FILE] [--out DIR]

Without --model it first makes a corpus of short stories and trains a small softmax Llama on it. Then: convert, fine-tune against the
original's predictions with noise dropout, evaluate, generate. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from recipes.common import cli
from recipes.common.chain import PROJECT, Chain
from recipes.common.errors import RecipeError
from recipes.common.files import check_apart, staged_directory, write_text
from recipes.quickstart import smollm2
from recipes.quickstart.corpus import MARK, stories

HERE = Path(__file__).parent
COMMAND = "recipes.quickstart"
WINDOW = ("--form", "window", "--window", "64")
FORM = (*WINDOW, "--kernel", "quadratic", "--decay", "key_head")
"""The attention of the converted model: softmax over the last tokens, and the second degree over all that lie before them."""
KEY = (
    "Its settings: softmax sees the last 64 tokens and the first 4 (window 64 + 4). All between weigh a + b s + c s^2 (quadratic), s being "
    "the cosine of query and key times a learned temperature, which starts at 2, and less the farther back they are, at a learned rate "
    "(decay per key head). A learned gate mixes the two (gate per token)."
)
"""What the words mean by which such a model is described."""
CONTROL = "The row to beat is the window alone, untrained: the same softmax over the last 64 tokens and the first 4, without all between."
SHORT = (
    "A teacher of a few minutes looks so little beyond 64 tokens that the window alone may do as well: its loss does not tell what linear "
    "attention keeps. A real model's does."
)
"""What the losses of so small a teacher do not show."""
SMALL = (
    "A token of so small a model takes longer than the teacher's: the many small operations of a step outweigh attention to 2,048 tokens. "
    "What linear attention saves here is memory."
)
"""What the times of generating show, and a large model's do not."""


def main(
    model: Annotated[
        str | None, typer.Option(help="A softmax checkpoint to convert instead of a small one trained here, or smollm2, which is fetched.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Its text: stories apart by <|endoftext|>.")] = None,
    out: Annotated[Path, typer.Option(help="Everything goes into quickstart/ or quickstart-MODEL/ in it.")] = Path("out"),
    scale: Annotated[float, typer.Option(help="Multiplies the training steps and the corpus.", min=0.001)] = 1.0,
    debug: cli.Debug = False,
) -> None:
    """Convert a softmax model to linear attention, fine-tune it, and compare the two."""
    if data is not None and not data.is_file():
        raise RecipeError(f"{data}: no such file; give a text file of stories apart by {MARK}")
    if model == smollm2.NAME:
        smollm2.SmolLM2(data, out / f"quickstart-{model}", scale, debug).run()
        return
    if (model is None) != (data is None):
        raise RecipeError("--model and --data (MODEL and DATA of make) go together: a checkpoint and text for it; give both, or neither")
    folder = None if model is None else Path(model)
    if folder is not None and not (folder / "config.json").is_file():
        raise RecipeError(f"{folder} holds no config.json, so it is no checkpoint; give the folder of one, or {smollm2.NAME}")
    Quickstart(folder, data, out / (f"quickstart-{folder.resolve().name}" if folder else "quickstart"), scale, debug).run()


class Quickstart(Chain):
    """The steps, each of which leaves one folder under `out` that is whole once it is there."""

    def __init__(self, model: Path | None, data: Path | None, out: Path, scale: float, debug: bool = False) -> None:
        self.scale, self.own = scale, model is None
        self.teacher = model or out / "teacher" / "model"
        self.text = data or out / "corpus" / "stories.txt"
        check_apart(out, [path for path in (model, data) if path])
        asked = {"model": str(model and model.resolve()), "data": str(data and data.resolve()), "scale": scale}
        super().__init__(out, asked, "quickstart", "choose another place with --out", debug)

    def do(self) -> None:
        """The steps, and the comparison."""
        out = self.out
        self.tell_how_to_go_on()
        self.console.print("Each step shows its command, whose --help explains it; keys of training are explained in docs/options.md.")
        # The last stories of the text are kept out of every training and are those that the models are compared on.
        held_out = max(20, round((300 if self.own else 500) * min(1.0, self.scale)))
        text = [f"train_data=[{json.dumps(str(self.text))}]", f"valid_stories={held_out}"]
        if self.own:
            self.step("1. Make a corpus and its tokenizer", out / "corpus", self.make_corpus)
            settings = [f"output={out}/teacher", f"tokenizer={out}/corpus", f"steps={self.steps(300)}", *text]
            self.step("2. Train a small softmax Llama", self.teacher, lambda: self.train("teacher", settings))
        self.step("3. Convert it", out / "swapped", lambda: self.convert("swapped", FORM))
        self.console.print(KEY)
        self.step(
            "4. Convert it to its window alone, as a control", out / "window", lambda: self.convert("window", (*WINDOW, "--beside", "none"))
        )
        self.console.print(CONTROL)
        tuning = [
            f"output={out}/tuned",
            f"model={out}/swapped",
            f"teacher={self.teacher}",
            f"steps={self.steps(100 if self.own else 150)}",
            *text,
        ]
        if not self.own:
            length = self.length()
            tuning += [f"length={length}", f"batch_size={max(1, 4096 // length)}"]
        self.step("5. Fine-tune it with noise dropout", out / "tuned" / "model", lambda: self.train("finetune", tuning))
        named = [f"teacher={self.teacher}", f"window alone={out}/window", f"swapped={out}/swapped", f"fine-tuned={out}/tuned/model"]
        options = ["--data", str(self.text), "--stories", str(held_out), "--out", f"{out}/evaluation", "--overwrite"]
        self.step(
            "6. Evaluate and generate, on stories kept out of training",
            None,
            lambda: self.call(f"{PROJECT}recipes.tinystories.evaluate", *named, *options),
        )
        self.tell_minutes()
        places = {"table": "evaluation/evaluation.md", "picture": "evaluation/evaluation.png", "model": "tuned/model"}
        if self.own:
            self.console.print(SMALL)
            self.console.print(SHORT)
            self.console.print(smollm2.measured())
        self.console.print("   ".join(f"{what}: {out}/{where}" for what, where in places.items()))

    def convert(self, name: str, form: tuple[str, ...]) -> None:
        """Convert the teacher to an attention of this form, in a folder of this name."""
        self.call(f"{PROJECT}convert.linearize", str(self.teacher), f"{self.out}/{name}", *form)

    def train(self, config: str, settings: list[str]) -> None:
        """Run the training script on one of the configs beside this file."""
        self.call(f"{PROJECT}recipes.tinystories.train", "--config", f"{HERE}/{config}.yaml", "--resume", "--set", *settings)

    def steps(self, number: int) -> int:
        """`number` of training steps, scaled."""
        return max(1, round(number * self.scale))

    def length(self) -> int:
        """Tokens a sequence: 512, or what the given model has positions for."""
        from recipes.common.checkpoint import read_config  # late, as it imports torch

        config = read_config(self.teacher, str(self.teacher))
        positions = config.get("max_position_embeddings", config.get("n_positions"))
        return min(512, positions) if isinstance(positions, int) and positions > 0 else 512

    def make_corpus(self) -> None:
        """corpus/: stories.txt and a byte-level BPE tokenizer of 512 tokens trained on it."""
        from recipes.quickstart.tokenizer import trained_on  # late, as it imports torch

        texts = list(stories(max(400, round(6000 * self.scale))))
        with staged_directory(self.out / "corpus", COMMAND) as place:
            write_text(place / "stories.txt", f"\n{MARK}\n".join(texts) + "\n")
            trained_on(texts).save_pretrained(place)


if __name__ == "__main__":
    cli.run(main)
