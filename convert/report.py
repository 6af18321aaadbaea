"""What a conversion did: the content of conversion.json, and its summary on screen."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from convert.check import CheckReport
from convert.costs import Costs
from convert.source import Source
from convert.weights import stored_tensors
from hf_linattn.config import LinAttnConfig, attention_layers
from hf_linattn.forms import LinAttnParams
from hf_linattn.forms.parameters import OFFSET
from recipes.common.tables import pairs

_PACKAGES = ("hf_linattn", "torch", "transformers", "safetensors")


def conversion_report(
    source: Source,
    config: Any,
    options: dict[str, Any],
    dropped: list[dict[str, Any]],
    added: dict[str, LinAttnParams],
    costs: Costs,
    checked: CheckReport | None,
) -> dict[str, Any]:
    """The content of conversion.json.

    Args:
        source: what was converted.
        config: the converted configuration.
        options: as they were given.
        dropped: what linear layers leave behind.
        added: the new parameters by the name of their module.
        costs: what generating takes.
        checked: what the check found, None where it was left out.
    """
    kept = config.linattn["softmax_layers"]
    return {
        "source": source.name,
        "revision": source.folder.name if source.hub_id else None,
        "options": options,
        "linattn": config.linattn,
        "linear_layers": [layer for layer in attention_layers(config) if layer not in kept],
        "starting_values": _starting_values(config, added),
        "dropped": dropped,
        "costs": asdict(costs),
        "parameters": {"source": source.numbers, "added": _numbers(added)},
        "check": asdict(checked) if checked else None,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the packages that decide what a conversion gives, and of Python."""
    return {package: _version(package) for package in _PACKAGES} | {"python": platform.python_version()}


def summary(output: Path, report: dict[str, Any]) -> Table:
    """The report as a table for the screen."""
    table = pairs(f"{report['source']} -> {output}")
    linattn, parameters = report["linattn"], report["parameters"]
    form = LinAttnConfig(**linattn).attention.describe(linattn["learnable"])
    table.add_row("linear layers", f"{len(report['linear_layers'])}, {form}")
    table.add_row("softmax layers", ", ".join(map(str, linattn["softmax_layers"])) or "none")
    table.add_row("parameters", f"{parameters['source']:,} + {parameters['added']:,} new")
    for item in report["dropped"]:
        table.add_row("dropped", f"{item['what']} = {item['value']} in {len(item['layers'])} layers: {item['note']}")
    table.add_row("state", f"{report['costs']['state']:,} bytes a sequence")
    checked = report["check"]
    if checked is None:
        table.add_row("check", "left out (--no-check)")
        return table
    table.add_row("check", f"{checked['tensors']} weights equal the source's; logits are finite")
    if checked["ignored"]:
        table.add_row("", f"{len(checked['ignored'])} weights that the model has no use for, such as {checked['ignored'][0]}")
    error = f"{checked['error']:.1e} in one pass, {checked['step_error']:.1e} in cached steps"
    table.add_row("", f"{checked['layers']} attention layers against float64: {error} (plain PyTorch {checked['plain_error']:.1e})")
    return table


def _numbers(added: dict[str, LinAttnParams]) -> int:
    """How many are new: one that is stored as where it started and what it has learned since counts once."""
    return sum(tensor.numel() for name, tensor in stored_tensors(added).items() if not name.endswith(OFFSET))


def _starting_values(config: Any, added: dict[str, LinAttnParams]) -> dict[str, Any]:
    """What linear layers start with: a list of a number a head for each of temperature, a, b, c, log_decay; where layers differ, because of
    their windows, a list for each layer by its number; the options where a layer has nothing of its own."""
    if not added:
        options = LinAttnConfig(**config.linattn).options
        return {name: value for name, value in asdict(options).items() if isinstance(value, float)}
    starts: dict[str, dict[str, list[float]]] = {}
    for path, module in added.items():
        layer = next(part for part in path.split(".") if part.isdecimal())
        for name, values in module.at_rest().items():
            if name in module.matrices:
                continue
            starts.setdefault(name, {})[layer] = [round(number, 6) for number in values.tolist()]
    return {name: each if len(set(map(str, each.values()))) > 1 else next(iter(each.values())) for name, each in starts.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from a checkout"
