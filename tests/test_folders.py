"""A folder is ours only if we wrote it: every command that writes one, run by its command line, against what a user may have there.

Each command writes its output once (`written`); each case starts from a copy of that.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from kills import make_user
from typer.testing import CliRunner

from convert import evaluate as measure
from convert import linearize
from recipes.common import cli, files
from recipes.common.errors import RecipeError
from recipes.common.lock import lock
from recipes.common.marks import MARK, begin, digest, foreign, read_mark, seal
from recipes.common.place import check_place
from recipes.lra import prepare, report
from recipes.lra import train as lra_train
from recipes.tinystories import compare, evaluate, train

# By name: the command, and its arguments for an output, the user's things being in the working directory.
COMMANDS: dict[str, tuple[Callable[..., Any], Callable[[str], list[str]]]] = {
    "linearize": (linearize.main, lambda out: ["model", out, "--no-check"]),
    "measure": (measure.main, lambda out: ["--teacher", "model", "--data", "stories.txt", "--out", out, *LITTLE]),
    "train": (train.main, lambda out: ["--config", "config.yaml", "--set", f"output={out}"]),
    "evaluate": (evaluate.main, lambda out: ["model", "--data", "stories.txt", "--out", out, *SHORT]),
    "compare": (compare.main, lambda out: ["run", "--out", out]),
    "prepare": (prepare.prepare, lambda out: ["listops", "--out", out, "--source", "listops"]),
    "lra train": (lra_train.main, lambda out: ["--config", "lra.yaml", "--set", f"output={out}"]),
    "report": (report.report, lambda out: ["results/one.json", "--out", out]),
}
SHORT = ["--stories", "2", "--length", "16", "--decode", "8", "--tokens", "1", "--device", "cpu"]
LITTLE = ["--rows", "1", "--length", "16", "--recall", "none", "--decode", "", "--device", "cpu"]
INPUTS = {
    "linearize": ["model"],
    "measure": ["model", "stories.txt"],
    "train": ["model", "config.yaml", "stories.txt"],
    "evaluate": ["model", "stories.txt"],
    "compare": ["run"],
    "prepare": ["listops"],
    "lra train": ["lra", "lra.yaml"],
    "report": ["results/one.json"],
}
ALL = pytest.mark.parametrize("name", COMMANDS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the user's things, and what each command has written into out-NAME."""
    home = tmp_path_factory.mktemp("written")
    make_user(home)
    config = yaml.safe_load((home / "config.yaml").read_text())
    (home / "config.yaml").write_text(yaml.safe_dump({**config, "model": "model", "train_data": ["stories.txt"], "steps": 1}))
    (home / "run").mkdir()
    (home / "run" / "config.yaml").write_text("attn_implementation: linattn\n")
    lines = [{"step": 1, "seconds": 1.0, "valid_loss": 1.0}, {"step": 1, "seconds": 1.0, "tokens": 9, "tokens_per_second": 9.0}]
    (home / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "results").mkdir()
    result = {"task": "listops", "attn_implementation": "linattn", "dropout": "none", "seed": 0, "test_accuracy": 0.5}
    (home / "results" / "one.json").write_text(json.dumps(result))
    (home / "listops").mkdir()
    for split in ("train", "val", "test"):
        (home / "listops" / f"basic_{split}.tsv").write_text("Source\tTarget\n" + "( ( ( ( [MAX 1 ) 2 ) 3 ) ] )\t3\n" * 500)
    settings = {"task": "listops", "data": "lra", "steps": 1, "batch_size": 2, "eval_every": 1, "log_every": 1, "save_every": 1}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (home / "lra.yaml").write_text(yaml.safe_dump({**settings, "model": sizes}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert invoke("prepare", "lra").exit_code == 0
        for name in COMMANDS:
            done = invoke(name, f"out-{name}")
            assert done.exit_code == 0, done.output
    return home


@pytest.fixture
def home(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, as the working directory."""
    place = Path(shutil.copytree(written, tmp_path / "home", symlinks=True))
    monkeypatch.chdir(place)
    yield place
    AcceleratorState._reset_state(reset_partial_state=True)


def invoke(name: str, out: str | Path, *more: str) -> Any:
    """Run a command by its command line."""
    AcceleratorState._reset_state(reset_partial_state=True)
    command, arguments = COMMANDS[name]
    return CliRunner().invoke(cli.app(command), [*arguments(str(out)), *more])


def target(name: str, out: str | Path) -> Path:
    """The folder that a command replaces: of Long Range Arena's training that of its seed."""
    return Path(out) / "seed-0" if name == "lra train" else Path(out)


def tree(home: Path) -> dict[str, str]:
    """Everything below `home`, links as what they say."""
    found = {}
    for path in home.rglob("*"):
        kind = f"-> {os.readlink(path)}" if path.is_symlink() else "folder" if path.is_dir() else "pipe" if path.is_fifo() else digest(path)
        found[str(path.relative_to(home))] = kind
    return found


def refused(name: str, out: str | Path, home: Path, *more: str) -> str:
    """The command must end with status 2 and one sentence, and change nothing; gives the sentence."""
    before = tree(home)
    done = invoke(name, out, *more)
    assert done.exit_code == 2, done.output
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and "Traceback" not in done.stderr, done.stderr
    assert tree(home) == before
    return sentences[0]


@ALL
def test_our_own_output_is_replaced_only_when_asked(name: str, home: Path) -> None:
    out = f"out-{name}"
    if name == "prepare":
        assert "is ready" in invoke(name, out).output  # the same data: nothing to do
        assert "holds other data" in refused(name, out, home, "--seed", "1")
    else:
        assert "exists already" in refused(name, out, home)
    old = target(name, out).stat().st_ino
    done = invoke(name, out, "--overwrite")
    assert done.exit_code == 0, done.output
    mark = read_mark(target(name, out))
    assert mark and mark.command.startswith(("convert.", "recipes.")) and mark.files
    assert target(name, out).stat().st_ino != old
    assert not [path for path in home.rglob(".*.partial-*") if read_mark(path)]


def a_thesis(place: Path) -> str:
    shutil.rmtree(place)
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    return "holds no mark"


def an_earlier_version(place: Path) -> str:
    (place / MARK).unlink()
    return "holds no mark"


def a_byte_behind_the_first_megabyte(place: Path) -> str:
    path, mark = place / "large", read_mark(place)
    assert mark
    path.write_bytes(bytes(3 << 20))
    seal(place, mark.command, mark.grows, mark.folders)
    path.write_bytes(bytes((3 << 20) - 1) + b"!")
    return "holds large"


def a_file_added(place: Path) -> str:
    (place / "thesis.txt").write_text("years of work")
    return "holds thesis.txt"


def a_file_added_deep_inside(place: Path) -> str:
    (place / "notes" / "of").mkdir(parents=True)
    (place / "notes" / "of" / "mine.txt").write_text("years of work")
    return "holds notes/of/mine.txt"


def a_link_added(place: Path) -> str:
    (place / "data").symlink_to("/")
    return "holds data"


def a_file_changed(place: Path) -> str:
    path = place / min(read_mark(place).files)  # type: ignore[arg-type, union-attr]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    return f"holds {path.name}"


def another_commands_output(place: Path) -> str:
    shutil.rmtree(place)
    place.mkdir()
    begin(place, "another.command")
    seal(place, "another.command")
    return "was written by another.command"


def a_mark_that_never_was_finished(place: Path) -> str:
    begin(place, "recipes.tinystories.evaluate")
    return "holds no mark"


def a_mark_that_is_a_pipe(place: Path) -> str:
    (place / MARK).unlink()
    os.mkfifo(place / MARK)
    return "holds no mark"


def a_mark_that_never_ends(place: Path) -> str:
    (place / MARK).unlink()
    (place / MARK).symlink_to("/dev/zero")
    return "holds no mark"


def a_mark_with_a_text_for_a_list(place: Path) -> str:
    mark = json.loads((place / MARK).read_text())
    (place / MARK).write_text(json.dumps(mark | {"grows": "*"}))
    (place / "thesis.txt").write_text("years of work")
    return "holds no mark"


def a_link_to_our_output(place: Path) -> str:
    place.rename(place.with_name("moved"))
    place.symlink_to("moved")
    return "is no folder"


def a_file_in_its_place(place: Path) -> str:
    shutil.rmtree(place)
    place.write_text("years of work")
    return "is no folder"


SPOILT = [
    a_thesis, an_earlier_version, a_file_added, a_file_added_deep_inside, a_link_added, a_file_changed, a_byte_behind_the_first_megabyte,
    another_commands_output, a_mark_that_never_was_finished, a_mark_that_is_a_pipe, a_mark_that_never_ends, a_mark_with_a_text_for_a_list,
    a_link_to_our_output, a_file_in_its_place,
]  # fmt: skip


@ALL
@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_what_we_did_not_write_is_left_alone(name: str, spoil: Callable[[Path], str], home: Path) -> None:
    message = spoil(target(name, f"out-{name}"))
    assert message in refused(name, f"out-{name}", home, "--overwrite")


@ALL
def test_an_output_never_reaches_an_input(name: str, home: Path) -> None:
    for source in INPUTS[name]:
        shutil.copy(home / f"out-{name}" / MARK if name != "lra train" else home / f"out-{name}/seed-0/{MARK}", home)
        (home / "link").unlink(missing_ok=True)
        (home / "link").symlink_to(home)
        (home / "out").mkdir(exist_ok=True)
        places = {"itself": source, "above": home, "by a link": f"link/{source}", "by dots": f"out/../{source}"}
        if (home / source).is_dir():
            places |= {"below": f"{source}/new", "below, by a link": f"link/{source}/new/er"}
        for how, place in places.items():
            if name == "lra train" and how != "above":  # its folder is seed-0 in the output
                place = f"{place}/seed-0/.." if how in ("itself", "by a link", "by dots") and (home / source).is_file() else place
            if name == "lra train" and how == "above":
                continue
            message = refused(name, place, home, "--overwrite")
            assert "overlaps" in message or (name == "lra train" and "cannot be written" in message), (how, message)


@ALL
def test_an_output_has_a_name(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can take the place of the working folder, nor of one above it; ~ is the home here too, and nobody's is none."""
    assert "not known here" in refused(name, "~nobody.of.this.name/out", home, "--overwrite")
    (home / "empty").mkdir()
    for out in [] if name == "lra train" else [".", "..", "empty/..", "/"]:  # whose folder is seed-0 in the output
        assert "has no name of its own" in refused(name, out, home, "--overwrite")
    monkeypatch.setenv("HOME", str(home / "empty"))
    assert invoke(name, "~/out").exit_code == 0
    assert read_mark(target(name, home / "empty" / "out")) and not (home / "~").exists()


def test_a_folder_of_another_command_is_no_checkpoint(home: Path) -> None:
    (home / "out-linearize").rename(home / "out-train" / "best")
    assert "holds best/" in refused("train", "out-train", home, "--overwrite")


@ALL
def test_what_killed_commands_left_is_cleared_up_by_the_next(name: str, home: Path) -> None:
    place = target(name, f"out-{name}")
    unfinished, old = (place.with_name(f".{place.name}.{state}-999999") for state in ("partial", "old"))
    unfinished.mkdir()
    begin(unfinished, "a.command")
    (unfinished / "half").write_text("a half")
    place.rename(old)
    theirs = place.with_name(f".{place.name}.partial-7")
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    before = tree(old)
    done = invoke(name, f"out-{name}")
    # What had stepped aside is back, so there is something to refuse to replace, or to be content with.
    assert done.exit_code == (0 if name == "prepare" else 2) and tree(place) == before
    assert f"{unfinished} was removed" in done.stderr and f"{place} was put back" in done.stderr
    assert not unfinished.exists() and not old.exists() and (theirs / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("place", "mine"),
    [("new", ""), ("new/er", ""), ("a/b/c", ""), ("results/a/b", ""), ("a/b/c/d", "a/b/thesis.txt"), ("a/b", "a/.thesis.partial-7/x")],
)
def test_folders_that_a_killed_first_output_made_go_with_it(place: str, mine: str, home: Path) -> None:
    before = set(tree(home))
    child = os.fork()
    if child == 0:
        with files.staged_directory(home / place, "a.command") as aside:
            (aside / "half").write_text("a half")
            os._exit(0)
    os.waitpid(child, 0)
    if mine:
        (home / mine).parent.mkdir(exist_ok=True)
        (home / mine).write_text("years of work")
    assert [path for path in set(tree(home)) - before if path.endswith("half")]
    files.check_target(home / place, "another.command")
    assert set(tree(home)) - before == {str(path) for path in (Path(mine), *Path(mine).parents)} - {"."}


@pytest.mark.parametrize("begun", [True, False])
def test_a_process_with_the_number_of_a_killed_one_writes_the_same_file(begun: bool, tmp_path: Path) -> None:
    """In a container every start has the same, and some files are written where no folder is looked through first."""
    left = tmp_path / f".x.json.partial-{os.getpid()}"
    left.mkdir()
    if begun:
        begin(left, "a file")
        (left / "x.json").write_text("a half")
    files.write_json(tmp_path / "x.json", {"whole": True})
    assert tree(tmp_path) == {"x.json": tree(tmp_path)["x.json"]} and "whole" in (tmp_path / "x.json").read_text()
    left.mkdir()
    (left / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError):
        files.write_json(tmp_path / "x.json", {})
    assert (left / "thesis.txt").read_text() == "years of work"


@ALL
def test_what_another_process_is_writing_is_left_to_it(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "lock", lambda folder, wait=0.0: lock(folder))  # a second of waiting, seven times
    place = target(name, f"out-{name}")
    with files.staged_directory(home / "elsewhere", "a.command") as aside:
        live = place.with_name(f".{place.name}.partial-999999")
        aside.rename(live)
        (live / "half").write_text("a half")
        held = files.hold(place)
        told = refused(name, f"out-{name}", home, "--overwrite")
        assert re.search(r"is being written by (process \d+ on .+|another process); wait until it ends", told)
        held.release()
        live.rename(aside)


@ALL
def test_a_traceback_is_shown_where_it_is_asked_for(name: str, home: Path) -> None:
    out = f"{INPUTS[name][0]}/new"
    assert "Traceback" not in invoke(name, out).stderr
    done = invoke(name, out, "--debug")
    assert done.exit_code == 2 and "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("error: ")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system fails every write beyond `size` bytes of a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@ALL
@pytest.mark.parametrize("size", [0, 120, 400, 700])
def test_a_write_that_fails_leaves_the_old_or_a_run_to_go_on_with(name: str, size: int, home: Path) -> None:
    more = {"prepare": ["--seed", "1"], "linearize": ["--dtype", "bfloat16"]}.get(name, [])
    with files_of_at_most(size):
        if "train" not in name and name != "measure":
            assert "File too large" in refused(name, f"out-{name}", home, "--overwrite", *more)
            return
        done = invoke(name, f"out-{name}", "--overwrite")
    assert done.exit_code == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr, done.output
    place = target(name, f"out-{name}")
    mark = read_mark(place)
    assert mark and not foreign(place, mark) and not [path for path in home.rglob(".*.partial-*") if read_mark(path)]
    assert invoke(name, f"out-{name}", "--resume").exit_code == 0


READ = {
    "linearize": ["model/config.json", "model/model.safetensors"],
    "measure": ["model/config.json", "model/model.safetensors", "model/tokenizer.json", "stories.txt"],
    "train": ["config.yaml", "model/config.json", "model/model.safetensors", "model/tokenizer.json", "stories.txt"],
    "evaluate": ["model/config.json", "model/model.safetensors", "model/tokenizer.json", "stories.txt"],
    "compare": ["run/config.yaml", "run/metrics.jsonl"],
    "prepare": ["listops/basic_train.tsv", "listops/basic_test.tsv"],
    "lra train": ["lra.yaml", "lra/train.npz", "lra/prepared.json"],
    "report": ["results/one.json"],
}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evaluate", ["--stories", "9" * 30], "--stories 999999999999999999999999999999 is too large"),
        ("evaluate", ["--decode", str(2**31 - 1)], "expected whole numbers from 1 to"),
        ("evaluate", ["--separator", ""], "the separator is empty"),
        ("evaluate", ["--device", "meta"], "--device meta: not usable here"),
        ("evaluate", ["--data", "json"], "json: no such file"),
        ("linearize", ["--seed", "9" * 30], "is too large"),
        ("train", ["seed=-1"], "seed must lie between"),
        ("train", ["samples=" + "9" * 30], "is too large a number"),
        ("train", ["separator=''"], "the separator is empty"),
        ("train", ["train_data=[text]"], "text: no such file"),
        ("train", ["train_data=[csv]", "valid_data=[stories.txt]"], "csv: no such file"),
        ("lra train", ["seeds=[-1]"], "expected numbers between 0 and"),
        ("prepare", ["--source", "hub:json"], "json is neither a folder nor a data set's id"),
    ],
)
def test_values_that_nothing_can_be_done_with(name: str, arguments: list[str], message: str, home: Path) -> None:
    """Among them words that `datasets` takes for readers of all files of a kind in the working folder."""
    (home / "private.json").write_text('{"text": "private"}')
    (home / "private.csv").write_text("text\nprivate\n")
    assert message in refused(name, "new", home, *arguments)


def test_a_run_of_the_arena_is_not_resumed_on_other_examples_of_equal_number(home: Path) -> None:
    (home / "out-lra train" / "seed-0" / "result.json").unlink()
    for split in ("train", "val", "test"):
        path = home / "listops" / f"basic_{split}.tsv"
        path.write_text(path.read_text().replace("[MAX 1", "[MAX 2"))
    assert invoke("prepare", "lra", "--overwrite").exit_code == 0
    assert "belongs to another run: train was" in refused("lra train", "out-lra train", home, "--resume")


@pytest.mark.parametrize(
    "change",
    [{"task": [1]}, {"linattn": 5}, {"seconds": "long"}, {"test_accuracy": 1e308}, {"seed": {}}, {"dropout": None}],
    ids=lambda change: next(iter(change)),
)
def test_a_result_that_is_none_is_named(change: dict[str, Any], home: Path) -> None:
    path = home / "results" / "one.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    message = refused("report", "new", home)
    assert "one.json: " + next(iter(change)) in message, message


def gone(path: Path) -> None:
    path.unlink()


def a_circle_of_links(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4)


def nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in READ.items() for path in paths])
def test_what_cannot_be_read_is_named_in_a_sentence(name: str, path: str, written: Path, home: Path) -> None:
    for spoil in (gone, a_circle_of_links, a_folder, noise, nothing):
        spoil(home / path)
        message = refused(name, "new", home)
        assert Path(path).name in message or Path(path).parts[0] in message, message
        if (home / path).is_dir():
            (home / path).rmdir()
        (home / path).unlink(missing_ok=True)
        shutil.copy(written / path, home / path)


