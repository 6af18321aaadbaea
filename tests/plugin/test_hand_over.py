"""What `update` returns reaches the attention function once for each reader: keys read twice, rebuilt, shared; or a sentence at prefill."""

import pytest
import torch
import transformers
from tiny_models import TEXT, tiny_model, tiny_tokens
from transformers import DynamicCache, StaticCache

from hf_linattn import LinAttnConfig, LinearStateLayer
from hf_linattn.hand_over import hand_over, receive

LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
SHARED = {"layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 2, "num_key_value_heads": 2, "head_dim": 16}
MODELS = {
    "reads twice": ("DiffLlama", {}),
    "expands a latent": ("DeepseekV3", LATENT | EXPERTS),
    "expands a latent without experts": ("MiniCPM3", LATENT),
    "repeats its heads": ("JetMoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "kv_channels": 16}),
    "shares with later layers": (
        "Gemma3nForCausalLM",
        SHARED
        | {
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),  # fmt: skip
}


def make(name, attn_implementation="linattn", **options):
    """A tiny model of four layers; `options` become `config.linattn`."""
    base, sizes = MODELS[name]
    base = base.removesuffix("ForCausalLM")
    config_class = getattr(transformers, base + ("TextConfig" if base == "Gemma3n" else "Config"))
    config = config_class(**TEXT | {"num_hidden_layers": 4, "intermediate_size": 96} | sizes)
    config.linattn = options
    torch.manual_seed(0)
    model = getattr(transformers, base + "ForCausalLM")._from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make(request.param, decay="head")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def feed(model, ids, cache, lengths):
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(lengths, 1)], 1)


@torch.no_grad()
def test_every_reader_continues_its_own_state(model):
    ids = tiny_tokens()
    full = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        close(feed(model, ids, cache, [9, 1, 1, 12]), full)
        cache.reset()
        close(feed(model, ids, cache, [12, 11]), full)


@torch.no_grad()
def test_every_reader_follows_its_sequence_and_takes_tokens_back(model):
    ids = tiny_tokens(3)
    full = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    feed(model, ids, cache, [9, 8, 6])
    cache.crop(-7)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    close(feed(model, ids[[2, 0, 1], 16:], cache, [1, 6]), full[[2, 0, 1], 16:])


def test_generation(model):
    ids, new = tiny_tokens(), {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    assert torch.equal(model.generate(ids, num_beams=2, **new), model.generate(ids, num_beams=2, use_cache=False, **new))


@pytest.mark.parametrize("layers", [1, 3])  # with more than one, the next layer's update would notice too
@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_softmax_over_handed_keys_is_refused_at_prefill(other, layers):
    model = tiny_model("llama", layers=layers)
    cache = DynamicCache(config=model.config)
    model.set_attn_implementation(other)
    with pytest.raises(RuntimeError, match="never read: the model no longer has"):
        model(tiny_tokens(), past_key_values=cache)


@torch.no_grad()
def test_a_call_that_reads_less_often_is_refused():
    model = make("reads twice")
    cache = model(tiny_tokens()).past_key_values
    layer = cache.layers[0]
    key = torch.randn(2, 4, 1, 16)
    layer.update(key, key)
    layer.next_reader()
    with pytest.raises(RuntimeError, match="1 times, and the one before 2 times"):
        layer.update(key, key)
    layer.next_reader()
    layer.update(key, key)
    layer.next_reader(), layer.next_reader()
    with pytest.raises(RuntimeError, match="3 times, and the one before 2 times"):
        layer.next_reader()


@torch.no_grad()
def test_a_reset_begins_to_count_readers_anew():
    model = make("reads twice")
    layer = model(tiny_tokens()).past_key_values.layers[0]
    key = torch.randn(2, 4, 1, 16)
    layer.update(key, key)  # and nobody reads it
    layer.reset()
    layer.update(key, key)
    layer.next_reader(), layer.next_reader()


@torch.no_grad()
def test_more_keys_than_the_cache_returned_are_refused_at_prefill(monkeypatch):
    """As models with learned sinks, or with compressed keys beside the new ones, make them."""
    model = tiny_model("llama")
    update = DynamicCache.update
    monkeypatch.setattr(
        DynamicCache, "update", lambda *args, **kwargs: tuple(torch.cat([x, x[:, :, :1]], 2) for x in update(*args, **kwargs))
    )
    with pytest.raises(ValueError, match="puts other keys beside those of its cache, 24 for 23 new tokens"):
        model(tiny_tokens())


@pytest.mark.parametrize("kind", ["indexed_attention", "deepseek_sparse_attention", "compressed_sparse_attention"])
def test_layers_that_choose_their_keys_are_refused(kind):
    from transformers.models.deepseek_v4 import modeling_deepseek_v4  # noqa: F401  (brings its layer types)

    if kind not in transformers.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING:
        pytest.skip("a layer type of other versions of Transformers")
    model = tiny_model("llama")
    model.config.__dict__["layer_types"] = ["full_attention", kind, "full_attention"]
    with pytest.raises(ValueError, match=f"Layers of type '{kind}' choose or compress the keys"):
        DynamicCache(config=model.config)


def test_softmax_layers_beside_shared_keys_are_refused():
    model = make("shares with later layers")
    LinAttnConfig(softmax_layers=[1]).store(model.config)
    with pytest.raises(ValueError, match="a softmax and a linear layer cannot"):
        model(tiny_tokens())


CHANGES = {
    "read only": lambda key: key.sum(),
    "written in place": lambda key: key.mul_(2),
    "turned in place": lambda key: key.transpose_(1, 2),
    "exchanged": lambda key: setattr(key, "data", torch.ones(1, 2, 7, 4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_done_to_a_handed_tensor_is_received(change):
    layer, key = LinearStateLayer(), torch.randn(1, 3, 5, 4)
    handed, expected = hand_over(key.clone(), layer), key.clone()
    CHANGES[change](handed)
    CHANGES[change](expected)
    received, found = receive(handed)
    assert found is layer and type(received) is torch.Tensor and torch.equal(received, expected)


@pytest.mark.parametrize(
    "change", [lambda x: torch.cat(tensors=[x], dim=1), lambda x: torch.mul(input=x, other=1), lambda x: torch.mul(1, x)]
)
def test_what_is_made_of_a_tensor_given_by_name_carries_the_layer(change):
    layer, key = LinearStateLayer(), torch.randn(1, 3, 5, 4)
    received, found = receive(change(hand_over(key.clone(), layer)))
    assert found is layer and torch.equal(received, key)
