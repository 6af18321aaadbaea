"""The options of linear attention in a model, stored as the plain dict `config.linattn` of config.json."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

NAME = "linattn"
PREFIX = "linattn_"  # of the model types of converted checkpoints
KERNELS = ("linear", "quadratic")
DECAYS = ("none", "head")
DROPOUT_KINDS = ("paper", "moment")


@dataclass(frozen=True)
class LinAttnConfig:
    """What `attn_implementation="linattn"` computes: weights f(s) = a + b s + c s^2 of s = temperature * cos(q, k), normalised.

    Args:
        kernel: "linear" (c = 0, a state of D + 1 rows a head) or "quadratic" (c > 0, 1 + D + D (D + 1) / 2 rows).
        a, b, c: the coefficients of f, the same for all heads. Bounds: a > 0; "linear" a >= |b| temperature; "quadratic" c > 0
            and b^2 <= 4 a c; then f >= 0. c = None stands for 0 ("linear") or 0.5 ("quadratic").
        temperature: above 0.
        normalize_qk: queries and keys to unit length. Without it s = temperature * scaling * q.k is unbounded, and f may
            go below 0 where the kernel is linear.
        decay: "head" weighs a key n tokens back by exp(-n / tau) as well, with one time constant tau a query head.
        softmax_layers: indices of the layers that keep softmax attention.
        dropout: noise dropout in training, in [0, 1); None takes the model's own attention dropout.
        dropout_kind: "paper" or "moment".
        learnable: a, b, c, temperature and decay are parameters of the checkpoint (converted ones); the numbers here are
            then only where they started.

    Raises:
        ValueError: an option out of its bounds.
        TypeError: an option of the wrong type.
    """

    kernel: str = "linear"
    a: float = 1.0
    b: float = 1.0
    c: float | None = None
    temperature: float = 1.0
    normalize_qk: bool = True
    decay: str = "none"
    softmax_layers: list[int] = dataclasses.field(default_factory=list)
    dropout: float | None = None
    dropout_kind: str = "paper"
    learnable: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("kernel", KERNELS), ("decay", DECAYS), ("dropout_kind", DROPOUT_KINDS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"linattn option {name}={getattr(self, name)!r} is unknown; give one of {', '.join(map(repr, choices))}.")
        if self.c is None:
            object.__setattr__(self, "c", 0.5 if self.kernel == "quadratic" else 0.0)
        for name in ("a", "b", "c", "temperature", "dropout"):
            self._check_number(name)
        for name in ("normalize_qk", "learnable"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"linattn option {name} must be true or false, not {getattr(self, name)!r}.")
        self._check_bounds()
        self._check_layers()

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name == "dropout":
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"linattn option {name} must be a number, not {value!r}.")
        if not math.isfinite(value):
            raise ValueError(f"linattn option {name} must be finite, not {value}.")

    def _check_bounds(self) -> None:
        a, b, c, temperature = self.a, self.b, self.c or 0.0, self.temperature
        if a <= 0 or temperature <= 0:
            raise ValueError(f"linattn options a and temperature must be above 0, not a={a}, temperature={temperature}.")
        if self.kernel == "linear":
            if c != 0:
                raise ValueError(f'linattn option c={c} needs kernel="quadratic"; kernel="linear" has c = 0.')
            if self.normalize_qk and a < abs(b) * temperature:
                raise ValueError(
                    f'linattn options a={a}, b={b}, temperature={temperature} let a weight go below 0; kernel="linear" needs '
                    "a >= |b| * temperature."
                )
        elif c <= 0 or b * b > 4 * a * c:
            raise ValueError(
                f'linattn options a={a}, b={b}, c={c} let a weight go below 0; kernel="quadratic" needs c > 0 and b^2 <= 4 a c.'
            )
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"linattn option dropout must be in [0, 1), not {self.dropout}.")

    def _check_layers(self) -> None:
        layers = self.softmax_layers
        if not isinstance(layers, (list, tuple)) or any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
            raise TypeError(f"linattn option softmax_layers must be a list of layer indices, not {layers!r}.")
        if any(i < 0 for i in layers):
            raise ValueError(f"linattn option softmax_layers must count layers from 0, not {list(layers)}.")
        object.__setattr__(self, "softmax_layers", list(layers))

    @classmethod
    def of(cls, model_config: PreTrainedConfig) -> LinAttnConfig:
        """The options stored in a model's config, or in its text config; the defaults where there are none.

        Raises:
            ValueError: an unknown option, named together with those there are; a value out of bounds.
            TypeError: `config.linattn` is no dict, or an option is of the wrong type.
        """
        stored = getattr(model_config, NAME, None)
        if stored is None:
            stored = getattr(model_config.get_text_config(), NAME, None)
        if stored is None:
            return cls()
        if not isinstance(stored, dict):
            raise TypeError(f"config.linattn must be a dict of options (LinAttnConfig(...).to_dict()), not {type(stored).__name__}.")
        unknown = [name for name in stored if name not in OPTIONS]
        if unknown:
            raise ValueError(f"config.linattn has the unknown option {unknown[0]!r}; the options are {', '.join(OPTIONS)}.")
        return cls(**stored)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON types: what `config.linattn` holds."""
        return dataclasses.asdict(self)

    def store(self, model_config: PreTrainedConfig) -> None:
        """Writes the options into a model's config and, where it has one, its text config."""
        for config in (model_config, model_config.get_text_config()):
            setattr(config, NAME, self.to_dict())


OPTIONS = tuple(field.name for field in dataclasses.fields(LinAttnConfig))


def softmax_layers(model_config: PreTrainedConfig) -> set[int]:
    """The layers of a model that keep softmax attention.

    Raises:
        ValueError: the option names a layer that the model does not have.
    """
    kept = set(LinAttnConfig.of(model_config).softmax_layers)
    layers = model_config.get_text_config().num_hidden_layers if kept else 0
    if kept and max(kept) >= layers:
        last = layers - 1
        raise ValueError(f"linattn option softmax_layers names layer {max(kept)}, but the model has layers 0 to {last}.")
    return kept


def sliding_windows(model_config: PreTrainedConfig) -> list[int | None]:
    """For each layer, how many tokens its softmax attention sees, the newest included; None where it sees all.

    Raises:
        ValueError: a window that is no whole number above 0, or layer types that are not one word a layer.
    """
    sizes = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    windows = {kind: getattr(model_config, name, None) for kind, name in sizes.items()}
    layers = model_config.num_hidden_layers
    types = getattr(model_config, "layer_types", None) or ["sliding_attention"] * layers
    if not isinstance(types, (list, tuple)) or len(types) != layers or not all(isinstance(kind, str) for kind in types):
        raise ValueError(f"layer_types must be a list of one word for each of {layers} layers, not {types!r:.100}.")
    for kind, window in windows.items():  # where no layer has one it may be anything, such as 0
        whole = isinstance(window, int) and not isinstance(window, bool) and window > 0
        if kind in types and window is not None and not whole:
            raise ValueError(f"{sizes[kind]} must be a whole number above 0, not {window!r:.100}.")
    return [windows.get(kind) for kind in types]
