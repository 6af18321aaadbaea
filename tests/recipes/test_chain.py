"""A chain of commands: what is there is not made again, another chain's folder is left alone, and what stops it is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.config import config_args

from recipes.common import chain as chain_module
from recipes.common.chain import PROJECT, Chain, usable_cores
from recipes.common.errors import RecipeError
from recipes.common.files import staged_directory
from recipes.common.reading import read_json
from recipes.common.started import run_to_its_end

ROOT = str(Path(__file__).parents[2])
REMEDY = "choose another folder"


def chain(out: Path, **asked: object) -> Chain:
    return Chain(out, asked, "trial", REMEDY)


def test_a_command_that_fails_ends_it_and_says_how_to_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        chain(tmp_path / "out").call("recipes.absent", "--no", "matter")
    told = capfd.readouterr().out
    assert ended.value.code == 1 and "python -m recipes.absent --no matter" in told
    assert "recipes.absent stopped with status 1; start again to go on from there" in " ".join(told.split())


@pytest.mark.parametrize("wrong", ["of the user", "of ours"])
def test_a_training_that_fails_says_so_in_one_sentence_with_its_own_status(
    wrong: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """accelerate ends with 1 whatever the training ended with, and gives notice of what it was not told."""
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "absent"))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    error = "RecipeError('no text; give some')" if wrong == "of the user" else "KeyError('absent')"
    lines = ("from recipes.common.errors import RecipeError, exit_with_sentence", "with exit_with_sentence():", f"    raise {error}")
    (tmp_path / "failing.py").write_text("\n".join(lines))
    with pytest.raises(SystemExit) as ended:
        chain(tmp_path / "out").launch("failing")
    status, told = 2 if wrong == "of the user" else 1, capfd.readouterr()
    assert ended.value.code == status and f"failing stopped with status {status}" in told.out
    again = "once that is mended, the same command goes on from there" if status == 2 else "start again to go on from there"
    assert again in " ".join(told.out.split())
    (line,) = told.err.strip().splitlines()
    assert line == "error: no text; give some" if status == 2 else line.startswith("error: KeyError")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_the_working_directory_does_not_stand_before_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a checkout's linattn.py would stand before an installed linattn."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes.py").write_text("raise SystemExit(1)")
    chain(tmp_path / "out").call("recipes.lra.listops", "--help")


@pytest.mark.parametrize(("debug", "devices"), [(False, 0), (True, 1), (False, 2)])
def test_commands_are_run_as_they_are_shown(
    debug: bool, devices: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    ran, status = [], [0, 2, -9]

    def run(command: list[str], environment: dict[str, str], held: object) -> int:
        ran.append((command[1:], environment["PYTHONSAFEPATH"], environment["PYTHONPATH"].split(os.pathsep)))
        return status.pop(0)

    monkeypatch.setattr(chain_module, "run_to_its_end", run)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "absent"))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    made, more = Chain(tmp_path / "out", {}, "trial", REMEDY, debug), ["--debug"] * debug
    made.launch("recipes.some", "--a", "b c")
    for wanted in (2, 1):
        with pytest.raises(SystemExit) as ended:
            made.call("recipes.some", "x")
        assert ended.value.code == wanted
    told = [f"--num_processes={max(devices, 1)}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    told += ["--multi_gpu"] * (devices > 1)
    launched = ["-m", "recipes.common.launcher", "--quiet", *told, "-m", "recipes.some", "--a", "b c"]
    called = ["-m", "recipes.some", "x"]
    assert [command for command, *_ in ran] == [[*launched, *more], [*called, *more], [*called, *more]]
    assert all(safe == "1" and paths == [str(Path(__file__).parents[2]), "elsewhere"] for _, safe, paths in ran)
    shown = " ".join(capfd.readouterr().out.split())
    flag = " --debug" * debug
    assert shown.startswith(f"accelerate launch -m recipes.some --a 'b c'{flag} python -m recipes.some x{flag}")
    assert "recipes.some stopped with status -9; start again" in shown
    assert PROJECT == ""


def test_what_is_there_is_not_made_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made, work = chain(tmp_path / "out"), []
    made.step("first", None, lambda: work.append(1))
    made.step("first", tmp_path / "absent", lambda: work.append(2))
    made.tell_minutes()
    assert work == [1, 2] and "first: 0.0 min" in capfd.readouterr().out
    with staged_directory(tmp_path / "there", "test") as aside:
        (aside / "a").write_text("1")
    (tmp_path / "there" / "a").write_text("mine")  # which is its owner's business
    made.step("second", tmp_path / "there", lambda: work.append(3))
    assert work == [1, 2] and f"{tmp_path / 'there'} is there already" in " ".join(capfd.readouterr().out.split())
    (tmp_path / "there" / "a").unlink()
    with pytest.raises(RecipeError, match="a is missing; remove that folder to have it made again"):
        made.step("second", tmp_path / "there", lambda: work.append(3))


def test_another_chains_folder_is_refused(tmp_path: Path) -> None:
    chain(tmp_path / "out", model="a", steps=3)
    chain(tmp_path / "out", model="a", steps=3)
    (tmp_path / "out" / "made").mkdir()
    with pytest.raises(RecipeError, match=rf"a trial with another steps \(3, now 4\); {REMEDY}, or remove the folder"):
        chain(tmp_path / "out", model="a", steps=4)
    (tmp_path / "out" / "trial.json").write_text("[1]")
    with pytest.raises(RecipeError, match="is damaged"):
        chain(tmp_path / "out", model="a", steps=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    with pytest.raises(RecipeError, match=f"holds something else; {REMEDY}"):
        chain(tmp_path / "mine")
    for place in ("notes", "notes/below"):
        with pytest.raises(RecipeError, match=r"mine/notes is no folder that can be; choose another place"):
            chain(tmp_path / "mine" / place)


def test_two_at_work_in_one_folder_are_refused_and_so_is_another_chain_by_which_nothing_was_made_yet(tmp_path: Path) -> None:
    made = chain(tmp_path / "out", model="a", steps=4)
    with pytest.raises(RecipeError, match="another steps"):  # a command of it that outlived it may still be at work
        chain(tmp_path / "out", model="a", steps=5)
    with made.working(), pytest.raises(RecipeError), chain(tmp_path / "out", model="a", steps=4).working():
        pass
    assert read_json(tmp_path / "out" / "trial.json") == {"model": "a", "steps": 4}
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "trial.json").write_text('{"model": "mine"}')
    with pytest.raises(RecipeError, match="another model"):
        chain(tmp_path / "foreign", model="a")


@pytest.mark.parametrize("told", ["nothing", "a configuration", "a device", "by the user"])
def test_a_training_without_a_device_has_every_core(told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: told == "a device")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    (tmp_path / "there").touch()
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / ("there" if told == "a configuration" else "absent")))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told == "by the user":
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "threads.py").write_text("import os\nprint('threads', os.environ['OMP_NUM_THREADS'])")
    chain(tmp_path / "out").launch("threads")
    cores = psutil.cpu_count(logical=False) or 1
    assert f"threads {({'nothing': cores, 'by the user': 3}).get(told, 1)}" in capfd.readouterr().out


def test_it_is_said_where_everything_goes_and_how_to_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chain(tmp_path / "out").tell_how_to_go_on()
    told = "".join(capfd.readouterr().out.split())
    assert f"{tmp_path}/out.Interrupted,thesamecommandgoesonwhereitwas." in told


@pytest.mark.parametrize(
    ("quota", "cores"), [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 16), (None, 16), ("x", 16)]
)
def test_threads_are_no_more_than_a_container_may_use(
    quota: str | None, cores: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 32)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(chain_module, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    (tmp_path / "threads.py").write_text("import os\nprint(os.environ.get('OMP_NUM_THREADS'), os.environ['GOMP_SPINCOUNT'])")
    chain(tmp_path / "out").call("threads")
    limited = quota is not None and quota[0].isdigit()
    assert usable_cores() == cores and f"{cores if limited else None} 1000" in capfd.readouterr().out


@pytest.mark.parametrize(("name", "value", "spins"), [("OMP_WAIT_POLICY", "active", None), ("GOMP_SPINCOUNT", "7", "7")])
def test_what_the_user_tells_threads_stays(
    name: str, value: str, spins: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    for one in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "threads.py").write_text("import os\nprint('spins', os.environ.get('GOMP_SPINCOUNT'))")
    chain(tmp_path / "out").call("threads")
    assert f"spins {spins}" in capfd.readouterr().out


CHAIN = """
from pathlib import Path
from recipes.common import cli
from recipes.common.chain import Chain

