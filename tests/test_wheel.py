"""The wheel: what is in it, and that the command `linattn` works from it where there is no checkout."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution, distributions
from importlib.util import resolve_name
from pathlib import Path

import pytest
from tiny_softmax import softmax_model

import hf_linattn
from linattn import STAGES

ROOT = Path(__file__).resolve().parents[1]
BUILT_OF = (
    "hf_linattn",
    "convert",
    "recipes",
    "kernels",
    "linattn.py",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
)
SOURCES = ("*.py", "*.yaml", "*.md", "*.cu", "*.cuh", "*.h", "*.txt")
# The command, and then which of the modules that take seconds, or that a checkout alone has at its top, it has imported.
RUN = """
import sys
from importlib.metadata import entry_points
[command] = entry_points(group="console_scripts", name="linattn")
try:
    command.load()(prog_name="linattn")
finally:
    print("imported", *sorted({"torch", "transformers", "convert", "recipes"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with leftovers of an older build."""
    source = tmp_path_factory.mktemp("source")
    for name in BUILT_OF:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copyfile(ROOT / name, source / name)
    (source / "build" / "lib" / "hf_linattn").mkdir(parents=True)
    (source / "build" / "lib" / "hf_linattn" / "gone.py").touch()
    (source / "hf_linattn" / "_kernels.so").touch()
    return source


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was unpacked into, built without kernels."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "."], cwd=source, env=os.environ | {"HF_LINATTN_REQUIRE_CUDA": "0"}, check=True
    )
    [wheel] = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    wheel.unlink()
    return folder


def metadata(installed: Path) -> Distribution:
    [found] = distributions(path=[str(installed)])
    return found


def files_of(folder: Path, *patterns: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}


def test_the_wheel_holds_all_that_runs_below_two_names(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"hf_linattn", "linattn.py"}
    for name, place in {"hf_linattn": "hf_linattn", "convert": "hf_linattn/convert", "recipes": "hf_linattn/recipes"}.items():
        wanted = files_of(ROOT / name, "*.py", "*.yaml", "py.typed")
        found = files_of(installed / place, "*.py", "*.yaml", "py.typed")
        below = {file for file in found if place == "hf_linattn" and file.startswith(("convert/", "recipes/"))}
        assert wanted and found - below == wanted
    assert not files_of(installed, "*.so", "*.pyc", "*.png")


def built(kind: str, source: Path, folder: Path) -> Path:
    """What setuptools builds in `source`, without kernels."""
    build = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    environment = os.environ | {"HF_LINATTN_REQUIRE_CUDA": "0"}
    subprocess.run([sys.executable, "-c", build], cwd=source, env=environment, check=True, capture_output=True)
    [made] = folder.iterdir()
    return made


def test_a_source_distribution_builds_the_same_wheel(source: Path, installed: Path, tmp_path: Path) -> None:
    with tarfile.open(built("sdist", source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    for name in ("kernels", "convert", "recipes"):
        assert files_of(unpacked / name, "*") == files_of(ROOT / name, *SOURCES)
    assert (unpacked / "CHANGELOG.md").is_file() and not files_of(unpacked, "*.so", "*.pyc", "tests/*")
    with zipfile.ZipFile(built("wheel", unpacked, tmp_path / "wheel")) as wheel:
        found = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
        told = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA")))
    assert set(found) == {name for name in files_of(installed, "*") if ".dist-info/" not in name}
    assert all((installed / name).read_bytes() == content for name, content in found.items())
    assert told.decode() == metadata(installed).read_text("METADATA")


def test_the_metadata_is_complete(installed: Path) -> None:
    told = metadata(installed)
    found = {(point.group, point.name) for point in told.entry_points}
    assert found == {("console_scripts", "linattn"), ("vllm.general_plugins", "hf_linattn")}
    assert {"convert", "docs", "evaluate", "recipes", "test"} == set(told.metadata.get_all("Provides-Extra") or [])
    assert (told.read_text("top_level.txt") or "").split() == ["hf_linattn", "linattn"]
    assert f"\n## {told.version}, " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert told.metadata.get_all("Classifier") and told.metadata["License-Expression"] == "Apache-2.0"


def test_the_package_knows_its_version(installed: Path) -> None:
    assert metadata(installed).version == hf_linattn.__version__


def test_every_import_of_the_projects_own_leads_into_the_wheel(installed: Path) -> None:
    """Those inside functions too."""
    for file in sorted(installed.rglob("*.py")):
        package = ".".join(file.relative_to(installed).parts[:-1])
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [resolve_name("." * node.level + (node.module or ""), package)]
            for name in names:
                assert name.split(".")[0] not in ("convert", "recipes"), (file, name)
                place = installed / name.replace(".", "/")
                assert not name.startswith("hf_linattn.") or place.is_dir() or place.with_suffix(".py").is_file(), (file, name)


def run(installed: Path, folder: Path, *arguments: str | Path) -> tuple[int, str, str]:
    environment = os.environ | {"PYTHONPATH": str(installed), "COLUMNS": "200", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, list(STAGES)),
        (["--version"], 0, [f"{hf_linattn.__version__}\nimported"]),
        (["chess"], 2, ["No such command 'chess'"]),
        (["convert", "--help"], 0, ["linattn convert", "--keep-softmax"]),
        (["convert", "./absent", "new"], 2, ["error: there is no folder"]),
        (["convert", "--debug", "./absent", "new"], 2, ["RecipeError", "hf_linattn/convert/linearize.py"]),
        (["convert", "--", "--absent", "there"], 2, ["exists already"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_says_what_is_wrong_before_it_imports_torch(
    arguments: list[str], status: int, said: list[str], installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis").touch()
    ended, out, error = run(installed, tmp_path, *arguments)
    assert ended == status and all(word in out + error for word in said), out + error
    assert out.splitlines()[-1] == "imported"


@pytest.mark.slow
def test_the_command_converts(installed: Path, tmp_path: Path) -> None:
    softmax_model("llama").save_pretrained(tmp_path / "source")
    ended, out, error = run(installed, tmp_path, "convert", "source", "converted", "--keep-softmax", "1")
    assert ended == 0 and out.splitlines()[-1] == "imported torch transformers", error
    assert (tmp_path / "converted" / "conversion.json").is_file()