@pytest.mark.parametrize("name", ["linearize", "train", "evaluate"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("hidden_size", 33),
        ("hidden_act", "swoosh"),
        ("intermediate_size", -4),
        ("rms_norm_eps", "small"),
        ("rope_parameters", {"rope_type": "unheard of"}),
    ],
)
def test_a_config_of_which_no_model_can_be_made_names_its_key(name: str, key: str, value: Any, home: Path) -> None:
    config = json.loads((home / "model" / "config.json").read_text())
    (home / "model" / "config.json").write_text(json.dumps(config | {key: value}))
    message = refused(name, "new", home)
    assert "model" in message and f"at fault is {key} = " in message, message


@pytest.mark.parametrize(
    "named",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_3"},
        {"attn_implementation": "no such thing"},
        {"attn_implementation": {"": "flash_attention_2"}},
    ],
)
def test_a_config_that_names_an_attention_not_installed_converts(named: dict[str, Any], home: Path) -> None:
    config = json.loads((home / "model" / "config.json").read_text())
    (home / "model" / "config.json").write_text(json.dumps(config | named))
    done = invoke("linearize", "new")
    assert done.exit_code == 0, done.output
    assert json.loads((home / "new" / "config.json").read_text())["attn_implementation"] == "linattn"


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 0}, {"architectures": "LlamaForCausalLM"}, {"architectures": [3]}, {"num_hidden_layers": -1}]
)
def test_a_config_that_conversion_cannot_take_names_its_key(changes: dict[str, Any], home: Path) -> None:
    config = json.loads((home / "model" / "config.json").read_text())
    (home / "model" / "config.json").write_text(json.dumps(config | changes))
    assert next(iter(changes)) in refused("linearize", "new", home)


@pytest.mark.parametrize("processes, refused_at_once", [(None, True), ("1", True), ("2", False)])
def test_a_folder_is_refused_before_torch_is_loaded_where_one_process_trains(tmp_path, monkeypatch, processes, refused_at_once):
    """Of several, all must know of it, or some would wait for the others for ever."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(RecipeError, match="exists already") if refused_at_once else nullcontext():
        check_place(tmp_path, "command")
