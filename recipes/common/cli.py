"""What every training script's command line has in common.

`--set a=1 b=2` and `--set a=1 --set b=2` both work: bare `key=value` words are overrides too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from recipes.common.errors import exit_with_sentence

ConfigFile = Annotated[Path, typer.Option("--config", help="The YAML file of settings.", show_default=False)]
SetValues = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")]
MoreValues = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="More settings after --set.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the same run, if there is one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands at the output.")]


def run(command: Callable[..., Any]) -> None:
    """Run `command` as a script: arguments from the command line, errors a user can act on as one sentence and exit status 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    with exit_with_sentence():
        app()
