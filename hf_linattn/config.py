"""The options of linear attention in a model, stored as the plain dict `config.linattn` of config.json."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.compiler import is_compiling
from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs as layer_types  # Transformers' own, which `cache` wraps

from .forms import FORMS, Form, Sizes
from .forms.options import one_of, require_bool, require_number
from .values import attribute

NAME = "linattn"
PREFIX = "linattn_"  # of the model types of converted checkpoints
DROPOUT_KINDS = ("paper", "moment")
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "hybrid", "hybrid_sliding")
"""Types of layers whose cache keeps keys, beside a recurrence or not."""
READERS = {"diffllama": 2}
"""How often layers of a model type compute attention over the same keys, each time with a state of its own."""
OPTIONS = {name: tuple(field.name for field in dataclasses.fields(form.Options)) for name, form in FORMS.items()}


@dataclass(frozen=True, init=False)
class LinAttnConfig:
    """What `attn_implementation="linattn"` computes: a form of attention with its options, in all layers but those that keep softmax.

    `LinAttnConfig(kernel="quadratic", decay="head", softmax_layers=[3])` takes the form's options beside its own, and gives them as
    attributes: `config.kernel`.

    Args:
        form: the attention by its name in `hf_linattn.forms.FORMS`; "polynomial" is that of the paper (see `PolynomialOptions`).
        softmax_layers: indices of the layers that keep softmax attention.
        dropout: probability of noise dropout in training, in [0, 1); None takes the model's own attention dropout.
        dropout_kind: what noise dropout does: "paper" multiplies each output by noise, "moment" adds noise of the variance that dropping
            weights has, at three times the cost.
        learnable: the form's numbers are parameters of the checkpoint (converted ones); the options here are then only where they
            started.
        options: those of the form.

    Raises:
        ValueError: an unknown option, or one out of its bounds.
        TypeError: an option of the wrong type.
    """

    form: str
    softmax_layers: list[int]
    dropout: float | None
    dropout_kind: str
    learnable: bool
    options: Any

    def __init__(
        self,
        form: str = "polynomial",
        softmax_layers: list[int] | tuple[int, ...] = (),
        dropout: float | None = None,
        dropout_kind: str = "paper",
        learnable: bool = False,
        **options: Any,
    ) -> None:
        one_of("form", form, tuple(FORMS))
        own = {"form": form, "softmax_layers": softmax_layers, "dropout": dropout, "dropout_kind": dropout_kind, "learnable": learnable}
        known = OPTIONS[form]
        for name in options:
            if name not in known:
                raise ValueError(f"config.linattn has the unknown option {name!r}; the options are {', '.join((*known, *own))}.")
        for name, value in own.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "options", FORMS[form].Options(**options))
        object.__setattr__(self, "_attention", FORMS[form](self.options))
        one_of("dropout_kind", dropout_kind, DROPOUT_KINDS)
        require_bool("learnable", learnable)
        self._check_dropout()
        self._check_layers()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "options":
            raise AttributeError(name)
        return getattr(self.options, name)

    @property
    def attention(self) -> Form:
        """The form with its options."""
        return self._attention  # type: ignore[no-any-return]

    def _check_dropout(self) -> None:
        if self.dropout is None:
            return
        require_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
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
        return cls(**stored)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON types: what `config.linattn` holds."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "options"}
        return {"form": own.pop("form"), **dataclasses.asdict(self.options), **own, "softmax_layers": list(self.softmax_layers)}

    def store(self, model_config: PreTrainedConfig) -> None:
        """Writes the options into a model's config and, where it has one, its text config."""
        for config in (model_config, model_config.get_text_config()):
            setattr(config, NAME, self.to_dict())


class _Known(NamedTuple):
    config: weakref.ref[PreTrainedConfig]
    stored: dict[str, Any]
    options: LinAttnConfig
    layers: int  # there were then: a model that exits early, to draft for itself, says for a while that it has fewer


_known: dict[int, _Known] = {}


