"""Where an attention implementation is chosen: what "linattn" cannot serve is refused there, and the choice is saved with the model.

Every way of choosing (`from_pretrained`, `from_config`, `Model(config)`, `set_attn_implementation`, a dictionary for each part) ends in
three methods of `PreTrainedModel`, which `install` wraps. Each calls Transformers' own first and changes nothing for other names.

- `get_correct_attn_implementation` turns what was asked for into what is used, for each model and each model inside it, before their
  modules exist;
- `post_init` is the last line of every model's `__init__`: now the modules can be looked at;
- `set_attn_implementation` changes a built model, and only logs a warning where a class cannot follow.

Whoever sets `config._attn_implementation` of a built model by hand goes past all three, so that property is wrapped too.

Continuous batching chooses by itself: it changes any implementation that it finds into an installed flash attention, which would be
softmax in a model that has none, and is refused before it does.

Transformers never writes the implementation in use into config.json, but honours the key `attn_implementation` that it finds there. So
`PreTrainedConfig.to_dict` is wrapped as well, to write it where it is ours: what was saved comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousMixin

from .architectures import refuse_class, refuse_model
from .config import NAME, LinAttnConfig
from .positions import count_real_tokens

UNASKED = "_linattn_unasked"  # a model that was given no implementation, and took Transformers' default

_resolve, _post_init = PreTrainedModel.get_correct_attn_implementation, PreTrainedModel.post_init
_set, _to_dict = PreTrainedModel.set_attn_implementation, PreTrainedConfig.to_dict
_init_continuous_batching = ContinuousMixin.init_continuous_batching
_implementation: Any = PreTrainedConfig._attn_implementation
_built: WeakKeyDictionary[PreTrainedModel, None] = WeakKeyDictionary()  # in the order they were built: a part before its whole


def get_correct_attn_implementation(self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
    """Transformers' own answer. A config with options of linear attention asks for it, unless something else was asked for aloud."""
    share_options(self.config)
    if requested_attention is None:
        if getattr(self.config, NAME, None) is not None:
            requested_attention = NAME
        else:
            setattr(self, UNASKED, True)
    chosen: str = _resolve(self, requested_attention, *args, **kwargs)
    if chosen == NAME:
        refuse_class(type(self))
    return chosen


def share_options(config: PreTrainedConfig) -> None:
    """Gives the text part of a config, by which its layers go, the options that were set on the whole.

    Raises:
        ValueError: it has others.
    """
    options = getattr(config, NAME, None)
    if options is None or (text := config.get_text_config()) is config:
        return
    of_text = getattr(text, NAME, None)
    if of_text is None:
        setattr(text, NAME, options)
    elif of_text != options:
        raise ValueError(
            f"config.linattn is {options}, and that of its text part, by which layers go, {of_text}; set both by "
            "LinAttnConfig(...).store(config)."
        )


def post_init(self: PreTrainedModel) -> None:
    """Transformers' own; then the model is looked through, if it or a part of it is to use linear attention."""
    _post_init(self)
    refuse_model(self)
    count_real_tokens(self)
    _built[self] = None


