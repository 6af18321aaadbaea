"""Whether a model's attention is one that linear attention can stand for: read off the code of its modules, once a class.

Transformers' own test, `_can_set_attn_implementation`, searches the text of a source file. That says nothing of a class that has two
kinds of attention, or takes its attention from a table by the implementation's name. A function's compiled code lists the names it uses.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .config import NAME, PREFIX, LinAttnConfig, refuse_layers_without_attention
from .values import attribute

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
SOFTMAX = {"softmax", "Softmax", "scaled_dot_product_attention"}
POSITION_BIAS = {"position_bias", "relative_position_bias", "_rel_shift"}


def refuse_class(cls: Any) -> None:
    """Refuses a class of models, before one is built, whose own code shows that it computes its attention itself.

    Raises:
        ValueError: no attention in its source file calls Transformers' interface, or it picks its attention from a table that does not
            have "linattn".
    """
    if not cls._can_set_attn_implementation() or _picks_from_a_table(cls):
        raise ValueError(_past_the_interface(cls.__name__))


def refuse_model(model: PreTrainedModel) -> None:
    """Refuses a built model with attention that "linattn" was chosen for and cannot serve. What another implementation serves may stay.

    Raises:
        ValueError: the sentence says which class it is, why, and what to do; or options of `config.linattn` are out of bounds.
        TypeError: options of the wrong type.
    """
    chosen = [(module, config) for module, config in _governed(model, model.config) if config._attn_implementation == NAME]
    # a copy of its config, which a rotary embedding may keep for itself, chooses nothing
    chosen = [(module, config) for module, config in chosen if isinstance(module, PreTrainedModel) or _kind_of(module) is not None]
    if not chosen:
        return
    name = type(model).__name__
    for config in {id(config): config for _, config in chosen}.values():
        _refuse_config(name, config)
    kinds = [_kind_of(module) for module, _ in chosen]
    for (module, _), kind in zip(chosen, kinds, strict=True):
        if kind == "own":
            raise ValueError(_past_the_interface(f"{type(module).__name__} of {name}"))
        if kind == "interface":
            _refuse_attention(f"{type(module).__name__} of {name}", module)
    if "interface" not in kinds and not _is_being_built_inside_another(model):
        raise ValueError(_past_the_interface(name))


def _governed(module: nn.Module, config: PreTrainedConfig) -> Iterator[tuple[nn.Module, PreTrainedConfig]]:
    """Every module with the config that chooses its attention: its own, else that of what it belongs to."""
    own = getattr(module, "config", None)
    config = own if isinstance(own, PreTrainedConfig) else config
    yield module, config
    for child in module.children():
        yield from _governed(child, config)


def _refuse_config(name: str, config: PreTrainedConfig) -> None:
    options = LinAttnConfig.of(config)
    refuse_layers_without_attention(config)
    if options.learnable and not type(config).model_type.startswith(PREFIX):
        raise ValueError(missing_parameters(name))
    if attribute(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is of an encoder-decoder model, and linear attention does not serve the cross-attention that those have; {_cure()}"
        )
    if has_cross_attention(config):
        raise ValueError(f"{name} has cross-attention, which linear attention does not serve; {_cure()}")


def has_cross_attention(config: PreTrainedConfig) -> bool:
    """Whether there is some anywhere in a model of this config."""
    return attribute(config, "is_encoder_decoder", False) or attribute(config, "add_cross_attention", False)


def _refuse_attention(name: str, attention: nn.Module) -> None:
    cls: Any = type(attention)
    if getattr(attention, "is_cross_attention", False) is True or "CrossAttention" in cls.__name__:
        raise ValueError(f"{name} is cross-attention, which linear attention does not serve; {_cure()}")
    if _names(cls) & POSITION_BIAS:
        raise ValueError(f"{name} adds a position bias to softmax scores, which linear attention has not; {_cure()}")
    if getattr(attention, "indexer", None) is not None:
        raise ValueError(f"{name} attends to the few keys that an indexer selects, which linear attention cannot; {_cure()}")
    if getattr(attention, "compressor", None) is not None:
        raise ValueError(f"{name} attends to keys that are made of several tokens each, which linear attention cannot; {_cure()}")


def missing_parameters(name: str) -> str:
    """What to say of `learnable=True` where there is nothing to learn."""
    return (
        f"config.linattn of {name} asks for learnable parameters, which only the classes of converted checkpoints have; convert the "
        "checkpoint (linattn convert) and load the result, or set learnable to false."
    )


def _past_the_interface(name: str) -> str:
    return (
        f"{name} does not use Transformers' attention interface, as architectures such as Llama or GPT-NeoX do, so "
        f'attn_implementation="linattn" cannot replace its attention; {_cure()}'
    )


def _cure() -> str:
    """What to do instead. A model of several parts can have linear attention in some of them."""
    config = _config_of_the_whole()
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None] if config is not None else []
    if not parts:
        return 'leave attn_implementation="linattn" out.'
    part = "text_config" if "text_config" in parts else parts[0]
    return (
        f'leave attn_implementation="linattn" out, or give it to those of the parts ({", ".join(parts)}) that it can serve: '
        f'attn_implementation={{"{part}": "linattn"}}.'
    )


def _config_of_the_whole() -> PreTrainedConfig | None:
    """That of the outermost model which is being built, or set: a part knows nothing of the others, so the call stack tells it."""
    found = None
    for frame in _frames():
        own = frame.f_locals.get("self")
        config = getattr(own, "config", None) if isinstance(own, PreTrainedModel) else own
        found = config if isinstance(config, PreTrainedConfig) else found
    return found


def _frames() -> Iterator[FrameType]:
    """The call stack, from the inside out."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _kind_of(module: nn.Module) -> str | None:
    cls: Any = type(module)
    return _kind(cls)


