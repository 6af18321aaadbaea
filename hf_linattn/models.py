"""Auto classes of converted checkpoints: for each base architecture X a ``LinAttnXConfig`` of model type ``linattn_x``, and model classes.

A converted model is its base class with :class:`LinAttnParams` attached to every linear attention module as ``linattn``. The classes are
made here at import, one factory for all architectures, and registered with Transformers' Auto classes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import tokenization_auto
from transformers.utils import is_peft_available

from hf_linattn.config import PREFIX, LinAttnConfig, sliding_windows
from hf_linattn.layers import OFFSET, LinAttnParams

BASE_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "gpt_neox")
STUB_NAME = "modeling_hf_linattn.py"
LONGEST_TIME_CONSTANT = 2048
"""The slowest head starts at max_position_embeddings tokens or at the sliding window its layer had, but at no more than this."""

_AUTO_CLASSES = (
    (AutoModel, transformers.MODEL_MAPPING),
    (AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForSequenceClassification, transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
)


class LinAttnConfigMixin:
    """What the configuration classes of converted checkpoints share."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: the code of a converted checkpoint is this package, which must not be copied beside the weights."""


class LinAttnModelMixin:
    """Attaches the learnable parameters to a base model, and keeps what loading it again needs in its configuration."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "linattn", None) is None:
            config.linattn = LinAttnConfig(learnable=True).to_dict()
        if config._attn_implementation is None:
            config._attn_implementation = "linattn"
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _attach_parameters(self)  # type: ignore[arg-type]
        # A fresh checkpoint has the starting values alone; what was learned since is then 0.
        self._keys_to_ignore_on_load_missing = {*(self._keys_to_ignore_on_load_missing or ()), rf"\.linattn\.\w+{OFFSET}$"}  # type: ignore[has-type]
        self.config.auto_map = auto_map(type(self.config))
        self.post_init()  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Saves as Transformers does, and beside it the few lines that ``trust_remote_code=True`` loads the model through."""
        if is_main_process and not Path(save_directory).is_file():
            write_stub(type(self.config), save_directory)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LinAttnParams):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]


class _InnerInitWeights:
    """Stands in for ``_init_weights`` of a base model inside another: Transformers asks each such model for its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, module: nn.Module) -> None:
        if isinstance(module, LinAttnParams):
            module.reset_parameters()
        else:
            type(self.model)._init_weights(self.model, module)


def _attach_parameters(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    options = LinAttnConfig.of(config)
    if options.learnable or options.decay == "head":
        longest = min(getattr(config, "max_position_embeddings", None) or LONGEST_TIME_CONSTANT, LONGEST_TIME_CONSTANT)
        windows = sliding_windows(config)
        for _, module in list(attention_modules(model)):
            if module.layer_idx not in options.softmax_layers:
                window = windows[module.layer_idx] or longest
                module.linattn = LinAttnParams(config.num_attention_heads, options, min(longest, window))
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel) and not isinstance(inner, LinAttnModelMixin):
            inner._init_weights = _InnerInitWeights(inner)  # type: ignore[method-assign]


def attention_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attention modules of a model's layers, with their names."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal"):
            yield name, module


def config_class_for(model_type: str) -> type:
    """The configuration class of converted checkpoints of a base ``model_type`` such as ``"llama"``.

    Raises:
        ValueError: an architecture that is not supported; the message lists those that are.
    """
    if model_type not in BASE_MODEL_TYPES:
        raise ValueError(f"the architecture {model_type!r} is not supported; supported are {', '.join(BASE_MODEL_TYPES)}")
    return _CONFIGS[model_type]


def model_class_for(config_class: type, architecture: str | None = None) -> type:
    """The converted model class for the base class named ``architecture`` ("LlamaForCausalLM"); the causal language model by default.

    Raises:
        ValueError: a class that converted checkpoints do not have.
    """
    classes = _MODELS[config_class]
    if architecture is None:
        return classes["AutoModelForCausalLM"]
    for model_class in classes.values():
        if model_class.__name__ == "LinAttn" + architecture:
            return model_class
    names = ", ".join(model_class.__name__.removeprefix("LinAttn") for model_class in classes.values())
    raise ValueError(f"the model class {architecture!r} is not supported; supported are {names}")


def auto_map(config_class: type) -> dict[str, str]:
    """config.json's ``auto_map``: which class of the stub each Auto class is to load."""
    module = STUB_NAME.removesuffix(".py")
    names = {"AutoConfig": config_class.__name__} | {auto: model.__name__ for auto, model in _MODELS[config_class].items()}
    return {auto: f"{module}.{name}" for auto, name in names.items()}


