"""Swaps a checkpoint's softmax attention for linear attention: ``linattn convert SOURCE OUTPUT``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from convert.commands import command, parameter
from convert.errors import ConversionError, stage
from convert.options import LinearizeOptions
from recipes.common import cli
from recipes.common.files import check_target, output_path, staged_directory
from recipes.common.reading import refuse_missing_folder, user_path

if TYPE_CHECKING:
    from convert.costs import Costs

COMMAND = "convert.linearize"
REPORT = "conversion.json"


def linearize(
    source: str | Path,
    output: str | Path,
    options: LinearizeOptions | None = None,
    on_shard: Callable[[Path], None] = lambda shard: None,
    on_costs: Callable[[Costs], None] = lambda costs: None,
) -> dict[str, Any]:
    """Converts the checkpoint ``source`` into the folder ``output``, which appears whole or not at all.

    Args:
        source: a local folder or a hub id.
        output: a folder that does not exist yet, or with ``options.overwrite`` one that this function wrote.
        options: how to convert; the defaults of :class:`LinearizeOptions` where None.
        on_shard: called with each weight file once it is written.
        on_costs: called with what generating will cost, before anything is written.

    Returns:
        The content of ``output``/conversion.json.

    Raises:
        ConversionError: the source cannot be converted, an option does not fit it, or the output cannot be written.
    """
    options, output = options or LinearizeOptions(), output_path(output)
    check_target(output, COMMAND, overwrite=options.overwrite, inputs=[source])
    refuse_missing_folder(str(source))
    if options.revision is not None and user_path(source).exists():
        raise ConversionError(f"--revision {options.revision} is of a hub id, and {source} lies on this machine; leave it out")
    return _convert(str(source), output, options, on_shard, on_costs)


def _convert(
    source: str, output: Path, options: LinearizeOptions, on_shard: Callable[[Path], None], on_costs: Callable[[Costs], None]
) -> dict[str, Any]:
    # Late, since importing torch takes seconds: what is wrong with the arguments has been said by now.
    import torch
    import transformers

    from convert.card import model_card
    from convert.check import check_converted
    from convert.companions import copy_companions
    from convert.config import converted_config
    from convert.costs import generating_costs
    from convert.gguf import unpacked
    from convert.report import conversion_report
    from convert.source import open_source
    from convert.weights import new_parameters, stored_tensors, write_weights
    from hf_linattn.models import write_stub
    from recipes.common.blame import naming_the_key

    transformers.utils.logging.disable_progress_bar()
    with unpacked(source, options.dtype) as name:
        opened = replace(open_source(name, options.revision), name=source)
        with naming_the_key(opened.config, opened.folder / "config.json"):
            config, model_class, dropped = converted_config(opened, options)
            parameters = new_parameters(opened, model_class, config)
        costs = generating_costs(config, options.large_state)
        on_costs(costs)
        dtype = getattr(torch, options.dtype) if options.dtype else None
        with staged_directory(output, COMMAND, overwrite=options.overwrite, inputs=[opened.folder]) as folder, stage(f"writing {output}"):
            _require_space(folder, opened.nbytes)
            write_weights(opened, stored_tensors(parameters), folder, dtype, on_shard)
            config.save_pretrained(folder)
            write_stub(type(config), folder)
            copy_companions(opened.folder, folder)
            checked = check_converted(folder, model_class, opened, options) if options.check else None
            given = asdict(options) | {"keep_softmax": list(options.keep_softmax)}
            report = conversion_report(opened, config, given, dropped, parameters, costs, checked)
            (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(model_card(opened, config, report, costs), encoding="utf-8")
    return report


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConversionError(f"{folder.parent} has {free / 1e9:.1f} GB free, and the converted checkpoint needs {needed / 1e9:.1f} GB")


def _run(options: LinearizeOptions, source: str, output: Path) -> None:
    """Convert the softmax checkpoint SOURCE into a linear-attention checkpoint OUTPUT."""
    console = cli.console()

    def tell(costs: Costs) -> None:
        console.print(f"Generating will take {costs.sentence()} In bytes, by form:", soft_wrap=True)
        for name, size in costs.forms.items():
            console.print(f"  {size:>13,}  {name}", soft_wrap=True)

    with console.status("Converting") as status:
        report = linearize(source, output, options, on_shard=lambda shard: status.update(f"Wrote {shard.name}"), on_costs=tell)
    from convert.report import summary

    console.print(summary(output, report))


_SOURCE = parameter("source", str, typer.Argument(help="Folder of the checkpoint, a GGUF file, or a hub id."))
_OUTPUT = parameter("output", Path, typer.Argument(help="Folder to write, which must not exist."))
main = command(LinearizeOptions, _run, _SOURCE, _OUTPUT)
app = cli.app(main)


if __name__ == "__main__":
    app()
