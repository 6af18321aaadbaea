"""A model that keeps chosen layers softmax: cache, generation, padding and packing as for one kind of layer."""

import pickle

import pytest
import torch
import transformers
from generating import left_padded
from tiny_models import CAUSAL, TEXT, tiny_config, tiny_model, tiny_tokens
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_linattn import LinAttnConfig, LinearStateLayer
from hf_linattn.models import config_class_for

NEW = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(scope="module", params=CAUSAL)
def model(request):
    return tiny_model(request.param, softmax_layers=[1])


@pytest.fixture(scope="module", params=["mistral", "gemma2", "gemma3"])
def windowed(request):
    """Sliding windows of 8 tokens on a layer that stays softmax."""
    return tiny_model(request.param, softmax_layers=[0, 2])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def check_cache(model):
    ids = tiny_tokens()
    full = model(ids, use_cache=False).logits
    for lengths in (1, [7, 1, 9, 6]):
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
            close(torch.cat([model(part, past_key_values=cache).logits for part in ids.split(lengths, 1)], 1), full)
    linear = [isinstance(layer, LinearStateLayer) for layer in cache.layers]
    assert linear == [i not in model.config.linattn["softmax_layers"] for i in range(3)]


@torch.no_grad()
def check_padding_and_generation(model):
    ids = tiny_tokens()
    full = model(ids, use_cache=False).logits
    padded = torch.zeros(2, 28, dtype=torch.long)
    padded[0, 5:], padded[1, 9:] = ids[0], ids[1, :19]
    mask = (padded != 0).long()
    for use_cache in (False, True):
        out = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=use_cache).logits
        close(out[0, 5:], full[0])
        close(out[1, 9:], full[1, :19])
    alone = torch.cat([model.generate(ids[:1], **NEW)[:, 23:], model.generate(ids[1:, :19], **NEW)[:, 19:]])
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 6}):
        assert torch.equal(model.generate(padded, attention_mask=mask, **NEW, **options)[:, 28:], alone), options


@torch.no_grad()
def check_packing(model):
    ids = tiny_tokens()
    full = model(ids, use_cache=False).logits
    packed = torch.cat([ids[:1, :9], ids[1:, :14]], 1)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    for use_cache in (False, True):
        out = model(packed, position_ids=positions, use_cache=use_cache).logits
        close(out[0, :9], full[0, :9])
        close(out[0, 9:], full[1, :14])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_padding_is_a_number_in_every_precision(dtype):
    """What sees nothing, in a layer with a softmax of its own, and all that looks at it with no weight."""
    model = tiny_model("gemma2", softmax_layers=[0, 1, 2], scale=6.0).to(dtype)
    padded, mask = left_padded(tiny_tokens())
    out = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    alone = model(tiny_tokens()[:1]).logits
    assert out.isfinite().all()
    torch.testing.assert_close(out[:1, 5:], alone, atol=0.02 if dtype == torch.float16 else 1e-4, rtol=0)


def test_cache(model):
    check_cache(model)


def test_padding_and_generation(model):
    check_padding_and_generation(model)


def test_packing(model):
    check_packing(model)


def test_cache_beside_a_window(windowed):
    check_cache(windowed)


def test_padding_and_generation_beside_a_window(windowed):
    check_padding_and_generation(windowed)


def test_packing_beside_a_window(windowed):
    check_packing(windowed)


@torch.no_grad()
def check_autocast(model):
    """Keys are float32 behind a rotary embedding and values bfloat16: a static cache has one dtype for both, and PyTorch refused."""
    ids, cut, errors = tiny_tokens(), [7, 1, 9, 6], []
    full = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pieces = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(cut, 1)], 1)
        errors.append((pieces - full).abs().max())
        close(model(ids[:, :1], past_key_values=cache).logits.isfinite().float(), torch.ones(2, 1, full.shape[-1]))
    assert errors[1] <= 2 * errors[0]


@torch.no_grad()
def check_inference_mode(model):
    """Outside of it PyTorch refused to write, also to reset, what a static cache was filled with inside."""
    ids, cache = tiny_tokens(), StaticCache(config=model.config, max_cache_len=40)
    full = model(ids, use_cache=False).logits
    for _ in range(2):
        with torch.inference_mode():
            model(ids[:, :9], past_key_values=cache)
        close(torch.cat([model(part, past_key_values=cache).logits for part in ids[:, 9:].split([1, 13], 1)], 1), full[:, 9:])
        with torch.inference_mode():
            model(ids[:, :1], past_key_values=cache)
        cache.reset()
    close(model(ids, past_key_values=pickle.loads(pickle.dumps(cache))).logits, full)


@pytest.mark.parametrize("check", [check_autocast, check_inference_mode])
def test_where_transformers_static_cache_cannot_go(check, model):
    check(model)


@pytest.mark.parametrize("check", [check_autocast, check_inference_mode])
def test_where_transformers_static_cache_cannot_go_beside_a_window(check, windowed):
    check(windowed)


