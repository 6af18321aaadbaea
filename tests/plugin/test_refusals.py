"""What linear attention cannot serve is refused in one sentence that says what to do."""

import pytest
import sweep.tiny
import torch
from tiny_models import tiny_config, tiny_model, tiny_tokens
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    BertConfig,
    BloomConfig,
    DynamicCache,
    GPTJConfig,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5EncoderModel,
)
from transformers.masking_utils import create_causal_mask

from hf_linattn import LinAttnConfig, calls, require_attention_interface
from hf_linattn.models import config_class_for


@torch.no_grad()
@pytest.mark.parametrize("how", ["a call", "a call of the part", "generation", "offloaded", "filled"])
@pytest.mark.parametrize("converted", [False, True], ids=["chosen", "converted"])
def test_a_cache_without_the_models_config(converted, how):
    """At the first tokens, which such a cache would give back as if there were none."""
    if how == "offloaded" and torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("Transformers' offloaded caches ask a PyTorch for CUDA for a stream of the GPU")
    model, ids = tiny_model("llama"), tiny_tokens()
    if converted:
        sizes = model.config.to_diff_dict() | {"model_type": "linattn_llama"}
        model = AutoModelForCausalLM.from_config(config_class_for("llama").from_dict(sizes))
    cache = DynamicCache(offloading=how == "offloaded")
    if how == "filled":
        cache = tiny_model("llama", "sdpa")(ids[:, :10]).past_key_values
    with pytest.raises(ValueError, match=r"the cache keeps keys and values.*DynamicCache\(config=model.config\)"):
        if how == "generation":
            model.generate(ids, max_new_tokens=1, past_key_values=cache, pad_token_id=0)
        else:
            (model.model if "part" in how else model)(ids, past_key_values=cache)
    assert how == "filled" or cache.get_seq_length() == 0
    own = DynamicCache(config=model.config)
    model(ids, past_key_values=own)
    assert own.get_seq_length() == ids.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 10])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize(("ours", "theirs"), [([1], []), ([], [1]), ([0, 2], [1]), ([0, 1, 2], [0])])
def test_a_cache_of_a_model_with_other_softmax_layers(ours, theirs, kind, tokens):
    """Whose layers of softmax would see the new tokens alone, and whose linear ones would be given all keys."""
    model, other = (tiny_model("llama", softmax_layers=layers) for layers in (ours, theirs))
    options, ids = {} if kind is DynamicCache else {"max_cache_len": 32}, tiny_tokens()
    of_another = "(keeps a state where a layer of this one is softmax|keeps keys and values).*DynamicCache"
    with pytest.raises(ValueError, match=of_another):
        model(ids[:, :tokens], past_key_values=kind(config=other.config, **options))
    filled = kind(config=other.config, **options)
    other(ids[:, :tokens], past_key_values=filled)
    with pytest.raises(ValueError, match=of_another):
        model(ids[:, tokens : tokens + 1], past_key_values=filled)


@torch.no_grad()
@pytest.mark.parametrize("ours", [[1], []])
def test_in_a_compiled_graph_a_cache_of_another_model_is_refused_at_the_second_call(ours):
    model, ids = tiny_model("llama", softmax_layers=ours), tiny_tokens()
    cache = DynamicCache(config=tiny_model("llama", softmax_layers=[0]).config)
    torch._dynamo.reset()
    step = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="keeps a state where a layer of this one is softmax|keeps keys and values"):
        for token in ids[:, :3].split(1, 1):
            step(token, past_key_values=cache)


@torch.no_grad()
def test_a_cache_of_a_model_all_of_whose_layers_stay_softmax():
    model, ids = tiny_model("llama"), tiny_tokens()
    model.config.linattn = {"softmax_layers": list(range(model.config.num_hidden_layers))}
    cache = DynamicCache()
    whole = model(ids).logits
    model(ids[:, :10], past_key_values=cache)
    torch.testing.assert_close(model(ids[:, 10:], past_key_values=cache).logits, whole[:, 10:])


