"""Swaps a checkpoint's softmax attention for linear attention: ``python -m convert.linearize SOURCE OUTPUT``."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

import hf_linattn  # noqa: F401  (registers the attention that the check runs)
from convert.card import model_card
from convert.check import check_converted
from convert.errors import ConversionError, one_line
from convert.losses import dropped_features
from convert.output import check_output, written_aside
from convert.report import conversion_report, summary
from convert.source import Source, open_source
from convert.weights import floating_dtype, new_parameters, write_weights
from hf_linattn.config import LinAttnConfig
from hf_linattn.layers import LARGEST_START
from hf_linattn.models import auto_map, config_class_for, model_class_for, write_stub

REPORT = "conversion.json"
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
_NOT_COPIED = ("config.json", "*.index.json", "conversion.json", "trainer_state.json", "*_results.json", "requirements.txt")


class Kernel(str, Enum):
    """The attention weight: a + b s, or a + b s + c s^2."""

    linear = "linear"
    quadratic = "quadratic"


class Decay(str, Enum):
    """No decay with distance, or one learned rate per query head."""

    none = "none"
    head = "head"


class DType(str, Enum):
    """What to store the source's floating-point weights as."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class LinearizeOptions:
    """How to convert. The command line's options, by the same names; README.md says what each does.

    Attributes:
        kernel: ``linear`` or ``quadratic``.
        decay: ``head`` or ``none``.
        keep_softmax: indices of the layers that keep softmax attention.
        temperature: where the temperature starts; None: 0.98 (linear), 2 (quadratic).
        dropout: probability of noise dropout in training; None: the model's own attention dropout.
        learnable: whether the new parameters are trained.
        dtype: None keeps the source's.
        revision: branch, tag or commit of a hub id.
        overwrite: whether an existing checkpoint at the output is replaced.
        check: whether the result is loaded and run before it takes its place.
    """

    kernel: str = "linear"
    decay: str = "head"
    keep_softmax: tuple[int, ...] = ()
    temperature: float | None = None
    dropout: float | None = None
    learnable: bool = True
    dtype: str | None = None
    revision: str | None = None
    overwrite: bool = False
    check: bool = True


def linearize(
    source: str | Path,
    output: str | Path,
    options: LinearizeOptions = LinearizeOptions(),
    on_shard: Callable[[Path], None] = lambda shard: None,
) -> dict[str, Any]:
    """Converts the checkpoint ``source`` into the folder ``output``, which appears whole or not at all.

    Args:
        source: a local folder or a hub id.
        output: a folder that does not exist yet.
        options: how to convert.
        on_shard: called with each weight file once it is written.

    Returns:
        The content of ``output``/conversion.json.

    Raises:
        ConversionError: the source cannot be converted, an option does not fit it, or the output cannot be written.
    """
    output = Path(output).expanduser()
    opened = open_source(str(source), options.revision)
    check_output(output, opened.folder, options.overwrite)
    config, model_class, dropped = _converted_config(opened, options)
    added = new_parameters(model_class, config)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    with written_aside(output, options.overwrite) as folder:
        _require_space(folder, opened.nbytes)
        write_weights(opened, added, folder, dtype, on_shard)
        config.save_pretrained(folder)
        write_stub(type(config), folder)
        _copy_companions(opened, folder)
        checked = check_converted(folder, model_class, opened, dtype) if options.check else None
        given = asdict(options) | {"keep_softmax": list(options.keep_softmax)}
        report = conversion_report(opened, config, given, dropped, added, checked)
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(opened, config, report), encoding="utf-8")
    return report