def _known_of(model_config: PreTrainedConfig, stored: dict[str, Any]) -> _Known:
    known = _known.get(id(model_config))
    if known is None or known.config() is not model_config or known.stored != stored:
        if len(_known) >= 256:
            _known.clear()
        known = _Known(
            weakref.ref(model_config),
            copy.deepcopy(stored),
            LinAttnConfig.of(model_config),
            getattr(model_config.get_text_config(), "num_hidden_layers", 0),  # an encoder inside another model counts in its own way
        )
        _known[id(model_config)] = known
    return known


def known_options(model_config: PreTrainedConfig) -> LinAttnConfig:
    """`LinAttnConfig.of`, and where a config has options of its own the same object for the same ones: PyTorch's guards then look at one
    layer's, and at whether those of the others are it."""
    stored = attribute(model_config, NAME, None)
    if is_compiling() or not isinstance(stored, dict):
        return LinAttnConfig.of(model_config)
    return _known_of(model_config, stored).options


def softmax_layers(model_config: PreTrainedConfig) -> set[int]:
    """The layers of a model that keep softmax attention; made and checked once for the same options, for it is asked for at every token.

    Raises:
        ValueError: the option names a layer that the model does not have.
    """
    stored = attribute(model_config, NAME, None)
    if is_compiling() or not isinstance(stored, dict):
        return set(LinAttnConfig.of(model_config).softmax_layers)
    known = _known_of(model_config, stored)
    kept = set(known.options.softmax_layers)
    if kept and max(kept) >= known.layers:
        last = known.layers - 1
        raise ValueError(f"linattn option softmax_layers names layer {max(kept)}, but the model has layers 0 to {last}.")
    return kept


def refuse_layers_without_attention(model_config: PreTrainedConfig) -> None:
    """Refuses `softmax_layers` that would be kept by nobody.

    Raises:
        ValueError: one of them has a recurrence, a convolution or a feed-forward network alone.
    """
    text = model_config.get_text_config(decoder=True)
    kept = softmax_layers(model_config)
    if not kept or not hasattr(text, "num_hidden_layers"):  # a model of parts none of which is a decoder counts them in its own way
        return
    types, with_attention = layer_types(text)[0], attention_layers(text)
    for layer in sorted(kept):
        if layer < len(types) and layer not in with_attention:
            raise ValueError(
                f"linattn option softmax_layers names layer {layer}, which has no attention to keep; those that have are "
                f"{', '.join(map(str, with_attention))}."
            )


def sizes_of(model_config: Any, longest: float = 512.0, hidden_size: int | None = None, layer: int = 0) -> Sizes:
    """What a form is told of a layer before it has seen a call; `hidden_size` where it is not the model's own."""
    heads = int(model_config.num_attention_heads)
    head_dim = int(getattr(model_config, "head_dim", None) or model_config.hidden_size // heads)
    key_heads = int(getattr(model_config, "num_key_value_heads", None) or heads)
    kind = getattr(model_config, "model_type", "").removeprefix(PREFIX)
    if is_latent := bool(getattr(model_config, "kv_lora_rank", None)):  # keys of two parts, made again of fewer numbers for every head
        head_dim, key_heads = int(model_config.qk_nope_head_dim + model_config.qk_rope_head_dim), heads
    if kind == "jetmoe":  # each expert of a query reads all keys
        key_heads = heads
    if kind == "mimo_v2_flash" and sliding_windows(model_config)[layer] is not None:
        key_heads *= 2
    value_dim = int(model_config.v_head_dim) if is_latent or kind == "mimo_v2_flash" else head_dim
    return Sizes(heads, key_heads, head_dim, value_dim, hidden_size or model_config.hidden_size, longest)


def readers_of(model_config: PreTrainedConfig) -> int:
    """How often a layer computes attention over its keys."""
    return READERS.get(type(model_config).model_type.removeprefix(PREFIX), 1)


def attention_layers(model_config: PreTrainedConfig) -> list[int]:
    """The layers of a decoder that have attention, and no recurrence or feed-forward network alone."""
    return [layer for layer, kind in enumerate(layer_types(model_config)[0]) if kind in ATTENTION]


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
