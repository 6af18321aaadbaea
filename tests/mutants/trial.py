"""Runs the tests of one mutant on a copy of the checkout, in a process of its own that has the slow imports behind it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from .mutant import Mutant

CAUGHT, SURVIVED, OUTDATED = "caught", "survived", "does not apply"
_PASSED, _NOTHING_RAN = 0, 5
_CULPRIT = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: `by` is the first test that failed, or why there was none."""

    verdict: str
    by: str
    seconds: float


def import_what_is_slow() -> None:
    """Whatever tests import that is not ours; each trial then begins with it."""
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import torch
    import torch._dynamo
    import transformers.generation.utils
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    torch.set_num_threads(1)


def copy_checkout(root: Path, place: Path) -> None:
    """Copies what git knows or would add; kernels compiled for the emulator before are shared, for their names tell what they are of."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and (root / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, place / name)
    compiled = root / "build" / "emulated-objects"
    compiled.mkdir(parents=True, exist_ok=True)
    (place / "build").mkdir()
    (place / "build" / compiled.name).symlink_to(compiled)


def attempt(mutant: Mutant, copy: Path, seconds: float) -> Outcome:
    """Puts the mutant into the copy, runs its tests up to the first that fails, and takes it out again."""
    try:
        text = mutant.applied(copy)
    except ValueError as error:
        return Outcome(OUTDATED, str(error), 0.0)
    file, began = copy / mutant.file, time.monotonic()
    whole = file.read_text(encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    try:
        code, output = _run_tests(copy, mutant.tests, seconds)
    finally:
        file.write_text(whole, encoding="utf-8")
    took = time.monotonic() - began
    if code in (_PASSED, _NOTHING_RAN):
        return Outcome(SURVIVED, "", took)
    if code is None:
        return Outcome(CAUGHT, f"{seconds:.0f} seconds were not enough", took)
    culprit = _CULPRIT.search(output)
    return Outcome(CAUGHT, culprit[1] if culprit else output[-300:], took)


def _run_tests(copy: Path, tests: list[str], seconds: float) -> tuple[int | None, str]:
    """pytest's exit status, None where it took too long, and what it printed."""
    log = copy / ".mutant.log"
    child = os.fork()
    if child == 0:
        _be_pytest(copy, tests, log)
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace")
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, ""
        time.sleep(0.05)


def _be_pytest(copy: Path, tests: list[str], log: Path) -> None:
    os.setsid()
    os.chdir(copy)
    sys.dont_write_bytecode = True  # else a mutant of the same length and second would be taken for the one before
    sys.path[:0] = [str(copy), str(copy / "tests")]
    os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    chosen = ["-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not gpu"]
    code = 1
    try:
        code = int(pytest.main([*chosen, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)