class Trial(Chain):
    def do(self):
        self.call("launcher")

cli.run(lambda: Trial(Path("out"), {}, "trial", "choose another folder").run())
"""
LAUNCHER = "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'stage'])"
STAGE = """
import os, time
from pathlib import Path
aside = Path(f"aside{os.getpid()}")
aside.write_text(str(os.getpid()))
aside.rename("started")
try:
    time.sleep(100)
except KeyboardInterrupt:
    pass
"""


def in_its_stage(folder: Path, chain: str = CHAIN, stage: str = STAGE) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """A chain at work, whose step launches another process; the processes of that."""
    for name, text in {"chain": chain, "launcher": LAUNCHER, "stage": stage}.items():
        (folder / f"{name}.py").write_text(text)
    started = subprocess.Popen(
        [sys.executable, "chain.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), ROOT])},
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while not (folder / "started").exists():
        assert started.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    return started, psutil.Process(started.pid).children(recursive=True)


def test_a_killed_chains_command_that_lives_on_holds_the_folder(tmp_path: Path) -> None:
    started, family = in_its_stage(tmp_path)
    started.kill()
    started.wait()
    with pytest.raises(RecipeError, match="out is being written by another process; wait until it ends"), chain(tmp_path / "out").working():
        pass
    for each in family:
        each.kill()
    psutil.wait_procs(family, timeout=30)
    with chain(tmp_path / "out").working():
        pass


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_chain_that_is_asked_to_end_ends_with_all_that_it_started(
    how: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    started, family = in_its_stage(tmp_path)
    started.send_signal(how)
    assert started.wait(timeout=60) == 130
    assert len(family) == 2 and not psutil.wait_procs(family, timeout=10)[1]
    assert capfd.readouterr().err == "stopped; out keeps what is done, and the same command goes on where it was\n"
    with chain(tmp_path / "out").working():
        pass


@pytest.mark.parametrize("busy", [STAGE, STAGE.partition("try:")[0] + "time.sleep(100)"], ids=["at work", "importing"])
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_in_a_training_that_accelerate_launches_is_told_in_one_sentence(
    processes: int, busy: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal sends it to all of them at once, whatever they are at."""
    two = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    patched = f"import recipes.common.chain as c\nc._unconfigured = lambda: ({two}, {{}})\n" if processes == 2 else ""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    started, family = in_its_stage(tmp_path, patched + CHAIN.replace('call("launcher")', 'launch("stage")'), busy)
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(timeout=60) == 130 and not psutil.wait_procs(family, timeout=10)[1]
    told = [line for line in capfd.readouterr().err.splitlines() if "torch/distributed/elastic" not in line]  # its log
    assert told == ["stopped; out keeps what is done, and the same command goes on where it was"]


def test_ctrl_c_while_a_process_is_being_started_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            signal.raise_signal(signal.SIGINT)  # to this thread: one of the test runner's would hear it at once
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_to_its_end([sys.executable, "-c", "import time; time.sleep(100)"], os.environ)
    assert made and not psutil.pid_exists(made[0].pid)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_second_kill_does_not_disturb_the_clearing_up(tmp_path: Path) -> None:
    """Launchers pass a kill on that everybody has had."""
    (tmp_path / "clearing.py").write_text(
        "import os, signal\n"
        "from recipes.common import cli\n"
        "def work():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('cleared')\n"
        "cli.run(work)\n"
    )
    ended = subprocess.run(
        [sys.executable, "clearing.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "cleared\n", "stopped; give the same command again\n")