def test_prompt_lookup(model):
    ids = tiny_tokens(1, 8).repeat(1, 3)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **NEW), model.generate(ids, **NEW))


@torch.no_grad()
def test_all_layers_softmax_is_the_softmax_model():
    ids = tiny_tokens()
    hybrid, softmax = tiny_model("gemma2", softmax_layers=[0, 1, 2]), tiny_model("gemma2", "eager")
    close(hybrid(ids).logits, softmax(ids).logits)


@torch.no_grad()
def test_the_kept_layer_is_softmax():
    ids = tiny_tokens()
    outputs = [tiny_model("llama", softmax_layers=layers)(ids).logits for layers in ([], [1], [0, 1, 2])]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3 and (outputs[1] - outputs[2]).abs().max() > 1e-3
    close(outputs[2], tiny_model("llama", "sdpa")(ids).logits)


@torch.no_grad()
def test_the_kept_layer_runs_pytorchs_sdpa(monkeypatch):
    calls, sdpa = [], ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda module, *x, **y: calls.append(module.layer_idx) or sdpa(module, *x, **y))
    tiny_model("llama", softmax_layers=[1])(tiny_tokens())
    assert calls == [1]


def test_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match="names layer 3, but the model has layers 0 to 2"):
        tiny_model("llama", softmax_layers=[3])
    model = tiny_model("llama")
    model.config.linattn = {"softmax_layers": [3]}
    with pytest.raises(ValueError, match="names layer 3, but the model has layers 0 to 2"):
        model(tiny_tokens())


EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
OWN_SOFTMAX = {  # what SDPA does not compute: sinks in the denominator, sinks as a gate, a softcap where all see all
    "GptOssForCausalLM": {"head_dim": 16, "sliding_window": 8, **EXPERTS},
    "GraniteMoeSWAForCausalLM": {"sliding_window": 8, **EXPERTS},
    "GraniteSWAForCausalLM": {"sliding_window": 8},
    "Gemma2Model": {"head_dim": 16, "attn_logit_softcapping": 0.5, "is_causal": False},
}


@torch.no_grad()
@pytest.mark.parametrize("name", OWN_SOFTMAX)
def test_a_kept_layer_computes_the_softmax_of_its_architecture(name):
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip("an architecture of other versions of Transformers")
    torch.manual_seed(0)
    eager = cls._from_config(cls.config_class(**TEXT, num_key_value_heads=2, **OWN_SOFTMAX[name]), attn_implementation="eager").eval()
    for parameter in eager.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (1.0 if parameter.dim() == 1 else 0.1))
    config = cls.config_class.from_dict(eager.config.to_dict() | {"linattn": {"softmax_layers": [0, 1, 2]}})
    hybrid = cls._from_config(config, attn_implementation="linattn").eval()
    hybrid.load_state_dict(eager.state_dict())
    ids, mask = tiny_tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[0, :3] = 0
    close(hybrid(ids, use_cache=False)[0], eager(ids, use_cache=False)[0])
    padded = [model(ids, attention_mask=mask, use_cache=False)[0][mask > 0] for model in (hybrid, eager)]
    close(*padded)


@torch.no_grad()
def test_other_layers_of_a_converted_model_keep_softmax_as_soon_as_its_options_say_so():
    config = config_class_for("llama")(**tiny_config("llama").to_diff_dict(), linattn={"learnable": True, "softmax_layers": [1]})
    model, ids = AutoModelForCausalLM.from_config(config).eval(), tiny_tokens()
    before = model(ids, use_cache=False).logits
    model.config.linattn["softmax_layers"] = [0, 1]
    assert (model(ids, use_cache=False).logits - before).abs().max() > 1e-4
    check_cache(model)
    model.config.linattn["softmax_layers"] = [0]
    with pytest.raises(ValueError, match="asks LlamaAttention for numbers that it has not learned: it kept softmax, or"):
        model(ids, use_cache=False)


def test_layers_that_run_several_times_a_token_are_refused_a_cache():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
    config = AutoConfig.for_model("hrm_text", vocab_size=97, **sizes)
    config.linattn = {"softmax_layers": [1]}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="linattn").eval()
    with pytest.raises(ValueError, match="counts 2 of them: leave it empty, or give use_cache=False"):
        model(tiny_tokens())
    assert model(tiny_tokens(), use_cache=False).logits.isfinite().all()
    config.linattn = {}
    assert model(tiny_tokens()).logits.isfinite().all()


@pytest.mark.parametrize("chosen", ["linattn", {"text_config": "linattn"}], ids=str)
def test_layers_of_a_models_text_part_stay_softmax(chosen):
    sees = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(text_config=tiny_config("gemma3").to_dict(), vision_config=sees)
    LinAttnConfig(softmax_layers=[1]).store(config)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=chosen).eval()
    with torch.no_grad():
        cache = model(tiny_tokens()).past_key_values
    assert [isinstance(layer, LinearStateLayer) for layer in cache.layers] == [True, False, True]
