"""PEFT's adapters on converted models and on models with linear attention."""

import pytest
import torch
from tiny_models import tiny_config, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from hf_linattn.models import BASE_MODEL_TYPES, config_class_for

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.IA3Config, peft.VeraConfig], ids=lambda c: c.__name__)
def test_default_targets_are_those_of_the_base(config):
    for name in ("llama", "gpt_neox", "phi"):
        kind = config_class_for(name)
        options = {**tiny_config(name).to_diff_dict(), "num_attention_heads": 4, "linattn": {"learnable": True}}
        base = peft.get_peft_model(AutoModelForCausalLM.from_config(tiny_config(name)), config())
        ours = peft.get_peft_model(AutoModelForCausalLM.from_config(kind(**options)), config())
        assert ours.peft_config["default"].target_modules == base.peft_config["default"].target_modules
        adapted = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
        assert adapted == [name for name, parameter in base.named_parameters() if parameter.requires_grad]
        ids = tiny_tokens()
        ours(ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None for parameter in ours.parameters() if parameter.requires_grad)


def test_every_converted_type_that_peft_knows_the_base_of_has_targets():
    known = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert all(known.get("linattn_" + name) == known.get(name) for name in BASE_MODEL_TYPES)
    assert sum(name in known for name in BASE_MODEL_TYPES) >= 6


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig], ids=lambda c: c.__name__)
def test_virtual_tokens_in_a_static_cache_are_refused_in_a_sentence(kind):
    """PEFT fails there with any attention."""
    model, ids = peft.get_peft_model(tiny_model("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval(), tiny_tokens()
    with pytest.raises(ValueError, match='leave out cache_implementation="static", or train with LoRA'):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, cache_implementation="static")
    if kind is peft.PromptTuningConfig:
        assert model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4).shape == (2, 27)
