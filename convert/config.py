"""The configuration of the converted checkpoint, from the source's and the options."""

from __future__ import annotations

from typing import Any

from convert.errors import ConversionError, OptionError, one_line
from convert.losses import dropped_features
from convert.options import LinearizeOptions
from convert.source import Source
from convert.weights import floating_dtype
from hf_linattn.config import attention_layers
from hf_linattn.models import auto_map, config_class_for, model_class_for

# The attention that a source names gives way to ours, whether it is installed or not.
_LEFT_OUT = ("model_type", "auto_map", "transformers_version", "attn_implementation", "_attn_implementation")


def converted_config(source: Source, options: LinearizeOptions) -> tuple[Any, Any, list[dict[str, Any]]]:
    """The converted configuration, the model class it belongs to, and what linear layers leave behind.

    Raises:
        ConversionError: a configuration that cannot be read, or an option that does not fit it.
    """
    config_class, named = config_class_for(source.config["model_type"]), source.config.get("architectures") or [None]
    if not isinstance(named, list) or not isinstance(named[0], str | None):
        raise ConversionError(f"{source.folder / 'config.json'}: architectures is {named!r:.100}; expected a list of class names")
    try:
        stored = {key: value for key, value in source.config.items() if key not in _LEFT_OUT}
        config: Any = config_class.from_dict(stored)  # type: ignore[attr-defined]
        model_class = model_class_for(config_class, named[0])
    except Exception as error:
        raise ConversionError(f"{source.name}: {one_line(error)}") from error
    count, kept = config.num_hidden_layers, sorted(set(options.keep_softmax))
    if count < 1:
        raise ConversionError(f"{source.folder / 'config.json'}: num_hidden_layers is {count}; expected 1 or more")
    outside = [layer for layer in kept if not 0 <= layer < count]
    if outside:
        raise OptionError(f"{{keep_softmax}} names layer {outside[0]}, but {source.name} has layers 0 to {count - 1}")
    with_attention = attention_layers(config)
    if without := [layer for layer in kept if layer not in with_attention]:
        those = ", ".join(map(str, with_attention))
        raise OptionError(f"{{keep_softmax}} names layer {without[0]} of {source.name}, which has no attention; those with it are {those}")
    if kept == with_attention:
        raise OptionError(f"{{keep_softmax}} names every layer of {source.name} with attention: nothing is left to convert")
    linear = set(with_attention) - set(kept)
    names = [key for keys in source.keys for key in keys]
    dropped = dropped_features(config, [layer in linear for layer in range(count)], names)
    config.linattn = options.linattn().to_dict()
    config.attn_implementation = "linattn"
    config.auto_map = auto_map(config_class)
    config.architectures = [model_class.__name__]
    if options.dtype:
        config.dtype = options.dtype
    elif getattr(config, "dtype", None) is None:
        config.dtype = str(floating_dtype(source)).removeprefix("torch.")
    return config, model_class, dropped
