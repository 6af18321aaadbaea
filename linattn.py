"""The command `linattn`, with what converts a checkpoint and what comes after it as stages: each is imported when it is called.

In a checkout the stages are modules of the packages `convert` and `recipes`, which a wheel carries below `hf_linattn`. There they are
imported as children of this module: the package's own import takes seconds, and what is wrong with the arguments is said before.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Annotated

try:
    import typer
    from typer.core import TyperCommand
except ModuleNotFoundError:
    raise SystemExit("error: the command linattn needs the extra `convert`: pip install 'hf_linattn[convert]'") from None

# By name: a module whose `main` is the stage, and a line for the list.
STAGES = {
    "convert": ("convert.linearize", "Swap a checkpoint's softmax attention for linear attention."),
    "calibrate": ("convert.calibrate", "Start a converted model's new numbers from its teacher's attention."),
    "transfer": ("convert.transfer", "Bring a converted model's attention layers near to its teacher's, one by one."),
    "distill": ("convert.distill", "Bring a converted model's predictions near to its teacher's."),
    "run": ("convert.run", "All of these one after the other, by a recipe."),
    "evaluate": ("convert.evaluate", "Hold models against their teacher: loss, recall, tasks, what generating costs."),
    "select-layers": ("convert.select_layers", "Find the layers that should stay softmax, by measured loss and recall."),
    "env": ("hf_linattn.env", "Say which form of linear attention runs on this machine, and why."),
}

_PACKAGE = Path(__file__).parent / "hf_linattn"
_IN_WHEEL = (_PACKAGE / "convert").is_dir()
if _IN_WHEEL:
    __path__ = [str(_PACKAGE)]


def _module(name: str):
    """A module of a checkout by the name it has there."""
    return import_module(f"linattn.{name}" if _IN_WHEEL and not name.startswith("hf_linattn.") else name)


class _Stage(TyperCommand):
    """Leaves all arguments, `--help` among them, to the stage."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        ctx.args = args
        return []


def _run(ctx: typer.Context) -> None:
    module, _ = STAGES[ctx.command.name or ""]
    _module("recipes.common.cli").app(_module(module).main)(ctx.args, prog_name=ctx.command_path)


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _tell_version(asked: bool) -> None:
    if asked:
        source = (_PACKAGE / "__init__.py").read_text(encoding="utf-8")  # as text: importing it takes seconds
        print(re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)[0])
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Say the version and exit.", is_eager=True, callback=_tell_version)] = False,
) -> None:
    """Linear attention: its stages."""


for _name, (_, _line) in STAGES.items():
    app.command(_name, help=_line, cls=_Stage)(_run)


if __name__ == "__main__":
    app(prog_name="linattn")