def write_stub(config_class: type, folder: str | Path) -> None:
    """Writes the module that ``auto_map`` names into ``folder``, which is made if absent. It only imports this package."""
    names = ", ".join(name.split(".")[1] for name in auto_map(config_class).values())
    text = f'"""The code of this model is the package hf_linattn."""\n\nfrom hf_linattn.models import {names}  # noqa: F401\n'
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / STUB_NAME).write_text(text, encoding="utf-8")


def _make_class(name: str, bases: tuple[type, ...], **members: Any) -> type:
    made = type(name, bases, {"__module__": __name__, "__doc__": f"{bases[-1].__name__} of a converted checkpoint.", **members})
    setattr(sys.modules[__name__], name, made)
    return made


def _make_config_class(base_type: str) -> type:
    base = transformers.CONFIG_MAPPING[base_type]
    config_class = _make_class(f"LinAttn{base.__name__}", (LinAttnConfigMixin, base), model_type=PREFIX + base_type)
    AutoConfig.register(config_class.model_type, config_class)  # type: ignore[attr-defined]
    return config_class


def _make_model_classes(base_type: str, config_class: type) -> dict[str, type]:
    base_config = transformers.CONFIG_MAPPING[base_type]
    classes: dict[str, type] = {}
    for auto, mapping in _AUTO_CLASSES:
        base: Any = mapping[base_config]
        members = {"config_class": config_class, "__annotations__": {"config": config_class}}
        model_class = _make_class(f"LinAttn{base.__name__}", (LinAttnModelMixin, base), **members)
        _share_weight_names(base.__name__, model_class.__name__)
        auto.register(config_class, model_class)
        classes[auto.__name__] = model_class
    return classes


def _share_weight_names(base: str, converted: str) -> None:
    # Looked up by class name, and skipped for classes outside Transformers unless registered: without this, GPT-NeoX's embed_out
    # would be left behind and its head silently random.
    conversions = get_checkpoint_conversion_mapping(base)
    if conversions is not None:
        register_checkpoint_conversion_mapping(converted, conversions, overwrite=True)


def _share_tokenizer(base_type: str) -> None:
    # AutoTokenizer decides by model type and configuration class as well as by tokenizer_config.json: as for the base, then.
    tokenizer_class = transformers.TOKENIZER_MAPPING.get(transformers.CONFIG_MAPPING[base_type], None)
    if tokenizer_class is not None:
        transformers.TOKENIZER_MAPPING.register(_CONFIGS[base_type], tokenizer_class)
    names = tokenization_auto.TOKENIZER_MAPPING_NAMES
    if base_type in names:
        names[PREFIX + base_type] = names[base_type]
    known_wrong: set[str] = getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())
    if base_type in known_wrong:
        known_wrong.add(PREFIX + base_type)


def _share_adapter_targets(base_type: str) -> None:
    # PEFT knows by model type which layers an adapter goes into where none are named: the same as in the base.
    if not is_peft_available():
        return
    from peft.utils import constants  # an optional package, which Transformers has imported if it is there

    for name, targets in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and base_type in targets:
            targets[PREFIX + base_type] = targets[base_type]


_CONFIGS = {base_type: _make_config_class(base_type) for base_type in BASE_MODEL_TYPES}
_MODELS = {config_class: _make_model_classes(base_type, config_class) for base_type, config_class in _CONFIGS.items()}
for _base_type in BASE_MODEL_TYPES:
    _share_tokenizer(_base_type)
    _share_adapter_targets(_base_type)
