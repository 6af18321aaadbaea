"""How to convert: what the command line and a caller from Python both give."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from convert.commands import option
from convert.errors import ConversionError, OptionError
from recipes.common.reading import read_json, user_path

if TYPE_CHECKING:
    from hf_linattn.config import LinAttnConfig

OF_THE_FORM = ("kernel", "decay", "temperature", "features", "input_gate", "feature_map", "output_map", "window", "sinks", "gate", "beside")
"""Options that are the form's, by the same names."""
OF_THE_WINDOW = ("window", "sinks", "gate", "beside")
"""Those of them that only the form with a window has."""
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
    return layer_numbers(text, option)


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

    form: Form = option(
        "polynomial", "polynomial: linear attention to all tokens; window: softmax over the last ones, linear attention to those before."
    )
    kernel: Kernel | None = _perhaps(
        "Weight of a key, by s, the scaled cosine of query and key: linear, a + b s (default); quadratic, a + b s + c s^2."
    )
    decay: Decay | None = _perhaps(
        "Far tokens weigh less, at a learned rate for each query head, key head, or token and key head (default: head); none: they do not."
    )
    keep_softmax: tuple[int, ...] = option(
        (), "Layers that stay softmax, such as 0-5,8, or @FILE, which linattn select-layers wrote.", kind=str, told="", parse=_layers
    )
    temperature: float | None = _perhaps(
        "Where the learned factor of the cosine s starts (default: 0.98 for the linear kernel, 2 for the quadratic)."
    )
    features: int | None = _perhaps(
        "Project queries and keys to so many learned numbers, fewer than a head has, for a smaller state (default: no projection)."
    )
    input_gate: InputGate | None = _perhaps("token: each key gets a learned weight as well, read off the hidden states (default: none).")
    feature_map: FeatureMap | None = _perhaps("hedgehog: learned features of queries and keys in place of the kernel (default: none).")
    output_map: OutputMap | None = _perhaps("Give the output of linear attention a learned norm, a learned gate, or both (default: none).")
    window: int | None = _perhaps("Of --form window: how many tokens, the newest among them, softmax sees (default: 64).")
    sinks: int | None = _perhaps("Of --form window: how many of a text's first tokens softmax sees from everywhere (default: 4).")
    gate: Gate | None = _perhaps(
        "Of --form window: its share of the output is learned for each head, or for each token and head (default: token)."
    )
    beside: Beside | None = _perhaps("Of --form window: what sees the tokens before it; none: nothing does (default: polynomial).")
    dropout: float | None = _perhaps("Probability of noise dropout in training (default: the model's own attention dropout).")
    learnable: bool = option(True, "Whether the new parameters can be trained, or stay as they start.")
    dtype: DType | None = _perhaps("Type to store the weights in (default: the source's).")
    revision: str | None = option(None, "Branch, tag or commit, where SOURCE is a hub id.")
    overwrite: bool = option(False, "Replace what this command wrote to OUTPUT before.", flag="--overwrite")
    large_state: bool = option(False, "Allow more than 1 GiB of state a sequence.", flag="--large-state")
    check: bool = option(True, "Load and run the result before it takes its place.")
    seed: int = option(0, "Seed of the random tokens that the check runs the result on.")

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
                raise OptionError(f"{{{name}}} is {given!r}; expected one of {', '.join(get_args(known))}")
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature > 0):
            raise OptionError(f"{{temperature}} is {self.temperature}; expected a number above 0")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise OptionError(f"{{dropout}} is {self.dropout}; expected a number from 0 to below 1")
        for name in OF_THE_WINDOW if self.form != "window" else ():
            if getattr(self, name) is not None:
                raise OptionError(f"{{{name}}} goes with {{form}} window; the form {self.form} has no such option")
        for name, least in (("window", 1), ("sinks", 0), ("features", 1)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise OptionError(f"{{{name}}} is {number}; expected at least {least}")

    def linattn(self) -> LinAttnConfig:
        """What the checkpoint's linear layers are to compute.

        Raises:
            ConversionError: options that do not go together.
        """
        from hf_linattn.config import LinAttnConfig  # late, since importing torch takes seconds
        from hf_linattn.forms import FORMS

        given = {name: getattr(self, name) for name in OF_THE_FORM}
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


def layer_numbers(text: str, option: str = "--keep-softmax") -> tuple[int, ...]:
    """The layers of a list such as ``0-5,8``, or of ``@FILE``, those that convert.select_layers chose; errors name `option`.

    Raises:
        ConversionError: it is no such list, or file.
    """
    if text.startswith("@"):
        return _chosen(user_path(text[1:]), option)
    layers: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last <= MOST_LAYERS:
            raise ConversionError(f"{option} takes layer numbers from 0 and ranges of them, such as 0-5,8, not {part!r}")
        layers += range(first, last + 1)
    return tuple(sorted(set(layers)))


def _chosen(path: Path, option: str) -> tuple[int, ...]:
    selection = read_json(path)
    layers = selection.get("chosen") if isinstance(selection, dict) else None
    if not isinstance(layers, list) or not all(type(layer) is int and 0 <= layer <= MOST_LAYERS for layer in layers):
        raise ConversionError(f"{option} @{path}: the file names no layers as chosen; give what linattn select-layers wrote")
    return tuple(sorted(set(layers)))
