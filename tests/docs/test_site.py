"""The site builds without a warning, and says what the code says."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from markdown_pages import ROOT, markdown_pages
from mkdocs.commands.build import build
from mkdocs.config import load_config

import hf_linattn
from docs import option_tables


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a warning, such as of a link or an anchor that leads nowhere, ends it."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    assert [name for name in hf_linattn.__all__ if f'id="hf_linattn.{name}"' not in page] == []


def test_options_are_those_of_the_code() -> None:
    page = option_tables.PAGE.read_text(encoding="utf-8")
    assert option_tables.filled(page) == page, "run: python docs/option_tables.py"
    for option in ("softmax_layers", "normalize_qk", "sinks", "--keep-softmax", "--window-control", "--kl-weight", "turn_pictures"):
        assert f"| `{option}` |" in page, option


def test_every_variable_of_the_environment_is_told() -> None:
    sources = [ROOT / "setup.py", *(path for name in ("hf_linattn", "convert", "recipes") for path in (ROOT / name).rglob("*.py"))]
    read = {name for path in sources for name in re.findall(r"\bHF_LINATTN_[A-Z_]+", path.read_text(encoding="utf-8"))}
    assert sorted(read) == sorted(
        re.findall(r"^\| `(HF_LINATTN_\w+)`", (ROOT / "docs" / "options.md").read_text(encoding="utf-8"), re.MULTILINE)
    )


def test_the_readme_is_the_front_page(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    assert "Which way is mine?" in page and 'src="benchmarks/results/smollm2.png"' in page
    assert (site / "benchmarks" / "results" / "smollm2.png").is_file()


@pytest.mark.parametrize("page", markdown_pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []
