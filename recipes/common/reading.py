"""Files that others wrote are doubted: how much is read of them, what it may hold, and where the names in them may lead.

Everything here raises RecipeError: one sentence that names the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NoReturn

import yaml

from recipes.common.errors import RecipeError, sentence

MOST_BYTES = 64 * 2**20
"""Of a JSON file; the index of a model of 100,000 tensors has 10 MB."""
MOST_YAML_BYTES = 2**20
MOST_YAML_VALUES = 100_000
"""Once every alias stands for what it names."""
DEEPEST = 50

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DATA_SET = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def inside(folder: Path, name: Any, where: str | Path) -> Path:
    """The path of `name`, read in the file `where` of `folder`; it leads to something in that folder, or to nothing.

    A link in a snapshot of the hub's cache may lead to that repository's blobs.

    Raises:
        RecipeError: `name` is no text, absolute, holds "..", or is a link out of the folder.
    """
    path = _plain(name)
    if path is None:
        raise RecipeError(f"{where} names the file {name!r:.200}, and only names inside its own folder are followed")
    return not_outside(folder, folder / path)


def not_outside(folder: Path, path: Path) -> Path:
    """`path`, below `folder`, once it is known that no link on its way leads out of the folder.

    Raises:
        RecipeError: one does.
    """
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith(("models--", "datasets--")):
        homes.append(home.parent.parent / "blobs")
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise RecipeError(f"{path} cannot be resolved ({sentence(error)}); put the file itself there") from None
    if not any(real.is_relative_to(place) for place in homes):
        raise RecipeError(f"{path} is a link out of its folder, to {real}, and such links are not followed; put the file itself there")
    return path


def _plain(name: Any) -> PurePosixPath | None:
    if not isinstance(name, str) or not name or "\0" in name or len(name) > 1000:
        return None
    windows = PureWindowsPath(name)
    return None if windows.drive or windows.root or ".." in windows.parts else PurePosixPath(name)


def read_json(path: Path) -> Any:
    """The content of a JSON file of at most 64 MiB.

    Raises:
        RecipeError: it cannot be read, or is too large, nested too deep, no JSON, or doubtful: a key twice in one object, a number that
            is not finite.
    """
    return parse_json(read_text(path, MOST_BYTES), path)


def parse_json(text: str, where: str | Path) -> Any:
    """The value of `text`; `where` names its origin in errors, which are those of `read_json`."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_number, parse_float=_finite, parse_int=_bounded)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where} is not readable as JSON ({sentence(error)}): write, copy or download it again") from None
    if _depth(value) > DEEPEST:
        raise RecipeError(f"{where} is nested more than {DEEPEST} deep; write, copy or download it again")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.100} stands twice in one object")
    return values


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON has")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.40} is too large")
    return value


def _bounded(text: str) -> int:
    _finite(text)  # what no floating-point number can stand for would fail wherever it is first divided
    return int(text)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [inner for item in level if isinstance(item, (dict, list)) for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def read_yaml(path: Path) -> Any:
    """The content of a YAML file of at most 1 MiB.

    Raises:
        RecipeError: it cannot be read, or is too large, no YAML, or doubtful: a key twice in one mapping, values nested too deep, or
            too many values once every alias stands for what it names.
    """
    return parse_yaml(read_text(path, MOST_YAML_BYTES), path)


def parse_yaml(text: str, where: str | Path) -> Any:
    """The value of `text`; `where` names its origin in errors, which are those of `read_yaml`."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:  # wrong dates and numbers raise their own
        raise RecipeError(f"{where}: not YAML ({' '.join(str(error).split())[:200]})") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader without repeated keys, and with bounds on depth and on the number of values."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"nested more than {DEEPEST} deep, line {self.peek_event().start_mark.line + 1}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_document(self) -> yaml.Node | None:
        node = super().compose_document()
        if node is not None:
            values, depth = _size(node, {})
            if values > MOST_YAML_VALUES or depth > DEEPEST:
                raise yaml.YAMLError(f"more than {MOST_YAML_VALUES:,} values, or {DEEPEST} deep, once its aliases are written out")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.YAMLError(f"the key {key.value!r:.100} stands twice, line {key.start_mark.line + 1}")
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _size(node: yaml.Node, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """How many values a node stands for and how deep they are nested, its aliases written out; infinite where it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf, math.inf  # until it is known: a node that is met inside itself
        sizes = [_size(inner, known) for inner in _inner(node)]
        known[id(node)] = 1 + sum(values for values, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    return known[id(node)]


def _inner(node: yaml.Node) -> Iterator[yaml.Node]:
    for item in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from item if isinstance(item, tuple) else (item,)


def open_file(path: Path) -> BinaryIO:
    """Opens a file to read. What is none, such as a pipe or a device, might never begin or never end.

    Raises:
        RecipeError: it is none.
        OSError: it cannot be opened.
    """
    if path.exists() and not path.is_file():
        raise RecipeError(f"{path} is no file but a folder, a pipe or a device; give a file that can be read")
    return path.open("rb")


def read_text(path: Path, most: int) -> str:
    """The UTF-8 text of a file of at most `most` bytes.

    Raises:
        RecipeError: it cannot be read, or is larger.
    """
    try:
        with open_file(path) as file:
            data = file.read(most + 1)
        text = data[:most].decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text ({sentence(error)}); write, copy or download it again") from None
    except RecipeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
        raise RecipeError(f"{path} cannot be read ({getattr(error, 'strerror', error)}); give a file that can be") from None
    if len(data) > most:
        raise RecipeError(f"{path} is larger than {most // 2**20} MiB, which no such file is; give the right file")
    return text


def user_path(name: str | Path) -> Path:
    """The path that a user names, where ~ is a home.

    Raises:
        RecipeError: it is empty, or begins with ~ and a name, and nobody is called that here.
    """
    if name == "":  # which pathlib takes for the working folder
        raise RecipeError("an empty name was given where something is to be read; give a file, a folder, or a hub id")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise RecipeError(f"{name} begins with the home of a user who is not known here; write the path out") from None


def is_data_set(name: str) -> bool:
    """Whether `name` is OWNER/NAME, a data set's id on the hub. A bare word such as json names a reader of files to the library
    `datasets`, which then reads all such files in the working folder."""
    return _DATA_SET.fullmatch(name) is not None


def refuse_missing_folder(name: str) -> None:
    """Refuses a `name` that no hub could know, or that points into a folder of this machine where nothing has that name.

    Raises:
        RecipeError: there is no such folder.
    """
    path = user_path(name)
    if path.exists():
        return
    if not _HUB_ID.fullmatch(name) or name.startswith(".") or "\\" in name:
        raise RecipeError(f"there is no folder {name}, and this is no hub id such as EleutherAI/pythia-14m either")
    if "/" in name and path.parent.is_dir():
        raise RecipeError(f"there is no folder {path}, though {path.parent} exists, so the hub is not asked for it; give one that exists")
