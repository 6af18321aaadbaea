"""Make the data of one task ready for training: python -m recipes.lra.prepare TASK --out DIR

ListOps and Pathfinder are generated, Text and Image come from the hub, unless --source names a folder with the files. DIR then holds
train.npz, valid.npz and test.npz (compact arrays, what training reads), prepared.json (how they were made), and for generated data the
release's own files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from tqdm import tqdm

from recipes.common import cli
from recipes.common.errors import RecipeError
from recipes.common.files import check_target, clear_up, output_path, staged_directory, write_json

from . import listops, pathfinder
from .data import HUB, SPLITS, TASKS, Sequences, Split, Task, encode_listops, read_folder, read_hub, read_prepared, shortened
from .parallel import ordered_map

COMMAND = "recipes.lra.prepare"
IMAGES_PER_FOLDER = 1000


def prepare(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(TASKS)}.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.", show_default=False)],
    source: Annotated[
        str | None,
        typer.Option("--source", help="A folder with the files, hub, or hub:NAME; default: generated, or the hub.", show_default=False),
    ] = None,
    train: Annotated[int | None, typer.Option("--train", help="Examples to train on; default: the published number.")] = None,
    valid: Annotated[int | None, typer.Option("--valid", help="Examples to validate on.")] = None,
    test: Annotated[int | None, typer.Option("--test", help="Examples to test on.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides what is generated, held out or left out.")] = 0,
    processes: Annotated[int, typer.Option("--processes", help="Default: one for each core.")] = 0,
    images: Annotated[
        Literal["png", "npz"], typer.Option("--images", help="Generated images as the release's PNG files too, or in the .npz only.")
    ] = "png",
    overwrite: cli.Overwrite = False,
) -> None:
    """Write the three splits of TASK into a new folder. A folder made by the same command is left as it is."""
    spec = TASKS.get(task)
    if spec is None:
        raise RecipeError(f"{task!r} is no task; choose one of {', '.join(TASKS)}")
    for name, count in {"--train": train, "--valid": valid, "--test": test}.items():
        if count is not None and count < 1:
            raise RecipeError(f"{name} is {count}; give 1 or more")
    generated = source is None and spec.name in GENERATORS
    if source is None and not generated:
        if spec.name not in HUB:
            raise RecipeError(
                f"{task} has no generator and no set on the hub; give --source FOLDER with the release's files (lra_release, tsv_data)"
            )
        source = "hub"
    request: dict[str, Any] = {"task": task, "source": source or "generated", "counts": [train, valid, test], "seed": seed}
    if generated:
        request["rules"] = GENERATORS[spec.name].rules
        if spec.side:
            request["images"] = images
    out = output_path(out)
    clear_up(out.parent, out.name)
    if out.exists() and not overwrite and (out / "prepared.json").is_file():
        there = read_prepared(out)
        examples = there.get("examples")
        if all(there.get(key) == value for key, value in request.items()) and isinstance(examples, dict):
            print(f"{out} is ready: {', '.join(f'{count} {split}' for split, count in examples.items())}")
            return
        changed = next(key for key, value in (request | {"examples": "whole"}).items() if there.get(key) != value)
        raise RecipeError(
            f"{out} holds other data ({changed} is {there.get(changed)!r:.50}, not {request.get(changed)!r}); choose another folder, "
            "or --overwrite"
        )
    inputs = [source] if source else []
    check_target(out, COMMAND, overwrite=overwrite, inputs=inputs)
    workers = processes or os.cpu_count() or 1
    with staged_directory(out, COMMAND, overwrite=overwrite, inputs=inputs) as aside:
        if generated:
            sizes = tuple(published if count is None else count for count, published in zip((train, valid, test), spec.sizes, strict=True))
            splits = GENERATORS[spec.name](spec, aside, sizes, seed, workers, images)
        else:
            assert source is not None
            if source == "hub" or source.startswith("hub:"):
                splits = read_hub(spec, source[4:] or HUB.get(spec.name) or _no_hub(task), seed)
            elif Path(source).is_dir():
                splits = read_folder(spec, Path(source), seed, workers)
            else:
                raise RecipeError(f"--source {source}: no such folder; give a folder, hub, or hub:NAME")
            splits = {name: shortened(splits[name], count, seed) for name, count in zip(SPLITS, (train, valid, test), strict=True)}
        if empty := [name for name, split in splits.items() if not len(split)]:
            raise RecipeError(f"{source}: no examples to {', '.join(empty)} on; give the files that hold them")
        for name, split in tqdm(splits.items(), desc="writing", leave=False):
            split.save(aside / f"{name}.npz")
        examples = {name: len(split) for name, split in splits.items()}
        write_json(aside / "prepared.json", {**request, "examples": examples})
    print(f"{out}: {', '.join(f'{count} {name}' for name, count in examples.items())}")


def _no_hub(task: str) -> str:
    raise RecipeError(f"{task} has no default set on the hub; give --source hub:NAME")


def make_listops(out: Path, sizes: tuple[int, ...], seed: int, processes: int) -> dict[str, Split]:
    """basic_train.tsv, basic_val.tsv and basic_test.tsv with the columns Source and Target, as in the release."""
    pairs = iter(tqdm(listops.generate(sum(sizes), seed, processes), total=sum(sizes), desc="listops", unit=" trees"))
    splits = {}
    for name, file_name, count in zip(SPLITS, ("basic_train", "basic_val", "basic_test"), sizes, strict=True):
        tokens, labels = [], []
        with (out / f"{file_name}.tsv").open("w", encoding="ascii", newline="") as file:
            file.write("Source\tTarget\r\n")
            for _ in range(count):
                text, label = next(pairs)
                file.write(f"{text}\t{label}\r\n")
                tokens.append(encode_listops(text))
                labels.append(label)
        splits[name] = Split((Sequences.of(tokens),), np.array(labels, np.int64))
    return splits


@dataclass(frozen=True)
class PathfinderFolder:
    """Makes imgs/K and metadata/K.npy of the release's layout under `root`, or only the pixels where root is None."""

    rules: pathfinder.Rules
    seed: int
    total: int
    root: Path | None

    def __call__(self, folder: int) -> np.ndarray:
        """The folder's images, uint8 (images, size * size); fewer than IMAGES_PER_FOLDER in the last."""
        numbers = range(folder * IMAGES_PER_FOLDER, min((folder + 1) * IMAGES_PER_FOLDER, self.total))
        pixels = np.empty((len(numbers), self.rules.size**2), np.uint8)
        lines = []
        if self.root is not None:
            (self.root / "imgs" / str(folder)).mkdir(parents=True)
        for place, number in enumerate(numbers):
            scene = pathfinder.make_scene(self.rules, self.seed, number)
            image = pathfinder.render(self.rules, scene)
            pixels[place] = image.reshape(-1)
            lines.append(self.write(folder, place, image, scene))
        if self.root is not None:
            (self.root / "metadata" / f"{folder}.npy").write_text("".join(lines), encoding="ascii")
        return pixels

    def write(self, folder: int, place: int, image: np.ndarray, scene: pathfinder.Scene) -> str:
        """Save one image and return its line of metadata."""
        from PIL import Image

        rules = self.rules
        if self.root is not None:
            Image.fromarray(image).save(self.root / "imgs" / str(folder) / f"sample_{place}.png", compress_level=1)
        return (
            f"imgs/{folder} sample_{place}.png {place} {scene.label} {rules.continuity} {rules.contour_length} {rules.distractor_length} "
            f"{rules.paddle_length} {rules.paddle_thickness} {scene.margin} 1\n"
        )

    def replace(self, number: int, attempt: int) -> np.ndarray:
        """Another image with the same number and label."""
        scene = pathfinder.make_scene(self.rules, self.seed, number, attempt)
        image = pathfinder.render(self.rules, scene)
        self.write(number // IMAGES_PER_FOLDER, number % IMAGES_PER_FOLDER, image, scene)
        return image.reshape(-1)


def make_pathfinder(task: Task, out: Path, sizes: tuple[int, ...], seed: int, processes: int, images: str) -> dict[str, Split]:
    """Images 0 to n - 1 in the release's layout, the splits one after another; no image twice."""
    rules, total = pathfinder.RULES[task.side], sum(sizes)
    root = out / f"pathfinder{task.side}" / "curv_contour_length_14" if images == "png" else None
    if root is not None:
        (root / "metadata").mkdir(parents=True)
    maker = PathfinderFolder(rules, seed, total, root)
    folders = -(-total // IMAGES_PER_FOLDER)
    pixels = np.empty((total, task.length), np.uint8)
    with tqdm(total=total, desc=task.name, unit=" images") as bar:
        for folder, part in enumerate(ordered_map(maker, range(folders), processes)):
            pixels[folder * IMAGES_PER_FOLDER :][: len(part)] = part
            bar.update(len(part))
    seen: set[bytes] = set()
    for number in range(total):
        attempt = 0
        while (key := hashlib.blake2b(pixels[number], digest_size=16).digest()) in seen:
            attempt += 1
            pixels[number] = maker.replace(number, attempt)
        seen.add(key)
    labels = np.arange(total) % 2
    return {
        name: Split((Sequences(part.reshape(-1), np.arange(len(part) + 1) * task.length),), labels[start : start + len(part)])
        for name, part, start in _cut(pixels, sizes)
    }


def _cut(pixels: np.ndarray, sizes: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray, int]]:
    start = 0
    for name, size in zip(SPLITS, sizes, strict=True):
        yield name, pixels[start : start + size], start
        start += size


@dataclass(frozen=True)
class Generator:
    """Which rules a generator follows, raised by one when the same seed gives other data."""

    rules: int = 1

    def __call__(self, task: Task, out: Path, sizes: tuple[int, ...], seed: int, processes: int, images: str) -> dict[str, Split]:
        if task.name == "listops":
            return make_listops(out, sizes, seed, processes)
        return make_pathfinder(task, out, sizes, seed, processes, images)


GENERATORS = {name: Generator() for name in ("listops", "pathfinder", "pathfinder64", "pathx")}


if __name__ == "__main__":
    cli.run(prepare)
