"""A model with linear attention comes back as it was saved: by Transformers, by Trainer and by PEFT, with options and without."""

import json
import logging

import pytest
import torch
import transformers
from tiny_models import TEXT, tiny_config, tiny_model, tiny_tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_linattn import LinAttnConfig

peft = pytest.importorskip("peft")
OPTIONS = [{}, {"decay": "head"}, {"kernel": "quadratic", "softmax_layers": [1]}]


@torch.no_grad()
def logits(model):
    return model.eval()(tiny_tokens())[0]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_saved_by_transformers(name, options, tmp_path):
    auto = AutoModel if name == "bert" else AutoModelForCausalLM
    if name == "bert":
        options = {key: value for key, value in options.items() if key != "softmax_layers"}
    model = tiny_model(name, **options)
    model.save_pretrained(tmp_path / "once")
    auto.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "again")
    for folder in (tmp_path / "once", tmp_path / "again"):
        assert json.loads((folder / "config.json").read_text())["attn_implementation"] == "linattn"
        for asked in ({}, {"attn_implementation": None}, {"config": AutoConfig.from_pretrained(folder)}):
            loaded = auto.from_pretrained(folder, **asked)
            assert loaded.config._attn_implementation == "linattn"
            assert torch.equal(logits(loaded), logits(model))
    softmax = auto.from_pretrained(tmp_path / "once", attn_implementation="sdpa")
    assert torch.equal(logits(softmax), logits(tiny_model(name, "sdpa")))
    model.set_attn_implementation("sdpa")
    for number, other in enumerate((softmax, model)):  # whose options stay, and would ask for linear attention
        other.save_pretrained(tmp_path / f"softmax {number}")
        written = json.loads((tmp_path / f"softmax {number}" / "config.json").read_text())
        assert written.get("attn_implementation") == ("sdpa" if "linattn" in written else None)
        loaded = auto.from_pretrained(tmp_path / f"softmax {number}")
        assert loaded.config._attn_implementation == "sdpa" and torch.equal(logits(loaded), logits(softmax))


def test_nothing_of_it_is_in_the_generation_config(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    assert "lin" not in (tmp_path / "generation_config.json").read_text()


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_saved_by_a_trainer(options, tmp_path):
    model, data = tiny_model("llama", **options), [{"input_ids": row, "labels": row} for row in tiny_tokens(4)]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_steps=1, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=data).train()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")), logits(model))


def llava():
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 4}  # fmt: skip
    text = {**TEXT, "model_type": "llama", "vocab_size": 120}
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=98)


def test_a_part_with_linear_attention_comes_back_alone(tmp_path):
    config, cls = llava(), transformers.LlavaForConditionalGeneration
    for asked in ({"text_config": "linattn"}, "linattn"):
        model = cls._from_config(config, attn_implementation=asked)
        model.save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        for part in ("text_config", "vision_config"):
            assert getattr(loaded.config, part)._attn_implementation == getattr(model.config, part)._attn_implementation
        assert (loaded.config.vision_config._attn_implementation == "linattn") == (asked == "linattn")
        assert torch.equal(logits(loaded), logits(model))


def test_parts_that_went_back_to_softmax_stay_with_theirs(tmp_path):
    config = llava()
    LinAttnConfig(decay="head").store(config)
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="linattn")
    for asked in ("eager", {"": "sdpa", "text_config": "sdpa", "vision_config": "eager"}, {"text_config": "linattn"}):
        model.set_attn_implementation(asked)
        model.save_pretrained(tmp_path)
        loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
        assert loaded.config.text_config._attn_implementation == model.config.text_config._attn_implementation
        assert torch.equal(logits(loaded), logits(model))


def test_a_part_that_knows_no_sdpa_is_not_asked_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.models.clip.modeling_clip.CLIPPreTrainedModel, "_supports_sdpa", False)
    config = llava()
    LinAttnConfig(decay="head").store(config)
    cls = transformers.LlavaForConditionalGeneration
    model = cls._from_config(config, attn_implementation={"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attn_implementation"] == {"": "sdpa"}
    assert torch.equal(logits(cls.from_pretrained(tmp_path)), logits(model))


def test_without_the_package_transformers_says_what_is_missing(tmp_path, monkeypatch):
    tiny_model("llama", layers=1).save_pretrained(tmp_path)
    monkeypatch.delitem(transformers.AttentionInterface._global_mapping, "linattn")
    with pytest.raises(ValueError, match='Specified `attn_implementation="linattn"` is not supported'):
        AutoModelForCausalLM.from_pretrained(tmp_path)


class TestAdapters:
    """The base is a softmax checkpoint on disk; the adapter was trained on it with linear attention."""

    @pytest.fixture(params=[{"decay": "head"}, {}, {"kernel": "quadratic", "softmax_layers": [1]}], ids=str)
    def trained(self, request, tmp_path):
        tiny_model("llama", "sdpa").save_pretrained(tmp_path / "base")
        config = AutoConfig.from_pretrained(tmp_path / "base")
        if request.param:
            LinAttnConfig(**request.param).store(config)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", config=config, attn_implementation="linattn")
        torch.manual_seed(0)
        model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path, logits(model)

    def test_comes_back_by_every_way(self, trained):
        folder, expected = trained
        by_transformers = AutoModelForCausalLM.from_pretrained(folder / "adapter")
        loaded = [
            peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter"),
            peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter"),
            by_transformers,
        ]
        for model in loaded:
            assert torch.equal(logits(model), expected)
        by_transformers.save_pretrained(folder / "again")
        loaded[0].save_pretrained(folder / "once_more")
        for again in ("again", "once_more"):
            assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder / again)), expected)

    def test_softmax_asked_for_aloud_runs_and_is_warned_of(self, trained, caplog):
        folder, expected = trained
        logging.getLogger("transformers").propagate = True
        logging.getLogger("hf_linattn").propagate = True
        model = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", attn_implementation="sdpa")
        assert model.config._attn_implementation == "sdpa" and not torch.equal(logits(model), expected)
        assert "trained with attn_implementation='linattn', but LlamaForCausalLM runs 'sdpa'" in caplog.text


def test_an_adapter_beside_other_options_of_the_model_is_warned_of(tmp_path, caplog):
    logging.getLogger("hf_linattn").propagate = True
    model = peft.get_peft_model(tiny_model("llama", decay="head"), peft.LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    expected = logits(model)
    for options, said in (({"decay": "head"}, False), ({"kernel": "quadratic"}, True), ({}, False)):
        caplog.clear()
        base = tiny_model("llama", **options)
        again = peft.PeftModel.from_pretrained(base, tmp_path)
        assert ("has its own, which run" in caplog.text) == said
        assert torch.equal(logits(again), expected) != said
        assert LinAttnConfig.of(base.config).kernel == options.get("kernel", "linear")


def test_an_adapter_of_prompts_comes_back(tmp_path):
    tiny_model("llama", "sdpa").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="linattn")
    model = peft.get_peft_model(base, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


def test_adapters_of_softmax_models_are_left_alone(tmp_path):
    peft.get_peft_model(tiny_model("llama", "sdpa"), peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert not {"attn_implementation", "linattn"} & json.loads((tmp_path / "adapter_config.json").read_text()).keys()
    assert tiny_config("llama").to_dict().keys().isdisjoint({"attn_implementation", "linattn"})