@functools.cache
def _kind(cls: Any) -> str | None:
    """How modules of a class attend: "interface", "own" (a softmax past the interface), None where they do not."""
    if issubclass(cls, PreTrainedModel):
        return None
    names = _names(cls)
    if INTERFACE in names:
        return "interface"
    return "own" if cls.__name__.endswith("Attention") and names & SOFTMAX else None


@functools.cache
def _names(cls: Any) -> frozenset[str]:
    """The names that the methods of a class use, its local ones included; not those of a method that another one replaces."""
    found: set[str] = set()
    replaced: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module) if nn.Module in cls.__mro__ else None]:
        if base.__module__.startswith("torch."):
            continue
        for name, member in vars(base).items():
            function = inspect.unwrap(getattr(member, "__func__", member)) if callable(member) else None
            if name not in replaced and isinstance(function, FunctionType):
                names = set(names_in(function.__code__))
                found |= names
                if "super" not in names:
                    replaced.add(name)
    return frozenset(found)


def names_in(code: CodeType) -> Iterator[str]:
    """The names that compiled code uses, its local ones included, and that of functions inside it."""
    yield from code.co_names
    yield from code.co_varnames
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


@functools.cache
def _picks_from_a_table(cls: Any) -> bool:
    """Whether a class builds its attention from a table of implementations, which is a KeyError for every name but a few."""
    scope = vars(sys.modules[cls.__module__])
    seen, waiting = {cls}, [cls]
    while waiting:
        part: Any = waiting.pop()
        for value in [scope.get(name) for name in _names(part)]:
            if isinstance(value, dict) and "eager" in value and NAME not in value and all(isinstance(x, type) for x in value.values()):
                return True
            if isinstance(value, type) and issubclass(value, nn.Module) and not issubclass(value, PreTrainedModel) and value not in seen:
                seen.add(value)
                waiting.append(value)
    return False


def _is_being_built_inside_another(model: PreTrainedModel) -> bool:
    """A part without attention, such as a convolutional backbone, is judged with the whole; nothing but the call stack tells it yet."""
    builders = (frame.f_locals.get("self") for frame in _frames() if frame.f_code.co_name == "__init__")
    return any(isinstance(builder, PreTrainedModel) and builder is not model for builder in builders)
