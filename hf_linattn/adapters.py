"""PEFT's adapters remember the attention they were trained with.

An adapter's folder names its base model, and that one may be a softmax checkpoint. So "attn_implementation" and the options `linattn` go
into adapter_config.json as well, and an adapter put on a model again gives it both, unless the model was loaded with another implementation
asked for aloud: then a warning says which one runs. Without hf_linattn PEFT itself warns that it ignores the two keys.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.utils import is_peft_available, logging

from .choice import UNASKED, implementation_to_save
from .config import NAME, LinAttnConfig

logger = logging.get_logger(__name__)

KEYS = ("attn_implementation", NAME)


def remember_or_restore(model: Any, peft_config: Any) -> None:
    """Called as an adapter is put on a model: a new one remembers the model's attention, one from disk brings its own."""
    if not isinstance(model, PreTrainedModel):
        return
    remembered = {key: vars(peft_config).get(key) for key in KEYS}
    if remembered["attn_implementation"] is None:
        chosen = implementation_to_save(model.config)
        if chosen is not None:
            peft_config.attn_implementation = chosen
            setattr(peft_config, NAME, LinAttnConfig.of(model.config).to_dict())
        return
    _restore(model, remembered["attn_implementation"], remembered[NAME] or {})


def _restore(model: PreTrainedModel, implementation: str | dict, options: dict[str, Any]) -> None:
    running = implementation_to_save(model.config)
    if running is None and not getattr(model, UNASKED, False):
        logger.warning(
            f"The adapter was trained with attn_implementation={implementation!r}, but {type(model).__name__} runs "
            f"{model.config._attn_implementation!r} as it was told to; load the model with attn_implementation={implementation!r} for the "
            "other."
        )
        return
    wanted = LinAttnConfig(**options)
    if running is None or LinAttnConfig.of(model.config) == LinAttnConfig():
        wanted.store(model.config)
    elif LinAttnConfig.of(model.config) != wanted:
        logger.warning(
            f"The adapter was trained with config.linattn = {options}, but {type(model).__name__} has its own, which run; "
            "set model.config.linattn to those for the other."
        )
    if running is None:
        model.set_attn_implementation(implementation)


def refuse_virtual_tokens(model: Any) -> None:
    """Refuses, of a model with linear attention, what PEFT cannot do with any: it fails at a name that Transformers no longer gives it.

    Raises:
        ValueError: tokens that PEFT has learned go before a text in a static cache.
    """
    if isinstance(model, PreTrainedModel) and implementation_to_save(model.config) is not None:
        raise ValueError(
            "PEFT cannot put the virtual tokens that it has learned (prompt tuning and its kin) into a static cache; leave out "
            'cache_implementation="static", or train with LoRA.'
        )


def install() -> None:
    """Wraps the two places where PEFT puts an adapter on a model, the two that write and read adapter_config.json, and generating."""
    if not is_peft_available():
        return
    from peft import PeftModel, PeftModelForCausalLM
    from peft.config import PeftConfigMixin
    from peft.tuners.tuners_utils import BaseTuner

    inject, prepare = BaseTuner.inject_adapter, PeftModel._setup_prompt_encoder
    step = PeftModelForCausalLM.prepare_inputs_for_generation
    write, read = PeftConfigMixin.to_dict, vars(PeftConfigMixin)["from_peft_type"].__func__

    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        remember_or_restore(model, self.peft_config[adapter_name])
        inject(self, model, adapter_name, *args, **kwargs)

    def _setup_prompt_encoder(self: Any, adapter_name: str) -> None:
        remember_or_restore(self.base_model, self.peft_config[adapter_name])
        prepare(self, adapter_name)

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.active_peft_config.is_prompt_learning and getattr(kwargs.get("past_key_values"), "is_compileable", False):
            refuse_virtual_tokens(self.get_base_model())
        return step(self, *args, **kwargs)

    def to_dict(self: Any) -> dict[str, Any]:
        return write(self) | {key: value for key, value in vars(self).items() if key in KEYS}

    def from_peft_type(cls: Any, **kwargs: Any) -> Any:
        remembered = {key: kwargs.pop(key) for key in KEYS if key in kwargs}
        config = read(cls, **kwargs)
        vars(config).update(remembered)
        return config

    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]
    PeftModel._setup_prompt_encoder = _setup_prompt_encoder  # type: ignore[method-assign]
    PeftModelForCausalLM.prepare_inputs_for_generation = prepare_inputs_for_generation  # type: ignore[method-assign]
    PeftConfigMixin.to_dict = to_dict  # type: ignore[method-assign]
    PeftConfigMixin.from_peft_type = classmethod(from_peft_type)  # type: ignore[method-assign, assignment]
