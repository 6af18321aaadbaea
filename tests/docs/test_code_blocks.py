"""The code that the README and the site show: Python runs, recipes load, commands and their options exist.

Blocks of a page run one after another, as a reader would run them, in a folder where tiny models and texts have the names that the pages
use. A block that cannot run has `<!-- not run: REASON -->` above it.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from byte_models import byte_model, byte_tokenizer
from markdown_pages import ROOT, markdown_pages
from typer.main import get_command

import linattn
from convert.linearize import linearize
from convert.options import LinearizeOptions
from convert.recipe import Recipe
from recipes.common import cli
from recipes.common.config import load_config
from recipes.quickstart.corpus import stories

PAGES = [ROOT / "README.md", ROOT / "convert" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>.+?) -->\n)?^```(?P<kind>python|yaml)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
TEACHERS = ("EleutherAI/pythia-14m", "EleutherAI/pythia-410m")
STUDENTS = ("OUTPUT", "out/distilled/model", "out/quickstart/tuned/model")


def blocks(page: Path, kind: str) -> Iterator[tuple[int, str]]:
    """The line and the code of those that run."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found["kind"] == kind and not found["why"]:
            yield text.count("\n", 0, found.start("code")), found["code"]


def pages(kind: str) -> list[Any]:
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES if any(blocks(page, kind))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted."""
    folder = tmp_path_factory.mktemp("workplace")
    tokenizer, model = byte_tokenizer(), byte_model(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    for name in TEACHERS:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in STUDENTS:
        linearize(folder / TEACHERS[0], folder / name, LinearizeOptions(form="window", kernel="quadratic", features=16, check=False))
    (folder / "text.txt").write_text("\n".join(stories(30, seed=1)), encoding="utf-8")
    (folder / "layers.json").write_text('{"chosen": [1]}', encoding="utf-8")
    return folder


def given(page: Path) -> dict[str, Any]:
    """What a page's blocks take for granted."""
    if page != ROOT / "README.md":
        return {}
    query, key, value = torch.randn(3, 1, 2, 8, 16)
    return {"query": query, "key": key, "value": value}


@pytest.mark.parametrize("page", pages("python"))
def test_python_runs(page: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    names = given(page)
    for line, code in blocks(page, "python"):
        if "trl" in code and sys.version_info < (3, 11):
            continue  # TRL needs it
        exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", pages("yaml"))
def test_recipes_load(page: Path, tmp_path: Path) -> None:
    for _, code in blocks(page, "yaml"):
        (tmp_path / "recipe.yaml").write_text(code, encoding="utf-8")
        load_config(Recipe, tmp_path / "recipe.yaml")


def test_no_block_is_passed_over() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(BLOCK.findall(text)), page


def test_few_blocks_do_not_run() -> None:
    reasons = [found["why"] for page in PAGES for found in BLOCK.finditer(page.read_text(encoding="utf-8")) if found["why"]]
    assert len(reasons) <= 2, reasons


def console_lines() -> Iterator[tuple[str, str]]:
    """Commands in the indented blocks of every page of the repository, with where they stand."""
    for page in markdown_pages():
        for found in re.finditer(r"^(?: {4}){1,2}(\S(?:.*\\\n)*.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            yield f"{page.relative_to(ROOT)}: {found[1]}", found[1].replace("\\\n", " ")


def parsed(words: list[str]) -> bool:
    """Whether it is a command of ours, whose arguments are then read as it reads them, and not called."""
    module = None
    if words[0] == "linattn":
        module, arguments = linattn.STAGES[words[1]][0], words[2:]
    elif "-m" in words and words[0] in ("python", "accelerate", "torchrun"):
        at = words.index("-m") + 1
        module, arguments = words[at], words[at + 1 :]
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return True
    if module is None:
        return False
    found = import_module(module)
    main = getattr(found, "main", None) or getattr(found, module.split(".")[-1])
    get_command(cli.app(main)).make_context(module, arguments)
    return True


def test_commands_and_their_options_exist() -> None:
    count = 0
    for place, line in console_lines():
        line = re.sub(r"[\[\]]|\|\S+|\.\.\.", "", line.split("  #")[0])
        try:
            count += parsed(shlex.split(line))
        except (Exception, SystemExit) as error:
            pytest.fail(f"{place}\n{type(error).__name__}: {error}")
    assert count > 35
