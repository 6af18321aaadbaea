"""Hold models side by side on the same stories: how well they predict, how they go on, what decoding costs.

    python -m recipes.tinystories.evaluate MODEL [MODEL ...] --data FILE_OR_ID [--out DIR]

MODEL is a folder or hub id, or NAME=MODEL to name its row. Each story is scored by itself, from its start token, cut at --length tokens.
Writes evaluation.md, evaluation.json and evaluation.png into DIR.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recipes.common import cli
from recipes.common.errors import RecipeError
from recipes.common.files import check_target, staged_directory, write_json, write_text
from recipes.common.reading import refuse_missing_folder

COMMAND = "recipes.tinystories.evaluate"
LONGEST = 2**24
DTYPES = ("float32", "bfloat16", "float16")


def main(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or hub ids, or NAME=MODEL.", show_default=False)],
    data: Annotated[str, typer.Option(help="A text file or a data set's id on the hub.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("out/evaluation"),
    stories: Annotated[int, typer.Option(help="How many stories are scored, the last ones of the text.", min=1)] = 500,
    length: Annotated[int, typer.Option(help="Tokens at which a story is cut.", min=2)] = 512,
    decode: Annotated[str, typer.Option(help="Lengths at which decoding is measured.")] = "128,512,2048",
    prompt: Annotated[list[str] | None, typer.Option(help="A beginning to go on from; may be repeated. By default stories'.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each continuation.", min=1)] = 80,
    split: Annotated[str, typer.Option(help="Split to read of a hub data set.")] = "validation",
    column: Annotated[str, typer.Option(help="Column of a table that holds the text.")] = "text",
    separator: Annotated[str, typer.Option(help="What stands between stories in a text file.")] = "<|endoftext|>",
    batch_size: Annotated[int, typer.Option(help="Stories of each forward pass.", min=1)] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda; by default a GPU if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    overwrite: cli.Overwrite = False,
) -> None:
    """Score models on stories, and measure what decoding costs them."""
    named = [named_model(model) for model in models]
    inputs = [data, *(path for _, path in named)]
    check_target(out, COMMAND, overwrite=overwrite, inputs=inputs)
    lengths = _lengths(decode)
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: expected float32, bfloat16 or float16")
    for _, path in named:
        refuse_missing_folder(path)
    # Late, since importing torch takes seconds: what is wrong with the arguments has been said by now.
    from transformers.utils import logging

    from recipes.common.documents import Source
    from recipes.tinystories.data import first_words, last_stories
    from recipes.tinystories.evaluation import draw, machine, markdown, measure, show, usable_device

    logging.set_verbosity_error()
    target = usable_device(device)
    texts = last_stories([Source(data, split, column, separator, column_option="--column")], stories)
    prompts = prompt or first_words(texts, 2, 8)
    asked = {"length": length, "lengths": lengths, "tokens": tokens, "batch_size": batch_size}
    results = [measure(model, texts, prompts, device=target, dtype=dtype, **asked) for model in named]  # type: ignore[arg-type]
    conditions = {"data": data, "stories": len(texts), "length": length, "dtype": dtype, **machine(target)}
    with staged_directory(out, COMMAND, overwrite=overwrite, inputs=inputs) as place:
        write_json(place / "evaluation.json", {"conditions": conditions, "models": results})
        write_text(place / "evaluation.md", markdown(conditions, results))
        draw(place / "evaluation.png", results)
    show(conditions, results)
    print(f"written to {out}: evaluation.md, evaluation.json, evaluation.png")


def named_model(named: str) -> tuple[str, str]:
    """NAME and MODEL of NAME=MODEL; the name is empty where there is none."""
    name, _, path = named.rpartition("=") if not Path(named).exists() else ("", "", named)
    return name, path


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        lengths = [0]
    if not all(1 <= n <= LONGEST for n in lengths):
        raise RecipeError(f"--decode {text!r}: expected whole numbers from 1 to {LONGEST:,} with commas between, such as 128,512")
    return lengths


if __name__ == "__main__":
    cli.run(main)
