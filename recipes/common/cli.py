"""What every command line has in common.

`--set a=1 b=2` and `--set a=1 --set b=2` both work: bare `key=value` words are overrides too. Every command has `--debug`; one that
starts others takes it as an argument of its own, to pass it on.
"""

from __future__ import annotations

import functools
import inspect
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand

from recipes.common.errors import RecipeError, exit_stopped, exit_with_sentence
from recipes.common.values import wrong_value

ConfigFile = Annotated[Path, typer.Option("--config", help="The YAML file of settings.", show_default=False)]
SetValues = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")]
MoreValues = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="More settings after --set.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the same run, if there is one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what this command wrote to the output before.")]


def console() -> Console:
    """The screen. Names and generated text are printed as they are: no markup is read out of them."""
    return Console(markup=False, highlight=False)


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class _Command(TyperCommand):
    """Says of a wrong value what was expected, in one sentence."""

    asked: Mapping[str, inspect.Parameter]
    """The command's parameters by name."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            name = str(getattr(error.param, "name", ""))
            told = wrong_value(error, self.asked[name].annotation) if name in self.asked else None
            if told is None:
                raise
        with exit_with_sentence():
            raise RecipeError(f"{told}; {ctx.command_path} --help tells more")


def app(command: Callable[..., Any]) -> typer.Typer:
    """`command` as an application: `--debug` among its arguments, errors in one sentence."""

    signature = inspect.signature(command, eval_str=True)
    passed_on = "debug" in signature.parameters

    @functools.wraps(command)
    def guarded(*args: Any, debug: bool = False, **options: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            # A polite kill ends as Ctrl-C does, so that what is half written goes.
            signal.signal(signal.SIGTERM, _interrupt_once)
        with exit_with_sentence(debug, passing=(typer.Exit, typer.Abort, typer.BadParameter)):
            for name, value in options.items():
                if isinstance(value, int) and abs(value) >= 2**63:
                    raise RecipeError(f"--{name.replace('_', '-')} {value} is too large a number; give a smaller one")
            try:
                command(*args, **options, **({"debug": debug} if passed_on else {}))
            except KeyboardInterrupt:
                exit_stopped(_what_stays(options))

    if not passed_on:
        flag = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
        signature = signature.replace(parameters=[*signature.parameters.values(), flag])
    guarded.__signature__ = signature  # type: ignore[attr-defined]
    guarded.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command(cls=type("Command", (_Command,), {"asked": signature.parameters}))(guarded)
    return application


def _interrupt_once(number: int, frame: FrameType | None) -> NoReturn:
    """A second kill, such as a launcher's behind a chain's, shall not disturb the clearing up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.default_int_handler(number, frame)


def _what_stays(options: Mapping[str, Any]) -> str:
    """What a command with these options leaves behind when it is stopped, and how it goes on."""
    place = options.get("output") or options.get("out")
    if "resume" not in options or (place and not Path(place).expanduser().exists()):
        return f"{place} is as it was before; give the same command again" if place else "give the same command again"
    again = "the same command" if options["resume"] else "the same command with --resume"
    return f"{place or 'its output'} keeps what was done up to the last checkpoint or measurement, and {again} goes on from there"


def run(command: Callable[..., Any]) -> None:
    """Run `command` as a script."""
    app(command)()