@torch.no_grad()
@pytest.mark.parametrize("call", ["a step", "a chunk", "generation"])
def test_a_cache_that_the_model_makes_itself(call):
    """Not the user's fault, and not what they can mend by another cache."""
    model, ids = AutoModelForCausalLM.from_config(sweep.tiny.tiny_config("minimax"), attn_implementation="linattn"), tiny_tokens()
    past = model(ids[:, :10], use_cache=True).past_key_values
    new = {"input_ids": ids[:, 10:11] if call == "a step" else ids[:, 10:], "past_key_values": past}
    with pytest.raises(ValueError, match="makes a cache of its own, MiniMaxCache.* use_cache=False"):
        model.generate(ids, max_new_tokens=3, pad_token_id=0) if call == "generation" else model(**new)
    assert model.generate(ids, max_new_tokens=3, pad_token_id=0, use_cache=False).shape == (2, 26)


@torch.no_grad()
def test_a_cache_of_the_softmax_model():
    model, ids = tiny_model("llama", "sdpa"), tiny_tokens()
    cache = model(ids[:, :10]).past_key_values
    model.set_attn_implementation("linattn")
    with pytest.raises(ValueError, match="the cache keeps keys and values"):
        model(ids[:, 10:], past_key_values=cache)


@torch.no_grad()
def test_a_cache_of_the_linear_model_under_softmax():
    model, ids = tiny_model("llama"), tiny_tokens()
    cache = model(ids[:, :10]).past_key_values
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="Make a new cache"):
        for token in ids[:, 10:].split(1, 1):
            model(token, past_key_values=cache)


@torch.no_grad()
def test_a_cache_of_other_heads_or_batch():
    model, ids = tiny_model("llama"), tiny_tokens()
    cache = model(ids[:, :10]).past_key_values
    with pytest.raises(ValueError, match="The cache holds 2 sequences, and 1 are to go on from it"):
        model(ids[:1, 10:], past_key_values=cache)
    model.config.linattn = {"kernel": "quadratic"}
    cache = tiny_model("llama")(ids[:, :10]).past_key_values
    with pytest.raises(ValueError, match="kernel"):
        model(ids[:, 10:], past_key_values=cache)


def test_an_architecture_without_the_attention_interface():
    """Chosen past every place where it could be refused: the first call does."""
    config = BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=97)
    model = AutoModelForCausalLM.from_config(config)
    model.config._attn_implementation_internal = "linattn"
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="does not use Transformers' attention interface"):
            model(tiny_tokens(), use_cache=use_cache)
    for given in (model, type(model), config):
        with pytest.raises(ValueError, match="such as Llama or GPT-NeoX"):
            require_attention_interface(given)


def test_no_cache_is_made_for_it_either():
    config = BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=97)
    config._attn_implementation_internal = "linattn"
    with pytest.raises(ValueError, match="does not use Transformers' attention interface"):
        DynamicCache(config=config)


def test_gptj_is_told_too():
    with pytest.raises(ValueError, match="attention interface"):
        require_attention_interface(GPTJConfig())


def test_supported_architectures_pass():
    model = tiny_model("llama")
    for given in (model, type(model), model.config, BertConfig()):
        require_attention_interface(given)


