"""Auto classes of converted checkpoints: for each base architecture X a ``LinAttnXConfig`` of model type ``linattn_x``, and model classes.

A converted model is its base class with :class:`LinAttnParams` attached to every linear attention module as ``linattn``. Transformers'
Auto classes know these classes by name, as they know their own: one is made here, by one factory for all architectures, when it is asked
for, and importing this module imports no architecture.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, masking_utils
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import tokenization_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.utils import is_peft_available

from hf_linattn import ahead, deferred, next_inputs, text_mask, texts
from hf_linattn.attention import KEEPS_SOFTMAX, index_of
from hf_linattn.compiled import CompiledStep
from hf_linattn.config import PREFIX, LinAttnConfig, readers_of, sizes_of, sliding_windows
from hf_linattn.forms import LinAttnParams
from hf_linattn.forms.parameters import OFFSET

_TRIED = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "gpt_neox"),
    *("apertus", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gpt2", "gpt_bigcode"),
    *("granite", "helium", "hunyuan_v1_dense", "internlm3", "jais2", "jetmoe", "lfm2", "ministral", "ministral3", "nanochat", "nemotron"),
    *("deepseek_v3", "flex_olmo", "granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
    *("olmo", "olmo2", "olmo3", "opt", "persimmon", "phi3", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma"),
    *("afmoe", "aria_text", "axk1", "bailing_hybrid", "beam", "cohere2_moe", "cohere_compass_text", "cwm", "deepseek_v2", "diffllama"),
    *("dots1", "ernie4_5_moe", "exaone_moe", "flint", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granite_swa"),
    *("granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "iquestcoder", "jamba"),
    *("kimi_linear", "kolibri1", "lfm3", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "modernbert-decoder"),
    *("nemotron_h", "olmo_hybrid", "phi4_multimodal", "phimoe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "solar_open"),
    *("youtu", "zamba2", "zaya"),
)
BASE_MODEL_TYPES = tuple(name for name in _TRIED if name in CONFIG_MAPPING_NAMES)
"""Architectures of which a tiny random model was converted, checked, loaded and run. Not every version of Transformers has all."""
STUB_NAME = "modeling_hf_linattn.py"
LONGEST_TIME_CONSTANT = 2048
"""The slowest head starts at max_position_embeddings tokens or at the sliding window its layer had, but at no more than this."""

_MAPPINGS: dict[str, Any] = {
    "AutoModel": transformers.MODEL_MAPPING,
    "AutoModelForCausalLM": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForSequenceClassification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}
_CLASS = "LinAttn"
COMPILED = "_linattn_compiled"
ACCELERATES = "_hf_hook"
"""Where accelerate keeps the hook that brings a module what it needs, which PyTorch does not trace through."""


class LinAttnConfigMixin:
    """What the configuration classes of converted checkpoints share."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: the code of a converted checkpoint is this package, which must not be copied beside the weights."""


