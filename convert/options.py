"""How to convert: what the command line and a caller from Python both give."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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
