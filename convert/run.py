"""A whole conversion by a recipe: ``python -m convert.run RECIPE.yaml [--set key=value ...]``.

Linearize, transfer, distill, evaluate, one after the other, into folders of the recipe's output. What is done is left alone, and what was
stopped goes on: start the same command again.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from convert import evaluate, linearize
from convert.errors import ConversionError
from convert.stages.options import DistillOptions, StageOptions, TransferOptions
from recipes.common import cli
from recipes.common.chain import PROJECT, Chain
from recipes.common.config import build, load_config, to_dict
from recipes.common.files import check_apart, output_path
from recipes.common.reading import refuse_missing_folder, user_path

COMMAND = "convert.run"
RECIPES = Path(__file__).parent / "recipes"
_SHARED = ("student", "output", "teacher", "data", "valid_data")
_ANOTHER = "choose another output"


@dataclass
class Recipe:
    """What a recipe says. The options of each stage are those of its command, by the same names with _ for -."""

    source: str
    """The softmax checkpoint: a folder, a GGUF file or a hub id."""
    output: str
    """Folder of swapped/, transfer/, distill/ and evaluation/."""
    data: list[str]
    """Text to train on: files, folders of them, or hub ids."""
    valid_data: list[str] = field(default_factory=list)
    linearize: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    """Options of both transfer and distill."""
    transfer: dict[str, Any] | None = field(default_factory=dict)
    """null: leave this stage out."""
    distill: dict[str, Any] | None = field(default_factory=dict)
    evaluate: dict[str, Any] | None = None
    """With `data`, files of text that nothing was trained on."""
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    """Of transfer and of distill, as measured; from these the minutes are foretold."""
    measured_on: str = ""
    """The device of `tokens_per_second`."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data names no text")
        for command, given in (("linearize", self.linearize), ("evaluate", self.evaluate or {})):
            _check_keys(command, given, _parameters({"linearize": linearize, "evaluate": evaluate}[command].main))
        for name in ("transfer", "distill"):
            if getattr(self, name) is not None:
                self.stage(name, "student")
        if self.evaluate is not None and not self.evaluate.get("data"):
            raise ValueError("evaluate: data must name files of text that nothing was trained on")

    def stage(self, name: str, student: str) -> StageOptions:
        """The options of transfer or distill.

        Raises:
            RecipeError: one is unknown or out of its bounds.
        """
        options = {"transfer": TransferOptions, "distill": DistillOptions}[name]
        known = {one.name for one in fields(options)}
        given = {**{key: value for key, value in self.training.items() if key in known}, **(getattr(self, name) or {})}
        _check_keys("training", self.training, [one.name for one in fields(DistillOptions)])
        for key in _SHARED:
            if key in given:
                raise ConversionError(f"{name}: {key} is set by the recipe itself; take it out")
        shared = {"student": student, "output": f"{self.output}/{name}", "teacher": self.source}
        return build(options, {**shared, "data": self.data, "valid_data": self.valid_data, **given}, name)


class Conversion(Chain):
    """The stages of a recipe in its output.

    Raises:
        RecipeError: the output holds something else, or a conversion by another recipe.
    """

    def __init__(self, recipe: Recipe, debug: bool = False) -> None:
        self.recipe, out = recipe, output_path(recipe.output)
        check_apart(out, [recipe.source, *recipe.data, *recipe.valid_data])
        super().__init__(out, to_dict(recipe), "recipe", _ANOTHER, debug)

    def run(self) -> None:
        """Do what is not done yet."""
        recipe, student = self.recipe, self.out / "swapped"
        self.console.print(self._ahead())
        self.step(
            "linearize", student, lambda: self.call(f"{PROJECT}convert.linearize", recipe.source, str(student), *flags(recipe.linearize))
        )
        named = [f"swapped={student}"]
        for name in ("transfer", "distill"):
            if getattr(recipe, name) is not None:
                student = self._train(name, student)
                named.append(f"{name}={student}")
        if recipe.evaluate is not None:
            asked = ["--teacher", recipe.source, "--out", str(self.out / "evaluation"), "--resume", *flags(recipe.evaluate)]
            self.step("evaluate", None, lambda: self.call(f"{PROJECT}convert.evaluate", *named, *asked))
        self.tell_minutes()
        self.console.print(f"the model: {student}")

    def _train(self, name: str, student: Path) -> Path:
        options = self.recipe.stage(name, str(student))
        told = {one.name: getattr(options, one.name) for one in fields(options) if one.name not in ("student", "output")}
        result = Path(options.output) / "model"
        self.step(name, result, lambda: self._launch(name, student, options.output, told))
        return result

    def _launch(self, name: str, student: Path, output: str, told: dict[str, Any]) -> None:
        from convert.stages.costs import training_memory  # late, as it imports torch

        self.console.print(training_memory(student, told))
        self.launch(f"{PROJECT}convert.{name}", str(student), output, *flags(told), "--resume")

    def _ahead(self) -> Table:
        """What is to come, as a table."""
        table = Table(
            "stage", "tokens", "rows a step and process", f"minutes{self.recipe.measured_on and ' on ' + self.recipe.measured_on}"
        )
        for name in ("transfer", "distill"):
            if getattr(self.recipe, name) is not None:
                options = self.recipe.stage(name, "student")
                rate = self.recipe.tokens_per_second.get(name)
                minutes = f"{options.tokens / rate / 60:.1f}" if rate else "not measured"
                rows = f"{options.batch_size * options.gradient_accumulation} of {options.length:,} tokens"
                table.add_row(name, f"{options.tokens:,}", rows, minutes)
        return table


def flags(options: dict[str, Any]) -> list[str]:
    """Options as a command line has them."""
    words: list[str] = []
    for key, value in options.items():
        name = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words += [name] if value else [f"--no-{key.replace('_', '-')}"]
        elif value is not None and value != "":
            words += [f"{name}={item}" for item in (value if isinstance(value, list) else [value])]
    return words


def recipe_file(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with this package.

    Raises:
        ConversionError: there is none.
    """
    if user_path(name).is_file():
        return user_path(name)
    own = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if name not in own:
        raise ConversionError(f"{name}: no such file; give a recipe's, or the name of one of ours: {', '.join(own)}")
    return RECIPES / f"{name}.yaml"


def main(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or one of ours by its name.", show_default=False)],
    set_values: cli.SetValues = None,
    more: cli.MoreValues = None,
    debug: cli.Debug = False,
) -> None:
    """Convert a softmax checkpoint by a recipe: linearize, transfer, distill, evaluate."""
    read = load_config(Recipe, recipe_file(recipe), [*(set_values or []), *(more or [])])
    refuse_missing_folder(read.source)
    Conversion(read, debug).run()


def _parameters(command: Callable[..., Any]) -> list[str]:
    left_out = ("source", "output", "models", "teacher", "out", "resume", "overwrite", "debug")
    return [name for name in inspect.signature(command).parameters if name not in left_out]


def _check_keys(where: str, given: dict[str, Any], known: list[str]) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(
                f"{where}: unknown key {key!r}; " + (f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}")
            )


if __name__ == "__main__":
    cli.run(main)
