"""Commands one after the other, each of which leaves a folder that is whole once it is there: stopped and started anew, they go on."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from recipes.common import cli
from recipes.common.errors import STATUS_FILE, RecipeError, exit_stopped
from recipes.common.files import check_writable, hold, write_json
from recipes.common.lock import Lock
from recipes.common.reading import read_json
from recipes.common.started import run_to_its_end
from recipes.common.state import check_written

PROJECT = __name__.removesuffix("recipes.common.chain")  # "hf_linattn." in a wheel, which has all of this below it
_ROOT = Path(__file__).parents[__name__.count(".")]
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_SPINS = "1000"
"""How often a thread of GNU's OpenMP looks for its next work before it sleeps. By its own default it looks 300 times as often, as if it had
a core to itself: on two cores beside two busy processes a step of the quickstart by two threads took 2.2 to 2.8 s (beside more of them up
to 31), with this 1.0 to 1.4, as by one thread. With both cores to itself it took 0.27, and 0.30 with this."""


class Chain:
    """The folder of a chain.

    Args:
        out: where it is, or will be.
        asked: what decides the chain, plain values; a folder of others is refused.
        name: what such a chain is called; its file NAME.json in `out` holds `asked`.
        remedy: how another folder is given.
        debug: whether commands that fail show their traceback.

    Raises:
        RecipeError: the folder holds something else, or a chain that something else was asked of.
    """

    def __init__(self, out: Path, asked: dict[str, Any], name: str, remedy: str, debug: bool = False) -> None:
        self.out, self.debug, self.console = out, debug, cli.console()
        self.minutes: dict[str, float] = {}
        self._held: Lock | None = None
        state = out / f"{name}.json"
        if state.is_file():
            if (old := read_json(state)) != asked:
                if not isinstance(old, dict):
                    raise RecipeError(f"{state} is damaged; {remedy}, or remove the folder")
                different = next((key for key in [*asked, *old] if old.get(key) != asked.get(key)), name)
                raise RecipeError(
                    f"{out} holds a {name} with another {different} ({old.get(different)!s:.200}, now {asked.get(different)!s:.200}); "
                    f"{remedy}, or remove the folder"
                )
        elif out.is_dir() and any(out.iterdir()):
            raise RecipeError(f"{out} exists and holds something else; {remedy}")
        else:
            check_writable(state)
            write_json(state, asked)

    def run(self) -> None:
        """Do what is not done yet.

        Raises:
            RecipeError: somebody works in the folder, be it a command of a chain that was killed.
        """
        with self.working():
            try:
                self.do()
            except KeyboardInterrupt:
                exit_stopped(f"{self.out} keeps what is done, and the same command goes on where it was")

    def do(self) -> None:
        """The steps of the chain."""
        raise NotImplementedError

    @contextmanager
    def working(self) -> Iterator[None]:
        """Holds the folder, so that nobody else makes something in it meanwhile.

        Raises:
            RecipeError: somebody does.
        """
        self._held = hold(self.out)
        try:
            yield
        finally:
            self._held.release()

    def tell_how_to_go_on(self) -> None:
        """Print where everything goes, and that nothing is lost when it is stopped."""
        self.console.print(f"Everything goes into {self.out}. Interrupted, the same command goes on where it was.")

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

    def call(self, module: str, *arguments: str) -> None:
        """Run a script of the project as a user would."""
        arguments += ("--debug",) * self.debug
        self.console.print(f"python -m {shlex.join([module, *arguments])}", style="dim")
        self._run(module, [module, *arguments], **_limited())

    def launch(self, module: str, *arguments: str) -> None:
        """Run a training script of the project by `accelerate launch`, on what it is configured for."""
        arguments += ("--debug",) * self.debug
        self.console.print(f"accelerate launch -m {shlex.join([module, *arguments])}", style="dim")
        told, threads = _unconfigured()
        # quiet: the training has said what went wrong, and accelerate's own traceback says nothing more
        self._run(module, [f"{PROJECT}recipes.common.launcher", "--quiet", *told, "-m", module, *arguments], **threads)

    def tell_minutes(self) -> None:
        """Print what each step took."""
        for name, minutes in self.minutes.items():
            self.console.print(f"{name}: {minutes:.1f} min")

    def _run(self, module: str, command: list[str], **environment: str) -> None:
        paths = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        if "OMP_WAIT_POLICY" not in os.environ:
            environment = {"GOMP_SPINCOUNT": _SPINS, **environment}
        # PYTHONSAFEPATH: else what lies in the working directory, a checkout of this for one, would stand before what is installed
        environment = {**environment, **os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
        with TemporaryDirectory(prefix="linattn-status-") as folder:
            told = Path(folder) / "status"
            environment[STATUS_FILE] = str(told)
            held = self._held.handed_on() if self._held else ()
            status = run_to_its_end([sys.executable, "-m", *command], environment, held)
            if status == 1 and told.is_file():  # accelerate has 1 for whatever the training ended with
                status = int(told.read_text(encoding="utf-8"))
        if status:
            # 2: it has said what a user can do, without which it would end in the same way again
            again = "once that is mended, the same command goes on from there" if status == 2 else "start again to go on from there"
            self.console.print(f"{module} stopped with status {status}; {again}", style="bold")
            raise SystemExit(2 if status == 2 else 1)


def _limited() -> dict[str, str]:
    """How many threads one process is told to have, where a quota says it: PyTorch does not ask for it, and would have one a core."""
    return {} if _quota() is None else {"OMP_NUM_THREADS": str(usable_cores())}


def usable_cores() -> int:
    """Physical cores, as far as this process may run on them and its container's quota reaches."""
    import psutil

    cores = psutil.cpu_count(logical=False) or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(cores, allowed, _quota() or cores))


def _quota() -> int | None:
    """Cores that a container is limited to, such as by `docker run --cpus`; None where it is not."""
    try:
        quota, period = _QUOTA.read_text(encoding="utf-8").split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _unconfigured() -> tuple[list[str], dict[str, str]]:
    """What `accelerate launch` is given where nobody has configured it, as arguments and as environment.

    They are its own defaults, of which it gives notice where it is not told, and in a training without a device all cores that are there
    for it: it takes a single thread then.
    """
    from accelerate.commands.config.config_args import default_config_file
    from torch import accelerator  # late, as it imports torch

    if Path(default_config_file).is_file():
        return [], {}
    devices = accelerator.device_count() if accelerator.is_available() else 0
    told = {"num_processes": max(devices, 1), "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    arguments = [f"--{name}={value}" for name, value in told.items()] + ["--multi_gpu"] * (devices > 1)
    return arguments, {} if devices else {"OMP_NUM_THREADS": str(usable_cores())}
