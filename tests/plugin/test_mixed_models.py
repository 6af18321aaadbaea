"""Models with attention beside Mamba, convolution or linear layers: our cache for the attention, their own for the rest."""

import pytest
import torch
import transformers
from tiny_models import TEXT, tiny_tokens
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import LinearAttentionLayer

from hf_linattn import LinearStateLayer, cache_bytes
from hf_linattn.cache import MixedLayer

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
TURNS = {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4}
MODELS = {
    # in one layer
    "FalconH1": {**MAMBA, "mamba_d_ssm": 128, "head_dim": 16},
    # layer by layer
    "GraniteMoeHybrid": {**TURNS, **MAMBA, "num_local_experts": 0, "shared_intermediate_size": 96},
    "Qwen3Next": {**TURNS, **DELTA, "head_dim": 16, "num_experts": 0},
    "Lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
}
ONE_BY_ONE = ["Jamba"]  # whose Mamba goes on from a cache only a token at a time


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    config = getattr(transformers, request.param + "Config")(**TEXT | {"num_key_value_heads": 2} | MODELS[request.param])
    torch.manual_seed(0)
    model = getattr(transformers, request.param + "ForCausalLM")._from_config(config, attn_implementation="linattn").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return model


def test_cached_calls_equal_the_full_pass(model):
    ids = tiny_tokens()
    lengths = [9] + [1] * 14 if type(model).__name__.removesuffix("ForCausalLM") in ONE_BY_ONE else [9, 1, 1, 12]
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
            for _ in range(2):
                out = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(lengths, 1)], 1)
                torch.testing.assert_close(out, full, atol=1e-4, rtol=0)
                cache.reset()


def test_bytes_of_recurrences_are_counted(model):
    with torch.no_grad():
        cache = model(tiny_tokens()).past_key_values
    layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    recurrent = [state for layer in layers for state in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    linear = sum(layer.nbytes() for layer in cache.layers if isinstance(layer, LinearStateLayer))
    assert recurrent and cache_bytes(cache) == linear + sum(state.nbytes for state in recurrent if state is not None)


def test_each_layer_has_the_cache_of_its_kind(model):
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        recurrent = [isinstance(layer, LinearAttentionLayer) for layer in cache.layers]
        ours = [isinstance(layer, LinearStateLayer) for layer in cache.layers]
        if isinstance(cache.layers[0], MixedLayer):
            assert all(recurrent) and all(ours)
        else:
            assert any(ours) and recurrent == [not linear for linear in ours]


def test_generation_with_beams_and_left_padding(model):
    ids, new = tiny_tokens(), {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    padded, mask = torch.zeros(2, 28, dtype=torch.long), torch.zeros(2, 28, dtype=torch.long)
    padded[0, 5:], padded[1, 9:] = ids[0], ids[1, :19]
    mask[0, 5:], mask[1, 9:] = 1, 1
    alone = torch.cat([model.generate(ids[:1], **new)[:, 23:], model.generate(ids[1:, :19], **new)[:, 19:]])
    assert torch.equal(model.generate(padded, attention_mask=mask, **new)[:, 28:], alone)
    beams = {"num_beams": 3, **new}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


def test_batch_operations_reach_both_states_of_a_layer():
    config = transformers.FalconH1Config(**TEXT, **MODELS["FalconH1"], num_key_value_heads=2)
    model = transformers.FalconH1ForCausalLM._from_config(config, attn_implementation="linattn").eval()
    ids = tiny_tokens(3)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = model(ids[:, :22]).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0]))
        out = model(ids[[2, 0], 22:], past_key_values=cache).logits
    torch.testing.assert_close(out, full[[2, 0], 22:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_tokens_are_taken_back_from_both_states_of_a_layer():
    """But for the recurrence, which Transformers cannot take back: assisted generation asks `is_croppable` before it begins."""
    config = transformers.FalconH1Config(**TEXT, **MODELS["FalconH1"], num_key_value_heads=2)
    model = transformers.FalconH1ForCausalLM._from_config(config, attn_implementation="linattn").eval()
    caches = [DynamicCache(config=config) for _ in range(2)]
    for cache, seen, taken_back in zip(caches, (12, 9), (3, 0), strict=True):
        cache.activate_past_recording()
        model(tiny_tokens()[:, :seen], past_key_values=cache)
        cache.crop(-taken_back)
        assert not cache.is_croppable and cache.get_seq_length() == 9
    for cropped, never in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(cropped.state["sums"], never.state["sums"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cropped.conv_states[0], never.conv_states[0], atol=1e-5, rtol=1e-5)