def _converted_config(source: Source, options: LinearizeOptions) -> tuple[Any, Any, list[dict[str, Any]]]:
    config_class = config_class_for(source.config["model_type"])
    try:
        stored = {key: value for key, value in source.config.items() if key not in ("model_type", "auto_map", "transformers_version")}
        config: Any = config_class.from_dict(stored)  # type: ignore[attr-defined]
        model_class = model_class_for(config_class, (source.config.get("architectures") or [None])[0])
    except Exception as error:
        raise ConversionError(f"{source.name}: {one_line(error)}") from error
    count, kept = config.num_hidden_layers, sorted(set(options.keep_softmax))
    outside = [layer for layer in kept if not 0 <= layer < count]
    if outside:
        raise ConversionError(f"--keep-softmax names layer {outside[0]}, but {source.name} has layers 0 to {count - 1}")
    if len(kept) == count:
        raise ConversionError(f"--keep-softmax names every layer of {source.name}: nothing is left to convert")
    dropped = dropped_features(config, [layer not in kept for layer in range(count)])
    try:
        default = LARGEST_START if options.kernel == "linear" else 2.0
        config.linattn = LinAttnConfig(
            kernel=options.kernel,
            decay=options.decay,
            temperature=default if options.temperature is None else options.temperature,
            softmax_layers=kept,
            dropout=options.dropout,
            learnable=options.learnable,
        ).to_dict()
    except (TypeError, ValueError) as error:
        raise ConversionError(str(error)) from error
    config.attn_implementation = "linattn"
    config.auto_map = auto_map(config_class)
    config.architectures = [model_class.__name__]
    if options.dtype:
        if options.dtype not in list(DType):
            raise ConversionError(f"the dtype {options.dtype!r} is unknown; give one of {', '.join(DType)}")
        config.dtype = options.dtype
    elif getattr(config, "dtype", None) is None:
        config.dtype = str(floating_dtype(source)).removeprefix("torch.")
    return config, model_class, dropped


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConversionError(f"{folder.parent} has {free / 1e9:.1f} GB free, and the converted checkpoint needs {needed / 1e9:.1f} GB")


def _copy_companions(source: Source, folder: Path) -> None:
    for path in sorted(source.folder.iterdir()):
        wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in _COPIED)
        if wanted and path.is_file() and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _NOT_COPIED):
            shutil.copyfile(path, folder / path.name)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConversionError(f"--keep-softmax takes layer numbers such as 0,5, not {text!r}") from None


@app.command()
def main(
    source: Annotated[str, typer.Argument(help="Folder of the checkpoint, or a hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    kernel: Annotated[Kernel, typer.Option(help="Attention weight: a + b s, or a + b s + c s^2.")] = Kernel.linear,
    decay: Annotated[Decay, typer.Option(help="A learned decay per query head, or none.")] = Decay.head,
    keep_softmax: Annotated[str, typer.Option(help="Layers that stay softmax, such as 0,5.")] = "",
    temperature: Annotated[float | None, typer.Option(help="Its start [0.98 linear, 2 quadratic].", show_default=False)] = None,
    dropout: Annotated[float | None, typer.Option(help="Noise dropout in training [the model's own].", show_default=False)] = None,
    learnable: Annotated[bool, typer.Option(help="Train the new parameters, or keep them as they start.")] = True,
    dtype: Annotated[DType | None, typer.Option(help="Store the weights as this [as they are].", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint at OUTPUT.")] = False,
    check: Annotated[bool, typer.Option(help="Load and run the result before it takes its place.")] = True,
) -> None:
    """Convert the softmax checkpoint SOURCE into a linear-attention checkpoint OUTPUT."""
    console, errors = Console(), Console(stderr=True)
    transformers.utils.logging.disable_progress_bar()
    try:
        options = LinearizeOptions(
            kernel=kernel.value,
            decay=decay.value,
            keep_softmax=_layers(keep_softmax),
            temperature=temperature,
            dropout=dropout,
            learnable=learnable,
            dtype=dtype.value if dtype else None,
            revision=revision,
            overwrite=overwrite,
            check=check,
        )
        with console.status("Converting") as status:
            report = linearize(source, output, options, on_shard=lambda shard: status.update(f"Wrote {shard.name}"))
    except ConversionError as error:
        errors.print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None
    console.print(summary(output, report))


if __name__ == "__main__":
    app()
