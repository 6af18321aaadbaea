"""The cache has constant size, and every way of cutting a text into calls gives the logits of one full forward pass."""

import copy

import pytest
import torch
from tiny_models import CAUSAL, tiny_config, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_linattn import LinAttnConfig, LinAttnParams, LinearStateLayer, StaticLinearStateLayer, cache_bytes
from hf_linattn.forms import Sizes
from hf_linattn.forms.polynomial import PolynomialParameters
from hf_linattn.models import config_class_for

TOLERANCE = 1e-4
OPTIONS = {
    "linear": {},
    "quadratic": {"kernel": "quadratic"},
    "decay": {"decay": "head"},
    "quadratic-decay": {"kernel": "quadratic", "decay": "head"},
    "no-unit-length": {"normalize_qk": False, "b": 0.2},
}
CASES = [(name, "linear") for name in CAUSAL] + [("llama", option) for option in OPTIONS if option != "linear"] + [("gemma3", "decay")]


def state_bytes(cache):
    return cache_bytes(cache)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    name, option = request.param
    model, ids = tiny_model(name, **OPTIONS[option]), tiny_tokens()
    with torch.no_grad():
        return model, ids, model(ids, use_cache=False).logits


def feed(model, ids, cache, lengths):
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(lengths, 1)], 1)


def test_token_by_token_equals_the_full_pass_at_constant_size(case):
    model, ids, full = case
    cache, sizes, out = DynamicCache(config=model.config), [], []
    for token in ids.split(1, 1):
        out.append(feed(model, token, cache, 1))
        sizes.append(state_bytes(cache))
    torch.testing.assert_close(torch.cat(out, 1), full, atol=TOLERANCE, rtol=0)
    assert len(set(sizes)) == 1 and cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("lengths", [[7, 1, 9, 6], [1, 22], [22, 1]], ids=str)
def test_chunks_equal_the_full_pass(case, lengths):
    model, ids, full = case
    torch.testing.assert_close(feed(model, ids, DynamicCache(config=model.config), lengths), full, atol=TOLERANCE, rtol=0)


def test_the_model_builds_its_own_cache(case):
    model, ids, full = case
    with torch.no_grad():
        cache = model(ids[:, :10]).past_key_values
        assert all(isinstance(layer, LinearStateLayer) for layer in cache.layers)
        torch.testing.assert_close(model(ids[:, 10:], past_key_values=cache).logits, full[:, 10:], atol=TOLERANCE, rtol=0)


def test_static_cache_equals_the_full_pass(case):
    model, ids, full = case
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert all(isinstance(layer, StaticLinearStateLayer) for layer in cache.layers)
    out = feed(model, ids, cache, [9, 1, 1, 12])
    torch.testing.assert_close(out, full, atol=TOLERANCE, rtol=0)
    address = cache.layers[0].state["sums"].data_ptr()
    cache.reset()
    torch.testing.assert_close(feed(model, ids, cache, [23]), full, atol=TOLERANCE, rtol=0)
    assert cache.layers[0].state["sums"].data_ptr() == address


def test_a_copied_cache_goes_its_own_way():
    model, ids = tiny_model("llama"), tiny_tokens()
    cache = DynamicCache(config=model.config)
    feed(model, ids[:, :10], cache, 10)
    other = copy.deepcopy(cache)
    expected = feed(model, ids[:, 10:], cache, 13)
    torch.testing.assert_close(feed(model, ids[:, 10:], other, 13), expected, atol=0, rtol=0)


def test_reset_starts_again():
    model, ids = tiny_model("llama"), tiny_tokens()
    cache = DynamicCache(config=model.config)
    first = feed(model, ids, cache, [20, 3])
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(feed(model, ids, cache, [20, 3]), first, atol=1e-6, rtol=0)


