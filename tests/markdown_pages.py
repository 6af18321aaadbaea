"""The Markdown files of the repository."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_OURS = ("out", "build", "dist")


def markdown_pages() -> list[Path]:
    folders = [folder for folder in ROOT.glob("[!.]*/") if folder.name not in NOT_OURS]
    return sorted([*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))])
