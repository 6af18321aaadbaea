"""What travels with the weights: tokenizer, chat templates, processors, generation settings, licences. Nothing of it is run."""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from hf_linattn.models import STUB_NAME
from recipes.common.checkpoint import companions
from recipes.common.reading import not_outside, read_json

TEMPLATES = "additional_chat_templates"
_LEFT = (".*", "config.json", "*.index.json", "conversion.json", "trainer_state.json", "*_results.json", "requirements.txt")
_CODED = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_OWN_IMPORT = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import|from\s+\.\s+import\s+(\w+))", re.MULTILINE)


def copy_companions(source: Path, folder: Path) -> None:
    """Copies them from the folder ``source`` into ``folder``.

    Raises:
        ConversionError: a link among them leads out of ``source``.
    """
    for path in companions(source):
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in _LEFT):
            shutil.copyfile(path, folder / path.name)
    for path in sorted((source / TEMPLATES).glob("*.jinja")):
        (folder / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(not_outside(source, path), folder / TEMPLATES / path.name)
    for name in sorted(_modules(source)):
        if name != STUB_NAME:
            shutil.copyfile(not_outside(source, source / name), folder / name)


def named_code(folder: Path, config: str) -> list[str]:
    """The modules that the ``auto_map`` of a configuration file names, such as ``tokenization_x``."""
    path = folder / config
    content = read_json(path) if path.is_file() else None
    auto_map = content.get("auto_map") if isinstance(content, dict) else None
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    names = [name for value in values for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]
    return [name.rpartition(".")[0] for name in names]


def _modules(folder: Path) -> set[str]:
    """The files of code that tokenizer and processors name, and those that these import from beside them."""
    found: set[str] = set()
    waiting = [name for config in _CODED for name in named_code(folder, config)]
    while waiting:
        name = waiting.pop() + ".py"
        if name not in found and (folder / name).is_file():
            found.add(name)
            waiting += _imported(not_outside(folder, folder / name))
    return found


def _imported(path: Path) -> Iterator[str]:
    for match in _OWN_IMPORT.finditer(path.read_text(encoding="utf-8", errors="replace")):
        yield match[1] or match[2]
