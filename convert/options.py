"""How to convert: what the command line and a caller from Python both give."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from convert.commands import option
from convert.errors import ConversionError
from recipes.common.reading import read_json, user_path

if TYPE_CHECKING:
    from hf_linattn.config import LinAttnConfig

OF_THE_FORM = ("kernel", "decay", "temperature", "features", "input_gate", "feature_map", "output_map", "window", "sinks", "gate", "beside")
"""Options that are the form's, by the same names."""
MOST_LAYERS = 9999
"""The highest layer number that a range may name."""

# What the forms name, written down again since to import a form takes seconds; a test compares them.
Form = Literal["polynomial", "window"]
Kernel = Literal["linear", "quadratic"]
Decay = Literal["none", "head", "key_head", "token"]
InputGate = Literal["none", "token"]
FeatureMap = Literal["none", "hedgehog"]
OutputMap = Literal["none", "norm", "gate", "norm_gate"]
Gate = Literal["head", "token"]
Beside = Literal["polynomial", "none"]
DType = Literal["float32", "bfloat16", "float16"]


def _layers(text: str, option: str) -> tuple[int, ...]:
    return layer_numbers(text)


def _perhaps(text: str) -> Any:
    """An option that may be left open, and whose help tells what happens then."""
    return option(None, text, show_default=False)


@dataclass(frozen=True)
class LinearizeOptions:
    """How to convert. Each field is an option of the command; README.md says more.

    Attributes:
        form: ``polynomial``, or ``window``, which has the options of the former for what stands beside it, and four of its own.
        kernel: ``linear`` or ``quadratic``; None: ``linear``.
        decay: ``none``, ``head``, ``key_head`` or ``token``; None: ``head``.
        keep_softmax: indices of the layers that keep softmax attention.
        temperature: where the temperature starts; None: 0.98 (linear), 2 (quadratic).
        features: to how many numbers queries and keys are projected before f is taken; None: they are not.
        input_gate: ``none`` or ``token``; None: ``none``.
        feature_map: ``none`` or ``hedgehog``; None: ``none``.
        output_map: ``none``, ``norm``, ``gate`` or ``norm_gate``; None: ``none``.
        window: tokens seen by softmax, the query's own among them; None: 64.
        sinks: first tokens seen by softmax from everywhere; None: 4.
        gate: ``head`` or ``token``; None: ``token``.
        beside: ``polynomial`` or ``none``; None: ``polynomial``.
        dropout: probability of noise dropout in training; None: the model's own attention dropout.
        learnable: whether the new parameters are trained.
        dtype: None keeps the source's.
        revision: branch, tag or commit of a hub id.
        overwrite: whether an existing checkpoint at the output is replaced.
        large_state: whether a state of more than 1 GiB a sequence is wanted.
        check: whether the result is loaded and run before it takes its place.
        seed: of the random tokens that the check runs it on.
    """

    form: Form = option("polynomial", "The attention: a polynomial, or a window of softmax beside it.")
    kernel: Kernel | None = _perhaps("Attention weight a + b s (default), or a + b s + c s^2.")
    decay: Decay | None = _perhaps("What a learned decay is kept for (default: head).")
    keep_softmax: tuple[int, ...] = option(
        (), "Layers that stay softmax, such as 0-5,8, or @FILE of linattn select-layers.", kind=str, told="", parse=_layers
    )
    temperature: float | None = _perhaps("Its start (default 0.98 linear, 2 quadratic).")
    features: int | None = _perhaps("Project queries and keys to so many.")
    input_gate: InputGate | None = _perhaps("Learned weight of keys (default: none).")
    feature_map: FeatureMap | None = _perhaps("Learned features in the place of f (default: none).")
    output_map: OutputMap | None = _perhaps("Learned norm and gate of the linear attention's output (default: none).")
    window: int | None = _perhaps("Tokens seen by softmax (default: 64).")
    sinks: int | None = _perhaps("First tokens seen by softmax (default: 4).")
    gate: Gate | None = _perhaps("The window's share per what (default: token).")
    beside: Beside | None = _perhaps("What sees the tokens before the window (default: polynomial).")
    dropout: float | None = _perhaps("Noise dropout in training (default: the model's own).")
    learnable: bool = option(True, "Train the new parameters, or keep them as they start.")
    dtype: DType | None = _perhaps("Store the weights as this (default: as they are).")
    revision: str | None = option(None, "Branch, tag or commit of a hub id.")
    overwrite: bool = option(False, "Replace what this command wrote to OUTPUT before.", flag="--overwrite")
    large_state: bool = option(False, "Allow more than 1 GiB of state a sequence.", flag="--large-state")
    check: bool = option(True, "Load and run the result before it takes its place.")
    seed: int = option(0, "Of the random tokens that the check runs it on.")

    def __post_init__(self) -> None:
        """Refuses what no checkpoint could make right; whether the layers and the temperature fit is seen with the source at hand.

        Raises:
            ConversionError: an unknown choice, or a number out of its bounds.
        """
        choices = {
            "form": Form, "kernel": Kernel, "decay": Decay, "input_gate": InputGate, "feature_map": FeatureMap, "output_map": OutputMap,
            "gate": Gate, "beside": Beside, "dtype": DType,
        }  # fmt: skip
        for name, known in choices.items():
            given = getattr(self, name)
            if given is not None and given not in get_args(known):
                raise ConversionError(f"the {name} {given!r} is unknown; give one of {', '.join(get_args(known))}")
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConversionError(f"the temperature must be a number above 0, not {self.temperature}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ConversionError(f"the dropout must be in [0, 1), not {self.dropout}")

    def linattn(self) -> LinAttnConfig:
        """What the checkpoint's linear layers are to compute.

        Raises:
            ConversionError: options that do not go together.
        """
        from hf_linattn.config import OPTIONS, LinAttnConfig  # late, since importing torch takes seconds
        from hf_linattn.forms import FORMS

        given = {name: getattr(self, name) for name in OF_THE_FORM}
        for name, value in given.items():
            if value is not None and name not in OPTIONS[self.form]:
                takes = next(form for form in FORMS if name in OPTIONS[form])
                raise ConversionError(f"--{name.replace('_', '-')} goes with --form {takes}; the form {self.form} has no such option")
        try:
            return LinAttnConfig(
                **FORMS[self.form].converted(given),
                form=self.form,
                softmax_layers=sorted(set(self.keep_softmax)),
                dropout=self.dropout,
                learnable=self.learnable,
            )
        except (TypeError, ValueError) as error:
            raise ConversionError(str(error)) from error


def layer_numbers(text: str) -> tuple[int, ...]:
    """The layers of a list such as ``0-5,8``, or of ``@FILE``, those that convert.select_layers chose.

    Raises:
        ConversionError: it is no such list, or file.
    """
    if text.startswith("@"):
        return _chosen(user_path(text[1:]))
    layers: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last <= MOST_LAYERS:
            raise ConversionError(f"--keep-softmax takes layer numbers from 0 and ranges of them, such as 0-5,8, not {part!r}")
        layers += range(first, last + 1)
    return tuple(sorted(set(layers)))


def _chosen(path: Path) -> tuple[int, ...]:
    selection = read_json(path)
    layers = selection.get("chosen") if isinstance(selection, dict) else None
    if not isinstance(layers, list) or not all(type(layer) is int and 0 <= layer <= MOST_LAYERS for layer in layers):
        raise ConversionError(f"--keep-softmax @{path}: the file names no layers as chosen; give what linattn select-layers wrote")
    return tuple(sorted(set(layers)))
