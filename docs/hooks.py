"""What mkdocs asks when it builds the site: which files it has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

FOLDERS = ("docs", "convert", "recipes", "kernels", "examples", "benchmarks", "tests")
LINK = re.compile(r"\]\(([^)\s#:]+)[^)]*\)")


def markdown_files(root: Path) -> list[Path]:
    """The pages: every Markdown file of the repository."""
    return sorted([*root.glob("*.md"), *(page for folder in FOLDERS for page in (root / folder).rglob("*.md"))])


def linked_files(page: Path) -> set[Path]:
    """Files other than pages that a page shows or links to: pictures, sources, settings."""
    found = {(page.parent / target).resolve() for target in LINK.findall(page.read_text(encoding="utf-8"))}
    return {path for path in found if path.is_file() and path.suffix != ".md"}


def on_files(files: Files, config: Any) -> Files:
    """Pages and what they link to under the paths of the repository, so that a link leads to the same place here and there."""
    root = Path(config.config_file_path).resolve().parent
    pages = markdown_files(root)
    paths = [*pages, *sorted(set().union(*map(linked_files, pages)))]
    return Files([*_of_the_theme(files), *(_file(path.relative_to(root).as_posix(), root, config) for path in paths)])


def _of_the_theme(files: Files) -> list[File]:
    return [file for file in files if file.generated_by]


def _file(path: str, root: Path, config: Any) -> File:
    usual = File(path.removeprefix("docs/"), str(root), config.site_dir, config.use_directory_urls)
    return File(path, str(root), config.site_dir, config.use_directory_urls, dest_uri=usual.dest_uri)
