"""Linear attention is refused where it is chosen, whatever the way, by what the class at hand really computes."""

import pytest
import torch
import transformers
from tiny_models import SIZES, TEXT, tiny_config, tiny_model, tiny_tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from hf_linattn import LinAttnConfig, LinearStateLayer

INTERFACE = "does not use Transformers' attention interface"
SMALL_T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
SMALL_BART = {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
              "decoder_attention_heads": 2}  # fmt: skip
VISION = {**SIZES, "image_size": 16, "patch_size": 4}

# class, its config, and what the sentence says
REFUSED = {
    # a softmax of its own, past the interface
    "DebertaV2Model": (TEXT, f"DebertaV2Model {INTERFACE}"),
    "BloomForCausalLM": ({"vocab_size": 97, "hidden_size": 32, "n_head": 4, "n_layer": 1}, INTERFACE),
    "MPNetForMaskedLM": (TEXT, INTERFACE),
    # attention by a table of implementations, a KeyError else; Sam's and Git's source files mention the interface too
    "GPTJForCausalLM": ({"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}, INTERFACE),
    "SamVisionModel": ({**SIZES, "mlp_dim": 32, "image_size": 32, "patch_size": 8}, INTERFACE),
    "GitForCausalLM": ({**TEXT, "vision_config": VISION}, f"GitModel {INTERFACE}"),
    # no attention at all
    "MambaForCausalLM": ({"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1}, INTERFACE),
    "FNetForMaskedLM": (TEXT, INTERFACE),
    "ResNetModel": ({"hidden_sizes": [32, 32, 32, 32], "embedding_size": 16, "depths": [1, 1, 1, 1]}, INTERFACE),
    # one part that does and one that does not
    "ClapModel": ({"text_config": TEXT, "audio_config": {"depths": [1], "num_attention_heads": [4], "patch_embeds_hidden_size": 32}},
                  "ClapAudioSelfAttention of Clap"),
    # cross-attention
    "BartModel": (SMALL_BART, "is of an encoder-decoder model"),
    "T5Model": (SMALL_T5, "is of an encoder-decoder model"),
    "BertModel": ({**TEXT, "is_decoder": True, "add_cross_attention": True}, "BertModel has cross-attention"),
    # position biases
    "T5EncoderModel": (SMALL_T5, "adds a position bias"),
    "SwinModel": ({"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1], "num_heads": [4], "window_size": 4}, "position bias"),
    "ParakeetEncoder": ({"num_hidden_layers": 1}, "position bias"),
    "NemotronAsrStreamingEncoder": ({"num_hidden_layers": 1}, "position bias"),
    "Wav2Vec2BertModel": ({**SIZES, "position_embeddings_type": "relative_key"}, "position bias"),
    # attention to a few keys
    "DeepseekV32ForCausalLM": ({**TEXT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
                                "moe_intermediate_size": 32}, "an indexer selects"),
    # keys made of several tokens
    "DeepseekV4ForCausalLM": ({"num_hidden_layers": 4}, "made of several tokens each"),
}  # fmt: skip


def config_of(name: str):
    return getattr(transformers, name).config_class(**REFUSED[name][0])


def by_from_config(cls, config):
    cls._from_config(config, attn_implementation="linattn")


def by_construction(cls, config):
    config._attn_implementation = "linattn"
    cls(config)


def by_setting(cls, config):
    cls(config).set_attn_implementation("linattn")


def by_hand(cls, config):
    model = cls(config)
    try:
        model.config._attn_implementation = "linattn"
    finally:
        assert model.config._attn_implementation != "linattn"


def by_a_dictionary(cls, config):
    cls._from_config(config, attn_implementation={"": "linattn", **dict.fromkeys(config.sub_configs, "linattn")})


@pytest.mark.parametrize("way", [by_from_config, by_construction, by_setting, by_hand, by_a_dictionary])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name, way):
    with torch.device("meta"), pytest.raises(ValueError) as caught:
        way(getattr(transformers, name), config_of(name))
    sentence = str(caught.value)
    assert REFUSED[name][1] in sentence and "\n" not in sentence
    assert 'leave attn_implementation="linattn" out' in sentence
    parts = [part for part in config_of(name).sub_configs if getattr(config_of(name), part, None) is not None]
    assert ("or give it to those of the parts" in sentence) == bool(parts) and all(part in sentence for part in parts)


@pytest.mark.parametrize("name", ["DebertaV2Model", "GPTJForCausalLM", "T5EncoderModel"])
def test_refused_by_from_pretrained(name, tmp_path):
    cls = getattr(transformers, name)
    cls(config_of(name)).save_pretrained(tmp_path)
    for load in (cls, AutoModelForCausalLM if "Causal" in name else AutoModel):
        with pytest.raises(ValueError, match=REFUSED[name][1]):
            load.from_pretrained(tmp_path, attn_implementation="linattn")
    assert cls.from_pretrained(tmp_path).config._attn_implementation != "linattn"


@pytest.mark.parametrize("name", ["XLNetModel", "MambaModel", "DebertaV2Model", "SwinModel"])
def test_set_by_hand_on_a_built_model_nothing_changes_where_it_is_refused(name):
    options = {"XLNetModel": {"vocab_size": 97, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 32}}
    cls = getattr(transformers, name)
    options = options.get(name) or REFUSED.get(name, REFUSED["MambaForCausalLM"])[0]
    model, other = (cls(cls.config_class(**options)).eval() for _ in range(2))
    given = {"pixel_values": torch.rand(1, 3, 32, 32)} if name == "SwinModel" else {"input_ids": tiny_tokens(1, 6)}
    before = model(**given)[0]
    with pytest.raises(ValueError, match=name.removesuffix("Model")):
        model.config._attn_implementation = "linattn"
    assert torch.equal(model(**given)[0], before)
    other.config._attn_implementation = "sdpa" if other._supports_sdpa else "eager"  # other names are nobody's business
    del model
    cls.config_class(**options)._attn_implementation = "linattn"  # no model has been built with this one


def test_set_by_hand_on_a_built_model_it_is_what_setting_gives():
    model, other = tiny_model("llama", "sdpa"), tiny_model("llama", "sdpa")
    other.load_state_dict(model.state_dict())
    model.config._attn_implementation = "linattn"
    other.set_attn_implementation("linattn")
    tokens = tiny_tokens(2, 9)
    assert torch.equal(model(tokens).logits, other(tokens).logits)
    assert model.config.to_dict() == other.config.to_dict()


@pytest.mark.parametrize("name", ["BloomForCausalLM", "T5EncoderModel", "ClapModel"])
def test_a_model_whose_setting_was_refused_is_as_it_was(name):
    with torch.device("meta"):
        model = getattr(transformers, name)(config_of(name))
    before = implementations(model)
    with pytest.raises(ValueError):
        model.set_attn_implementation("linattn")
    assert implementations(model) == before and "linattn" not in before


def implementations(model):
    return [module.config._attn_implementation for module in model.modules() if isinstance(module, PreTrainedModel)]


def llava():
    text = {**TEXT, "model_type": "llama", "vocab_size": 120}
    return transformers.LlavaConfig(text_config=text, vision_config={**VISION, "model_type": "clip_vision_model"}, image_token_id=98)


# a model of parts, and what the dictionary that the sentence advises leaves of linear attention
PARTS = {
    "ClapModel": (lambda: config_of("ClapModel"), "text_model"),
    "LlavaForConditionalGeneration": (llava, "model.language_model"),
    "Blip2ForConditionalGeneration": (
        lambda: transformers.Blip2Config(
            text_config={**TEXT, "model_type": "llama"}, vision_config=VISION, qformer_config={**TEXT, "encoder_hidden_size": 64}
        ),
        "language_model",
    ),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("late", [False, True])
def test_the_advice_for_a_part_holds(name, late):
    cls, (config, part) = getattr(transformers, name), PARTS[name]
    with torch.device("meta"):
        model = cls(config()) if late else cls._from_config(config(), attn_implementation={"text_config": "linattn"})
    if late:
        model.set_attn_implementation({"text_config": "linattn"})
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "linattn"
    }
    assert part in linear and all(name.startswith(part) for name in linear)


@pytest.mark.parametrize("name, said", [("T5Model", "it has none: give attn_implementation="), ("ClapModel", "its parts are ")])
def test_linear_attention_for_a_part_that_there_is_not_is_refused(name, said, tmp_path):
    cls, asked = getattr(transformers, name), {"text_part": "linattn"}
    with torch.device("meta"):
        model = cls(config_of(name))
        with pytest.raises(ValueError, match=f"names the part 'text_part' of a {cls.config_class.__name__}; {said}"):
            cls._from_config(config_of(name), attn_implementation=asked)
    with pytest.raises(ValueError, match=said):
        model.set_attn_implementation(asked)
    config_of(name).save_pretrained(tmp_path)
    cls(config_of(name)).save_pretrained(tmp_path)
    for load in (cls, AutoModel):
        with pytest.raises(ValueError, match=said):
            load.from_pretrained(tmp_path, attn_implementation=asked)
        assert load.from_pretrained(tmp_path, attn_implementation={"text_part": "sdpa"}) is not None  # nobody's business


@torch.no_grad()
def test_layers_of_a_model_of_parts_keep_their_softmax():
    config = llava()
    LinAttnConfig(softmax_layers=[1]).store(config)
    for asked in ("linattn", {"text_config": "linattn"}):
        model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=asked).eval()
        linear = [isinstance(layer, LinearStateLayer) for layer in model(tiny_tokens()).past_key_values.layers]
        assert linear == [layer != 1 for layer in range(model.config.text_config.num_hidden_layers)]
    LinAttnConfig(softmax_layers=[9]).store(config)
    with pytest.raises(ValueError, match="names layer 9, but the model has layers 0 to"):
        transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="linattn")


class OwnSoftmax(transformers.models.llama.modeling_llama.LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        return torch.nn.functional.scaled_dot_product_attention(*[hidden_states] * 3, is_causal=True), None


class OwnSoftmaxAttention(OwnSoftmax): ...


@pytest.mark.parametrize("attention", [OwnSoftmax, OwnSoftmaxAttention])
def test_a_method_that_replaces_the_interface_counts(attention, monkeypatch):
    monkeypatch.setattr(transformers.models.llama.modeling_llama, "LlamaAttention", attention)
    with pytest.raises(ValueError, match=INTERFACE):
        AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation="linattn")


@pytest.mark.parametrize("options", [{"learnable": True}, {"learnable": True, "decay": "head"}, {"learnable": True, "kernel": "quadratic"}])
def test_learnable_numbers_need_a_converted_checkpoint(options):
    with pytest.raises(ValueError, match=r"learnable parameters.*convert the checkpoint"):
        AutoModelForCausalLM.from_config(tiny_config("llama", **options), attn_implementation="linattn")
    model = tiny_model("llama", layers=1)
    model.config.linattn = LinAttnConfig(**options).to_dict()
    with pytest.raises(ValueError, match=r"learnable parameters.*convert the checkpoint"):
        model(tiny_tokens())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert", "vit"])
def test_each_attention_of_a_model_that_is_served_is_linear(name, monkeypatch):
    """As many calls as there are layers, none of them softmax."""
    model, calls = tiny_model(name), []
    registered = transformers.AttentionInterface._global_mapping
    serve = registered["linattn"]
    monkeypatch.setitem(registered, "linattn", lambda module, *args, **more: (calls.append(module), serve(module, *args, **more))[1])
    model(torch.randn(2, 3, 16, 16) if name == "vit" else tiny_tokens())
    assert len(set(map(id, calls))) == model.config.num_hidden_layers


def test_other_implementations_are_left_alone(tmp_path):
    for implementation in ("eager", "sdpa"):
        model = AutoModel.from_config(tiny_config("bert"), attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        model.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert "attn_implementation" not in config.to_dict() and "linattn" not in config.to_dict()
    with pytest.raises(ValueError, match="not supported"):
        model.set_attn_implementation("no such attention")


def test_a_copy_of_its_config_that_a_part_keeps_chooses_nothing():
    """Rotary embeddings of GraniteSWA keep one, which Transformers passes over where it sets another implementation."""
    config = transformers.GraniteSWAConfig(**TEXT, num_key_value_heads=2, sliding_window=8)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="linattn").eval()
    model.set_attn_implementation("eager")
    softmax = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    softmax.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(tiny_tokens()).logits, softmax(tiny_tokens()).logits)