class LinAttnModelMixin:
    """Attaches the learnable parameters to a base model, and keeps what loading it again needs in its configuration."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if config._attn_implementation == "vllm":
            raise ValueError(
                "vLLM would put its own softmax attention in the place of this checkpoint's linear one; serve it by `transformers serve` "
                "(docs/vllm.md)."
            )
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

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """The compiled call that `generate` gives the tokens of one text to; one that was put in Transformers' place for it stays."""
        if "_compiled_call" in self.__dict__:
            return super().get_compiled_call(compile_config)  # type: ignore[misc]
        config = compile_config or self._default_compile_config()  # type: ignore[attr-defined]
        step: CompiledStep | None = self.__dict__.get(COMPILED)
        if step is None or not step.serves(self, config):  # type: ignore[arg-type]
            step = self.__dict__[COMPILED] = CompiledStep(self, config)  # type: ignore[arg-type]
        return step.text()

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """As Transformers has it, but not where a cache or what passes between layers moves between devices: that is no part of a graph."""
        cache = model_kwargs.get("past_key_values")
        if getattr(getattr(cache, "self_attention_cache", cache), "offloading", False):
            if generation_config.compile_config is not None:
                warnings.warn("An offloaded cache moves between devices at every token: the step is not compiled.", stacklevel=2)
            return False
        if not super()._valid_auto_compile_criteria(model_kwargs, generation_config):  # type: ignore[misc]
            return False
        if any(hasattr(module, ACCELERATES) for module in self.modules()):  # type: ignore[attr-defined]
            warnings.warn("A model that accelerate spreads over devices would be a graph a layer: the step is not compiled.", stacklevel=2)
            return False
        return True

    def create_masks_for_generate(self, config: Any, inputs_embeds: Any, attention_mask: Any, past_key_values: Any, **others: Any) -> Any:
        """As Transformers or the base model makes it, once a text where it stays the same."""
        make = getattr(super(), "create_masks_for_generate", masking_utils.create_masks_for_generate)
        return text_mask.mask_of(make, config, inputs_embeds, attention_mask, past_key_values, **others)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1, **others: Any
    ) -> dict[str, Any]:
        """As Transformers or the base model does it, but what tokens append is made ahead of them where `generate` asks: a loop of the
        user's may keep what it was given, and write into it."""
        before, more = model_kwargs.get("attention_mask"), {"is_encoder_decoder": is_encoder_decoder, "num_new_tokens": num_new_tokens}
        only_appends = text_mask.only_appends(type(self))  # type: ignore[arg-type]
        is_ours = only_appends and num_new_tokens == 1 and not is_encoder_decoder and texts.is_generating()
        ours = ahead.appended(model_kwargs) if is_ours else {}
        given = model_kwargs | dict.fromkeys(ours)
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(outputs, given, **more, **others) | ours  # type: ignore[misc]
        if only_appends:
            text_mask.hand_on(before, updated.get("attention_mask"))
        return updated

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        with texts.text(), deferred.one_more(deferred.is_unseen(self, **kwargs), deferred.draws(self, **kwargs)):  # type: ignore[arg-type]
            return super()._sample(*args, **kwargs)  # type: ignore[misc]

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        with texts.text():
            return super()._beam_search(*args, **kwargs)  # type: ignore[misc]

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
    longest = min(getattr(config, "max_position_embeddings", None) or LONGEST_TIME_CONSTANT, LONGEST_TIME_CONSTANT)
    windows = sliding_windows(config)
    for _, module in list(attention_modules(model)):
        keeps_softmax = bool(options.softmax_layers) and index_of(module) in options.softmax_layers
        setattr(module, KEEPS_SOFTMAX, (options.softmax_layers, keeps_softmax))
        if not keeps_softmax:
            width = next((child.in_features for child in module.modules() if isinstance(child, nn.Linear)), None)
            sizes = sizes_of(config, min(longest, windows[module.layer_idx] or longest), width, module.layer_idx)
            parameters = options.attention.parameters(sizes, options.learnable)
            if parameters is not None:
                module.linattn, parameters.readers = parameters, readers_of(config)
                parameters.keep_hidden_states(module)
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
        ValueError: an architecture that is not supported; the message says where those that are stand.
    """
    if model_type not in BASE_MODEL_TYPES:
        raise ValueError(f"the architecture {model_type!r} is not supported; {those_supported(model_type)}")
    return getattr(sys.modules[__name__], _CLASS + CONFIG_MAPPING_NAMES[model_type])


def those_supported(model_type: str) -> str:
    """Where the supported architectures are named, with those that are called nearly so."""
    near = difflib.get_close_matches(model_type, BASE_MODEL_TYPES)
    return "hf_linattn.models.BASE_MODEL_TYPES names those that are" + (f", {' and '.join(near)} among them" if near else "")


def model_class_for(config_class: type, architecture: str | None = None) -> type:
    """The converted model class for the base class named ``architecture`` ("LlamaForCausalLM"); the causal language model by default.

    Raises:
        ValueError: a class that converted checkpoints do not have.
    """
    names = _base_names(_base_type(config_class))
    name = names["AutoModelForCausalLM"] if architecture is None else architecture
    if name not in names.values():
        raise ValueError(f"the model class {architecture!r} is not supported; supported are {', '.join(names.values())}")
    return getattr(sys.modules[__name__], _CLASS + name)


def auto_map(config_class: type) -> dict[str, str]:
    """config.json's ``auto_map``: which class of the stub each Auto class is to load."""
    module = STUB_NAME.removesuffix(".py")
    models = {auto: _CLASS + name for auto, name in _base_names(_base_type(config_class)).items()}
    return {auto: f"{module}.{name}" for auto, name in ({"AutoConfig": config_class.__name__} | models).items()}


def write_stub(config_class: type, folder: str | Path) -> None:
    """Writes the module that ``auto_map`` names into ``folder``, which is made if absent. It only imports this package."""
    names = ", ".join(name.split(".")[1] for name in auto_map(config_class).values())
    text = f'"""The code of this model is the package hf_linattn."""\n\nfrom hf_linattn.models import {names}  # noqa: F401\n'
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / STUB_NAME).write_text(text, encoding="utf-8")