def test_batch_operations_follow_the_sequences():
    model, ids = tiny_model("llama", decay="head"), tiny_tokens(3)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    feed(model, ids[:, :12], cache, 12)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    chosen = [2, 0, 1]
    assert cache.batch_size == 3
    torch.testing.assert_close(feed(model, ids[chosen, 12:], cache, 11), full[chosen, 12:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kernel", ["linear", "quadratic"])
def test_parameters_of_each_head_reach_every_step(kernel):
    """Learned numbers that differ by head, a decay among them, through prefill, chunk and single step."""
    model, ids = tiny_model("llama", kernel=kernel, decay="head"), tiny_tokens()
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        for number, module in enumerate(m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")):
            torch.manual_seed(number)
            module.linattn = PolynomialParameters(Sizes(4, 2, 8, 8, longest=64.0), LinAttnConfig(kernel=kernel, decay="head").options)
            for parameter in module.linattn.parameters():
                parameter.add_(torch.randn_like(parameter))
        full = model(ids, use_cache=False).logits
    assert (full - plain).abs().max() > 1e-3
    cache = DynamicCache(config=model.config)
    torch.testing.assert_close(feed(model, ids, cache, [8, 1, 1, 13]), full, atol=TOLERANCE, rtol=0)
    assert cache.layers[0].state["sums"].shape[1] == 4  # a decay of each query head has a state of its own


def test_offloading_leaves_the_state_where_it_is():
    model, ids = tiny_model("llama"), tiny_tokens()
    layer = DynamicCache(config=model.config).layers[0]
    layer.offload()
    layer.prefetch()
    cache = DynamicCache(config=model.config)
    feed(model, ids, cache, 23)
    address = cache.layers[0].state["sums"].data_ptr()
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    assert cache.layers[0].state["sums"].data_ptr() == address


def test_a_cache_made_in_inference_mode_serves_outside_it():
    model, ids = tiny_model("llama"), tiny_tokens()
    with torch.inference_mode():
        full = model(ids).logits
        cache = model(ids[:, :20]).past_key_values
    torch.testing.assert_close(feed(model, ids[:, 20:], cache, [1, 2]), full[:, 20:].clone(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_filled_in_inference_mode_is_reset_outside_it(kind, made_inside):
    model, ids = tiny_model("llama"), tiny_tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.inference_mode(made_inside):
        cache = kind(config=model.config, **({"max_cache_len": 32} if kind is StaticCache else {}))
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask, past_key_values=cache).logits.clone()
    cache.reset()
    assert torch.equal(model(ids, attention_mask=mask, past_key_values=cache).logits, expected)
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("kernel", ["linear", "quadratic"])
def test_models_of_converted_checkpoints_have_the_same_cache(name, kernel):
    options = {"kernel": kernel, "decay": "head", "learnable": True}
    config = config_class_for(name)(**tiny_config(name, **options).to_diff_dict() | {"linattn": LinAttnConfig(**options).to_dict()})
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), tiny_tokens()
    assert any(isinstance(module, LinAttnParams) for module in model.modules())
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        torch.testing.assert_close(feed(model, ids, cache, [8, 1, 1, 13]), full, atol=TOLERANCE, rtol=0)
    new = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    assert torch.equal(model.generate(ids, **new), model.generate(ids, use_cache=False, **new))


def test_state_is_float64_in_a_float64_model():
    model, ids = tiny_model("llama").double(), tiny_tokens()
    with torch.no_grad():
        full = model(ids).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        torch.testing.assert_close(feed(model, ids, cache, [1, 21, 1]), full, atol=1e-5, rtol=0)
        assert cache.layers[0].state["sums"].dtype == torch.float64


def test_state_is_float32_in_a_bfloat16_model():
    model, ids = tiny_model("llama").to(torch.bfloat16), tiny_tokens()
    cache = DynamicCache(config=model.config)
    out = feed(model, ids, cache, [20, 1, 2])
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    assert cache.layers[0].state["sums"].dtype == torch.float32 and out.dtype == torch.bfloat16
    torch.testing.assert_close(out, full, atol=0.05, rtol=0.05)


def test_other_models_keep_their_own_caches():
    cache = DynamicCache(config=tiny_model("gemma3", "sdpa").config)
    assert not any(isinstance(layer, LinearStateLayer) for layer in cache.layers)


def test_pieces_through_a_static_cache_have_the_gradients_of_a_dynamic_one():
    """A state that a backward pass still needs is not written over by the next piece."""
    llama, ids = tiny_model("llama"), tiny_tokens(2, 9)
    found = []
    for cache in (DynamicCache(config=llama.config), StaticCache(config=llama.config, max_cache_len=16)):
        loss = sum(llama(piece, past_key_values=cache).logits.square().sum() for piece in ids.split([4, 3, 2], 1))
        found.append(torch.autograd.grad(loss, list(llama.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("form", ["polynomial", "window"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_other_sequences_and_other_options_are_refused_in_words(form, kind):
    model, ids = tiny_model("llama", form=form), tiny_tokens()
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        for new in (ids[:1, 10:11], ids.repeat(2, 1)[:, 10:]):
            with pytest.raises(ValueError, match=f"The cache holds 2 sequences, and {len(new)} are to go on from it"):
                model(new, past_key_values=copy.deepcopy(cache))
        cache.batch_repeat_interleave(2)
        model(ids[:, 10:].repeat_interleave(2, 0), past_key_values=cache)
    other = tiny_model("llama", form=form, kernel="quadratic")
    with pytest.raises(ValueError, match="a model with linattn option kernel='linear' has seen, and this one has 'quadratic'; give each"):
        other(ids[:, 10:].repeat_interleave(2, 0), past_key_values=cache)


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"window": 3, "sinks": 4}], ids=str)
@pytest.mark.parametrize("first", ["eager", "compiled"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_compiled_step_refuses_what_was_seen_under_other_options(kind, first, change):
    """It went on from a state of the old ones, and read a ring of five tokens behind two as one of three behind four."""
    torch._dynamo.reset()
    model, ids = tiny_model("llama", layers=1, form="window", window=5, sinks=2), tiny_tokens()
    compiled = torch.compile(model, backend="eager")
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        (compiled if first == "compiled" else model)(ids[:, :10], past_key_values=cache)
        compiled(ids[:, 10:11], past_key_values=cache)
        name, was = next(iter(change)), LinAttnConfig.of(model.config).to_dict()
        model.config.linattn = model.config.linattn | change
        with pytest.raises(
            ValueError, match=f"with linattn option {name}={was[name]} has seen, and this one has {change[name]}; give each"
        ):
            compiled(ids[:, 11:12], past_key_values=cache)


def test_a_state_of_another_window_is_refused():
    """Six tokens behind one sink lie as five behind two."""
    one, other = tiny_model("llama", form="window", window=6, sinks=1), tiny_model("llama", form="window", window=5, sinks=2)
    cache, ids = DynamicCache(config=other.config), tiny_tokens()
    one(ids[:, :10], past_key_values=cache)
    with pytest.raises(ValueError, match="a model with linattn option window=6 has seen, and this one has 5"):
        other(ids[:, 10:], past_key_values=cache)