def set_attn_implementation(self: PreTrainedModel, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
    """Transformers' own, all or nothing: where linear attention is refused, every part keeps what it had.

    Raises:
        ValueError: linear attention cannot serve this model, or a part that was to have it, or there is no such part.
    """
    refuse_unknown_parts(self.config, attn_implementation)
    models = [module for module in self.modules() if isinstance(module, PreTrainedModel)]
    before = _implementations(*(model.config for model in models))
    try:
        wanted = {id(config) for config in _asked(self.config, attn_implementation)}
        for model in models:
            if id(model.config) in wanted:
                refuse_class(type(model))
        _set(self, attn_implementation, *args, **kwargs)
        refuse_model(self)
    except Exception:
        _put_back(before)
        raise
    count_real_tokens(self)
    self.__dict__.pop(UNASKED, None)


def set_by_hand(self: PreTrainedConfig, implementation: str | dict | None) -> None:
    """Transformers' own setter of `config._attn_implementation`, all or nothing for the models that were built with the config.

    Raises:
        ValueError: linear attention cannot serve one of them, or a part was to have it that there is not.
    """
    refuse_unknown_parts(self, implementation)
    before = _implementations(self)
    try:
        _implementation.fset(self, implementation)
        changed = {id(config) for config, old in before if old != NAME == config._attn_implementation}
        models = [model for model in list(_built) if id(model.config) in changed] if changed else []
        for model in models:
            refuse_class(type(model))
        for model in models:
            refuse_model(model)
    except Exception:
        _put_back(before)
        raise
    for model in models:
        count_real_tokens(model)
        model.__dict__.pop(UNASKED, None)


def refuse_unknown_parts(config: PreTrainedConfig, implementation: Any) -> None:
    """Refuses linear attention for a part that a config has not, which Transformers passes over.

    Raises:
        ValueError: a dictionary gives it to one.
    """
    if not isinstance(implementation, dict):
        return
    known = list(config.sub_configs)
    for part, chosen in implementation.items():
        if part and part not in known and NAME in str(chosen):
            has = f"its parts are {', '.join(known)}" if known else f'it has none: give attn_implementation="{NAME}"'
            raise ValueError(f"attn_implementation={implementation!r} names the part {part!r} of a {type(config).__name__}; {has}.")


def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers' own, where no part of the model has linear attention.

    Raises:
        ValueError: one has.
    """
    if any(config._attn_implementation == NAME for config in _tree(self.config)):
        raise ValueError(
            "Continuous batching keeps keys and values in pages, and linear attention keeps none; call generate with a padded batch, or "
            "`transformers serve` without --continuous-batching."
        )
    return _init_continuous_batching(self, *args, **kwargs)


def to_dict(self: PreTrainedConfig) -> dict[str, Any]:
    """Transformers' own, with "attn_implementation", and the options it ran with, where linear attention was chosen.

    Options alone ask for linear attention, so where another implementation runs beside them it is written as well.
    """
    output: dict[str, Any] = _to_dict(self)
    chosen = implementation_to_save(self)
    if chosen is None and getattr(self, NAME, None) is not None and self._attn_implementation is not None:
        chosen = {"": self._attn_implementation} if self.sub_configs else self._attn_implementation
    if chosen is not None:
        output["attn_implementation"] = chosen
    if self._attn_implementation == NAME and all(getattr(config, NAME, None) is None for config in (self, self.get_text_config())):
        output[NAME] = LinAttnConfig().to_dict()
    return output


def implementation_to_save(config: PreTrainedConfig) -> str | dict | None:
    """ "linattn" where a config and all its parts have it, a dictionary of those that do, None where none does."""
    parts = {key: implementation_to_save(part) for key, part in _parts(config)}
    own = {"": NAME} if config._attn_implementation == NAME else {}
    if own and all(part == NAME for part in parts.values()):
        return NAME
    return {**own, **{key: part for key, part in parts.items() if part is not None}} or None


def _parts(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            yield key, part


def _tree(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for _, part in _parts(config):
        yield from _tree(part)


def _implementations(*configs: PreTrainedConfig) -> list[tuple[PreTrainedConfig, str | None]]:
    """What the configs, of models and their parts, say now."""
    return [(each, getattr(each, "_attn_implementation_internal", None)) for config in configs for each in _tree(config)]


def _put_back(before: list[tuple[PreTrainedConfig, str | None]]) -> None:
    for config, implementation in before:
        config._attn_implementation_internal = implementation


def _asked(config: PreTrainedConfig, implementation: Any) -> Iterator[PreTrainedConfig]:
    """The configs, of a model and its parts, that an implementation or a dictionary of them gives linear attention."""
    by_part = isinstance(implementation, dict)
    if (implementation.get("") if by_part else implementation) == NAME:
        yield config
    for key, part in _parts(config):
        yield from _asked(part, implementation.get(key) if by_part else implementation)


def install() -> None:
    """Wraps the five methods and the property."""
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation  # type: ignore[method-assign]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
    PreTrainedModel.set_attn_implementation = set_attn_implementation  # type: ignore[method-assign]
    PreTrainedConfig.to_dict = to_dict  # type: ignore[method-assign]
    ContinuousMixin.init_continuous_batching = init_continuous_batching  # type: ignore[method-assign]
    PreTrainedConfig._attn_implementation = _implementation.setter(set_by_hand)  # type: ignore[method-assign]