def __getattr__(name: str) -> type:
    """Makes the class ``name`` when it is first asked for, here or by an Auto class."""
    for base_type in BASE_MODEL_TYPES if name.startswith(_CLASS) else ():
        if name == _CLASS + CONFIG_MAPPING_NAMES[base_type]:
            return _make_class(name, (LinAttnConfigMixin, transformers.CONFIG_MAPPING[base_type]), model_type=PREFIX + base_type)
        for auto, base in _base_names(base_type).items():
            if name == _CLASS + base:
                _share_weight_names(base_type, PREFIX + base_type)
                return _make_model_class(name, _MAPPINGS[auto][transformers.CONFIG_MAPPING[base_type]], config_class_for(base_type))
    raise AttributeError(f"module {__name__} has no attribute {name!r}")


def _base_type(config_class: Any) -> str:
    return config_class.model_type.removeprefix(PREFIX)


def _base_names(base_type: str) -> dict[str, str]:
    """The names of the base architecture's model classes, by Auto class."""
    return {auto: mapping._model_mapping[base_type] for auto, mapping in _MAPPINGS.items() if base_type in mapping._model_mapping}


def _make_class(name: str, bases: tuple[type, ...], **members: Any) -> type:
    made = type(name, bases, {"__module__": __name__, "__doc__": f"{bases[-1].__name__} of a converted checkpoint.", **members})
    setattr(sys.modules[__name__], name, made)
    return made


def _make_model_class(name: str, base: type, config_class: type) -> type:
    _share_weight_names(base.__name__, name)
    members: dict[str, Any] = {"config_class": config_class, "__annotations__": {"config": config_class}}
    if getattr(base, next_inputs.METHOD, None) is getattr(GenerationMixin, next_inputs.METHOD):  # else it has a way of its own
        members[next_inputs.METHOD] = next_inputs.prepare_inputs_for_generation
    return _make_class(name, (LinAttnModelMixin, base), **members)


def _share_weight_names(base: str, converted: str) -> None:
    # Looked up by class name and by model type, and skipped for classes outside Transformers unless registered: without this, GPT-NeoX's
    # embed_out would be left behind and its head silently random, and experts stored one by one would not be found.
    conversions = get_checkpoint_conversion_mapping(base)
    if conversions is not None:
        register_checkpoint_conversion_mapping(converted, conversions, overwrite=True)


def _register(base_type: str) -> None:
    """Enters the names of an architecture's converted classes beside those that Transformers' Auto classes load lazily."""
    model_type, config_name = PREFIX + base_type, _CLASS + CONFIG_MAPPING_NAMES[base_type]
    module_name, here = model_type_to_module_name(model_type), sys.modules[__name__]
    CONFIG_MAPPING_NAMES[model_type] = config_name
    transformers.CONFIG_MAPPING._modules[module_name] = here
    # AutoTokenizer decides by model type and configuration class as well as by tokenizer_config.json: as for the base, then.
    for mapping, prefix in [*((mapping, _CLASS) for mapping in _MAPPINGS.values()), (transformers.TOKENIZER_MAPPING, "")]:
        if mapping._model_mapping.get(base_type) is not None:
            mapping._model_mapping[model_type] = prefix + mapping._model_mapping[base_type]
            mapping._reverse_config_mapping[config_name] = model_type
            mapping._modules[module_name] = here
    known_wrong: set[str] = getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())
    if base_type in known_wrong:
        known_wrong.add(model_type)


def _share_adapter_targets(base_type: str) -> None:
    # PEFT knows by model type which layers an adapter goes into where none are named: the same as in the base.
    if not is_peft_available():
        return
    from peft.utils import constants  # an optional package, which Transformers has imported if it is there

    for name, targets in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and base_type in targets:
            targets[PREFIX + base_type] = targets[base_type]


def _name_in_transformers() -> None:
    # `transformers serve` looks for the class that a checkpoint names among those of transformers itself, and nowhere else
    lazy: Any = type(transformers)
    found = lazy.__getattr__

    def __getattr__(module: Any, name: str) -> Any:
        if module.__name__ == "transformers" and name.startswith(_CLASS):  # there may be two such modules, of which one was replaced
            return getattr(sys.modules[__name__], name)
        return found(module, name)

    lazy.__getattr__ = __getattr__


_name_in_transformers()
for _base_type_name in BASE_MODEL_TYPES:
    _register(_base_type_name)
    _share_adapter_targets(_base_type_name)
