"""A whole conversion by a recipe: ``python -m convert.run RECIPE.yaml [--set key=value ...]``.

Linearize, calibrate, transfer, distill, evaluate, one after the other, into folders of the recipe's output. What is done is left alone, and
what was stopped goes on: start the same command again.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from convert.recipe import Recipe, Student, flags, recipe_file
from convert.stages.options import StageOptions
from recipes.common import cli
from recipes.common.chain import PROJECT, Chain
from recipes.common.config import load_config, to_dict
from recipes.common.files import check_apart, output_path
from recipes.common.tables import ShownTable

COMMAND = "convert.run"


class Conversion(Chain):
    """The stages of a recipe in its output.

    Raises:
        RecipeError: the output holds something else, or a conversion by another recipe.
    """

    def __init__(self, recipe: Recipe, debug: bool = False) -> None:
        self.recipe, out = recipe, output_path(recipe.output)
        check_apart(out, [recipe.source, *recipe.data, *recipe.valid_data])
        super().__init__(out, to_dict(recipe), "recipe", "choose another output", debug)

    def do(self) -> None:
        """All stages, and the evaluation."""
        recipe = self.recipe
        self.tell_how_to_go_on()
        self.console.print(self._ahead())
        if recipe.calibrate is not None and any(student.is_window_only for student in recipe.students()):
            self.console.print("a window alone has no numbers to start anywhere, so it is not calibrated")
        models = {student.control: self._make(student) for student in recipe.students()}
        if recipe.evaluate is not None:
            own = [f"{path.parent.name if path.name == 'model' else path.name}={path}" for path in models[""]]
            controls = [f"{name.replace('_', ' ')}={paths[-1]}" for name, paths in models.items() if name]
            options = flags({**recipe.evaluate, "card": recipe.evaluate.get("card") is not False})
            asked = ["--teacher", recipe.source, "--out", str(self.out / "evaluation"), "--resume", *options]
            self.step("evaluate", None, lambda: self.call(f"{PROJECT}convert.evaluate", *own, *controls, *asked))
        self.tell_minutes()
        self.console.print(f"the model: {models[''][-1]}")

    def _make(self, student: Student) -> list[Path]:
        """The checkpoints of one student, from the converted one to the last."""
        place, linearize = self.out / student.control, student.linearize
        made = []
        if linearize is not None:
            made.append(place / "swapped")
            arguments = [self.recipe.source, str(made[-1]), *flags(linearize)]
            self.step(_title(student, "linearize"), made[-1], lambda: self.call(f"{PROJECT}convert.linearize", *arguments))
        for name in student.stages:
            options = self.recipe.stage(name, str(made[-1]) if made else self.recipe.source, student.control)
            made.append(Path(options.output) / "model")
            self.step(_title(student, name), made[-1], partial(self._launch, name, options))
        return made

    def _launch(self, name: str, options: StageOptions) -> None:
        from convert.stages.costs import training_memory  # late, as it imports torch

        self.console.print(training_memory(options.student, to_dict(options)))
        told = {one.name: getattr(options, one.name) for one in fields(options) if getattr(options, one.name) != one.default}
        places = [told.pop("student"), told.pop("output")]
        self.launch(f"{PROJECT}convert.{name}", *places, *flags(told), "--resume")

    def _ahead(self) -> ShownTable:
        """What is to come, as a table."""
        cells = [["stage", "tokens", "rows a step and process", f"minutes{self.recipe.measured_on and ' on ' + self.recipe.measured_on}"]]
        for student in self.recipe.students():
            for name in student.stages:
                options = self.recipe.stage(name, "student", student.control)
                rate = self.recipe.tokens_per_second.get(name)
                minutes = f"{options.tokens / rate / 60:.1f}" if rate else "not measured"
                rows = f"{options.batch_size * options.gradient_accumulation} of {options.length:,} tokens"
                cells.append([_title(student, name), f"{options.tokens:,}", rows, minutes])
        return ShownTable(cells)


def _title(student: Student, name: str) -> str:
    return f"{student.control.replace('_', ' ')}: {name}" if student.control else name


def main(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or one of ours by its name.", show_default=False)],
    set_values: cli.SetValues = None,
    more: cli.MoreValues = None,
    debug: cli.Debug = False,
) -> None:
    """Convert a softmax checkpoint by a recipe: linearize, calibrate, transfer, distill, evaluate."""
    read = load_config(Recipe, recipe_file(recipe), [*(set_values or []), *(more or [])])
    read.check_inputs()
    Conversion(read, debug).run()


if __name__ == "__main__":
    cli.run(main)