def chosen_afterwards(model):
    """As a model in which nothing refused it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation_internal = "linattn"
    return model


def test_cross_attention():
    config = tiny_config("bert")
    config.is_decoder = config.add_cross_attention = True
    model = chosen_afterwards(AutoModel.from_config(config).eval())
    with pytest.raises(ValueError, match="cross-attention"):
        model(tiny_tokens(), encoder_hidden_states=torch.randn(2, 5, 64))


def test_encoder_decoder():
    config = BartConfig(vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    with pytest.raises(ValueError, match="cross-attention"):
        chosen_afterwards(BartModel(config))(tiny_tokens())


def test_softmax_only_position_bias():
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, is_encoder_decoder=False)
    with pytest.raises(ValueError, match="position bias|bias"):
        chosen_afterwards(T5EncoderModel(config))(tiny_tokens())


@torch.no_grad()
def test_attention_weights_are_none():
    """There are none: as for SDPA, the model answers without them."""
    out = tiny_model("llama")(tiny_tokens(), output_attentions=True)
    assert out.attentions is None or all(weights is None for weights in out.attentions)


@torch.no_grad()
@pytest.mark.parametrize("name, asked, said", [
    ("llama", {}, []),
    ("llama", {"output_attentions": True}, ["LlamaAttention: linear attention computes no attention weights"]),
    ("mistral", {}, ["MistralAttention: sliding windows shape softmax scores; linear attention drops them."]),
    ("gemma2", {}, ["Gemma2Attention: sliding windows and softcaps shape softmax scores; linear attention drops them."]),
    ("gpt_oss", {}, ["GptOssAttention: sliding windows and attention sinks shape"]),
])  # fmt: skip
def test_what_is_dropped_is_said(name, asked, said, monkeypatch):
    config = sweep.tiny.tiny_config(name) if name == "gpt_oss" else tiny_config(name)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="linattn")
    told: list[str] = []
    monkeypatch.setattr(calls.logger, "warning_once", told.append)
    model(tiny_tokens(), **asked)
    model(tiny_tokens(), **asked)
    assert len(set(told)) == len(said) and all(one.startswith(words) for one, words in zip(told, said, strict=False))


@torch.no_grad()
def test_windows_of_layers_that_keep_softmax_are_not_dropped(monkeypatch):
    config = tiny_config("gemma2")
    kept = [layer for layer, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
    LinAttnConfig(softmax_layers=kept).store(config)
    told: list[str] = []
    monkeypatch.setattr(calls.logger, "warning_once", told.append)
    AutoModelForCausalLM.from_config(config, attn_implementation="linattn")(tiny_tokens())
    assert set(told) == {"Gemma2Attention: softcaps shape softmax scores; linear attention drops them."}


@torch.no_grad()
def test_a_softcap_is_dropped():
    ids = tiny_tokens()
    model = tiny_model("gemma2")
    with_softcap = model(ids).logits
    model.config.attn_logit_softcapping = None
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    assert torch.equal(model(ids).logits, with_softcap)


@torch.no_grad()
def test_a_sliding_window_is_dropped():
    ids = tiny_tokens()
    model = tiny_model("mistral")  # its window is 8
    other = ids.clone()
    other[:, 0] += 1
    assert (model(ids).logits[:, -1] - model(other).logits[:, -1]).abs().max() > 1e-6
    model.config.sliding_window = None
    no_window = model(ids).logits
    torch.testing.assert_close(no_window, tiny_model("mistral")(ids).logits)


def test_an_image_inside_a_text():
    model = tiny_model("llama")
    image = torch.zeros(23, dtype=torch.bool)
    image[5:9] = True
    both = {"config": model.config, "inputs_embeds": torch.zeros(2, 23, 64), "attention_mask": None, "past_key_values": None}
    with pytest.raises(ValueError, match="such as those of an image"):
        create_causal_mask(**both, or_mask_function=lambda batch, head, row, column: image[row] & image[column])


@torch.no_grad()
def test_a_causal_architecture_made_bidirectional():
    ids = tiny_tokens()
    model = tiny_model("llama")
    model.config.is_causal = False
    other = ids.clone()
    other[:, -1] += 1
    assert (model(ids).logits[:, 0] - model(other).logits[:, 0]).abs().max() > 1e-5


def test_a_quantized_cache():
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    with pytest.raises(ValueError, match="linattn|fp8"):  # Transformers' own sentence, which 5.17 has for the backend already
        tiny_model("llama").generate(tiny_tokens(), max_new_tokens=2, pad_token_id=0, **options)


def test_continuous_batching_even_where_a_flash_attention_could_take_the_place(monkeypatch):
    """Transformers would change any implementation that it finds into a flash attention, and so linear attention into softmax."""
    from transformers.generation.continuous_batching import continuous_api

    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda **_: True, raising=False)
    for options in ({}, {"softmax_layers": [0, 1, 2]}):
        model = tiny_model("llama", **options)
        for start in (model.init_continuous_batching, lambda: model.generate_batch([[5, 6, 7]])):  # noqa: B023
            with pytest.raises(ValueError, match="Continuous batching keeps keys and values in pages, and linear attention keeps none"):
                start()
        assert model.config._attn_implementation == "linattn"


def test_a_converted_checkpoint_with_the_attention_of_vllm(monkeypatch):
    """As vLLM builds a model: its name in the config, then AutoModel."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "vllm", None)
    config = config_class_for("llama")(**tiny_config("llama").to_diff_dict())
    config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match="vLLM would put its own softmax attention in the place of this checkpoint's linear one"):
        AutoModel.from_config(config)


def test_a_module_without_a_config_is_no_cross_attention():
    assert not calls._is_cross_attention(torch.nn.Linear(2, 2))
