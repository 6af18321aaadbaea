"""Finds the layers that should stay softmax, by measured loss and recall.

    python -m convert.select_layers TEACHER --data FILE [--data FILE ...] --out layers.json --count 4

Nothing is trained: layers of the teacher are put under a window of 64 tokens and 4 sinks, one by one and then together, and what that loses
is measured on the last rows of the text and on keys of its own, neither of which ``convert.evaluate`` scores. The file goes to
``convert.linearize --keep-softmax @layers.json`` and to ``convert.evaluate --ranking layers.json``.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from convert.commands import command, parameter
from convert.errors import ConversionError
from convert.evaluation.selection_options import SelectOptions
from recipes.common import cli
from recipes.common.errors import RecipeError
from recipes.common.files import check_apart, check_writable, write_json
from recipes.common.reading import read_json, user_path


def select_layers(options: SelectOptions, tell: Any = print) -> dict[str, Any]:
    """Measures the teacher's layers; what the file holds: each layer alone, the order in which they went, the layers chosen, evenly spaced
    ones and the attention that heads pay to a key.

    Raises:
        ConversionError: the teacher's attention is not softmax over all tokens, it has too few layers, or the text is too short.
    """
    # Late, since importing torch takes seconds: what is wrong with the arguments has been said by now.
    import torch
    from transformers.utils import logging

    from convert.evaluation.measurements import machine
    from convert.evaluation.models import check_length, load, stamp, tokens_at_once, usable_device, usable_dtype
    from convert.evaluation.prompts import Prompts
    from convert.evaluation.selection import Selection, attention_on_keys, choose, evenly_spaced
    from convert.evaluation.text import last_rows
    from hf_linattn.models import attention_modules

    logging.set_verbosity_error()
    o, device = options, usable_device(options.device)
    batch_tokens, teacher = tokens_at_once(o.batch_tokens, device), load(o.teacher, device, usable_dtype(o.dtype, device))
    layers = [module.layer_idx for _, module in attention_modules(teacher.model)]
    if -1 in layers:
        raise ConversionError(f"{o.teacher}: one attention serves several of its layers, so none of them can be measured alone")
    if not o.count < len(layers):
        which = f"the teacher has {len(layers)} layers with attention"
        raise ConversionError(f"--count {o.count}: {which}, and at least one is to become linear; give fewer")
    maker = Prompts(o.data[0], teacher.tokenizer, o.length, f"selection {o.seed}", from_the_end=True)
    prompts = [prompt for distance in o.distances for prompt in maker.make("needle", distance, o.needles)]
    check_length(teacher.model, max(len(prompt.ids) for prompt in prompts) + 16, "--distances")
    key = len(teacher.tokenizer(f" {prompts[0].answer}", add_special_tokens=False)["input_ids"])
    longest = [prompt for prompt in prompts if len(prompt.ids) == len(prompts[0].ids)]
    found: dict[str, Any] = {"attention": attention_on_keys(teacher.model, longest, key, batch_tokens)}
    if o.attention_only:
        ranked = sorted(found["attention"], key=lambda one: -max(one["heads"]))
        found |= {"chosen": sorted(one["layer"] for one in ranked[: o.count])}
    else:
        text = torch.cat([last_rows(path, teacher.tokenizer, o.length, o.rows).ids for path in o.data])
        selection = Selection(teacher.model, teacher.tokenizer, text, prompts, o.window, o.sinks, batch_tokens)
        found |= choose(selection, o.count, o.candidates, o.recall_weight, tell)
    asked = {**asdict(o), "data": [str(path) for path in o.data], "stamps": [stamp(name) for name in (o.teacher, *map(str, o.data))]}
    return {"asked": asked, **found, "even": evenly_spaced(layers, o.count), **machine(device)}


def _run(options: SelectOptions, out: Path, overwrite: bool) -> None:
    """Find the layers of TEACHER that should stay softmax."""
    _check_file(out, options, overwrite)
    console = cli.console()
    found = select_layers(options, lambda text: console.print(text, soft_wrap=True))
    write_json(user_path(out), found)
    chosen = ",".join(map(str, found["chosen"]))
    for one in found.get("sets", ()):
        kept = ", ".join(map(str, one["softmax"]))
        said = f"KL {one['kl']:.3f}, key {one['key_nats']:.3f} nats a token, {100 * one['hits']:.0f}% of keys right"
        console.print(f"softmax in {kept} ({one['name']}): {said}", soft_wrap=True)
    console.print(f"written to {out}; convert with --keep-softmax {chosen}, or --keep-softmax @{out}", soft_wrap=True)


def _check_file(out: Path, options: SelectOptions, overwrite: bool) -> None:
    path = user_path(out)
    check_apart(path, [options.teacher, *map(str, options.data)])
    if path.is_dir():
        raise ConversionError(f"{out} is a folder; give the name of a file")
    if path.exists() and not overwrite:
        again = ", or pass --overwrite to replace it" if _is_ours(path) else ""
        raise ConversionError(f"{out} exists already; choose another file{again}")
    if path.exists() and not _is_ours(path):
        raise ConversionError(f"{out} was not written by linattn select-layers, so --overwrite leaves it alone; choose another file")
    if not path.absolute().parent.is_dir():
        raise ConversionError(f"{out} cannot be written, since there is no folder {path.absolute().parent}; choose another place")
    check_writable(path)


def _is_ours(path: Path) -> bool:
    try:
        found = read_json(path)
    except RecipeError:
        return False
    return isinstance(found, dict) and {"asked", "attention", "chosen"} <= set(found)


_OUT = parameter("out", Path, typer.Option(help="The file to write, such as layers.json.", show_default=False))
main = command(SelectOptions, _run, _OUT, parameter("overwrite", bool, typer.Option("--overwrite", help="Replace the file."), False))
app = cli.app(main)


if __name__ == "__main__":
    app()
