"""LinAttnConfig: what it accepts, how it travels, and what bad options are told."""

import json
from types import SimpleNamespace

import pytest
import torch
from learned import learned_model
from tiny_models import ENCODERS, tiny_config, tiny_model, tiny_tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from hf_linattn import LinAttnConfig
from hf_linattn.config import sizes_of, sliding_windows, softmax_layers
from hf_linattn.forms import Sizes


def test_defaults_are_the_linear_kernel():
    options = LinAttnConfig()
    assert (options.kernel, options.a, options.b, options.c, options.temperature) == ("linear", 1.0, 1.0, 0.0, 1.0)
    assert LinAttnConfig(kernel="quadratic").c == 0.5


def test_options_survive_save_and_load(tmp_path):
    options = LinAttnConfig(kernel="quadratic", b=0.5, decay="head", softmax_layers=[1], dropout=0.1)
    model = tiny_model("llama", **options.to_dict())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["linattn"] == options.to_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="linattn").eval()
    assert LinAttnConfig.of(loaded.config) == options
    ids = tiny_tokens()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["llama", *ENCODERS])
def test_a_softmax_checkpoint_loads_as_linear(name, tmp_path):
    tiny_model(name, "sdpa").save_pretrained(tmp_path)
    auto = AutoModel if name in ENCODERS else AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path, attn_implementation="linattn").eval()
    inputs = torch.randn(2, 3, 16, 16) if name == "vit" else tiny_tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs)[0], tiny_model(name)(inputs)[0])


def test_the_implementation_can_be_switched_on_a_living_model():
    model, ids = tiny_model("llama", "sdpa"), tiny_tokens()
    with torch.no_grad():
        softmax = model(ids).logits
        model.set_attn_implementation("linattn")
        torch.testing.assert_close(model(ids).logits, tiny_model("llama")(ids).logits)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(ids).logits, softmax)


def test_options_changed_on_a_living_model_are_used():
    model, ids = tiny_model("llama"), tiny_tokens()
    with torch.no_grad():
        before = model(ids).logits
        model.config.linattn = {"kernel": "quadratic"}
        after = model(ids).logits
        model.config.linattn["softmax_layers"] = [0]
        hybrid = model(ids).logits
        torch.testing.assert_close(after, tiny_model("llama", kernel="quadratic")(ids).logits)
    assert (before - after).abs().max() > 1e-3 and (after - hybrid).abs().max() > 1e-3


def test_store_reaches_the_text_config():
    config = Gemma3Config()
    LinAttnConfig(kernel="quadratic").store(config)
    assert LinAttnConfig.of(config) == LinAttnConfig.of(config.get_text_config()) == LinAttnConfig(kernel="quadratic")


def test_options_of_a_text_config_are_found_from_the_whole():
    config = Gemma3Config()
    config.get_text_config().linattn = {"decay": "head"}
    assert LinAttnConfig.of(config).decay == "head"


BAD_VALUES = [
    ({"kernal": "linear"}, "unknown option 'kernal'; the options are kernel, a, b"),
    ({"kernel": "cubic"}, "kernel='cubic' is unknown; give one of 'linear', 'quadratic'"),
    ({"decay": "layer"}, "decay='layer' is unknown"),
    ({"form": "cubic"}, "form='cubic' is unknown; give one of 'polynomial'"),
    ({"dropout_kind": "usual"}, "dropout_kind='usual' is unknown"),
    ({"a": 0.0}, "above 0, not a=0.0"),
    ({"temperature": -1.0}, "above 0"),
    ({"a": float("nan")}, "a must be finite"),
    ({"temperature": float("inf")}, "temperature must be finite"),
    ({"b": 1.00001}, "a >= |b| * temperature"),
    ({"b": -1.00001}, "a >= |b| * temperature"),
    ({"temperature": 1.00001}, "a >= |b| * temperature"),
    ({"c": 0.5}, 'needs kernel="quadratic"'),
    ({"kernel": "quadratic", "c": 0.24999}, "b^2 <= 4 a c"),
    ({"kernel": "quadratic", "b": -1.41422}, "b^2 <= 4 a c"),
    ({"kernel": "quadratic", "c": 0.0}, "c > 0"),
    ({"dropout": 1.0}, "dropout must be in [0, 1)"),
    ({"dropout": -0.00001}, "dropout must be in [0, 1)"),
    ({"softmax_layers": [-1]}, "count layers from 0"),
]
BAD_TYPES = [
    ({"a": "1"}, "a must be a number, not '1'"),
    ({"b": None}, "b must be a number"),
    ({"dropout": True}, "dropout must be a number"),
    ({"normalize_qk": 1}, "normalize_qk must be true or false"),
    ({"learnable": "yes"}, "learnable must be true or false"),
    ({"softmax_layers": "0,1"}, "must be a list of layer indices"),
    ({"softmax_layers": [0.5]}, "must be a list of layer indices"),
    ({"softmax_layers": [True]}, "must be a list of layer indices"),
    ([("kernel", "linear")], "must be a dict of options"),
    (LinAttnConfig(), "must be a dict of options"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD_VALUES, ids=str)
def test_bad_values_are_named(options, sentence):
    check_refusal(options, sentence, ValueError)


@pytest.mark.parametrize(("options", "sentence"), BAD_TYPES, ids=str)
def test_bad_types_are_named(options, sentence):
    check_refusal(options, sentence, TypeError)


def check_refusal(options, sentence, error):
    config = tiny_config("llama")
    config.linattn = options
    with pytest.raises(error) as caught:
        LinAttnConfig.of(config)
    assert sentence in str(caught.value) and str(caught.value).count("\n") == 0
    with pytest.raises(error):  # where the implementation is chosen
        AutoModelForCausalLM.from_config(config, attn_implementation="linattn")
    model = tiny_model("llama", layers=1)
    model.config.linattn = options
    with pytest.raises(error):
        model(tiny_tokens())


@pytest.mark.parametrize("options", [
    {"b": 1.0}, {"b": -1.0}, {"a": 2.0, "temperature": 2.0}, {"kernel": "quadratic", "c": 0.25},
    {"kernel": "quadratic", "b": -2.0, "c": 1.0, "temperature": 5.0}, {"normalize_qk": False, "b": 5.0}, {"dropout": 0.0},
    {"dropout": 0.99999},
], ids=str)  # fmt: skip
def test_a_bound_itself_is_allowed_and_without_unit_length_there_is_none(options):
    assert options.items() <= LinAttnConfig(**options).to_dict().items()


@pytest.mark.parametrize(("given", "sizes"), [
    ({}, (4, 4, 16, 16, 64)), ({"head_dim": 8}, (4, 4, 8, 8, 64)), ({"head_dim": None, "num_key_value_heads": None}, (4, 4, 16, 16, 64)),
    ({"num_key_value_heads": 2}, (4, 2, 16, 16, 64)), ({"num_key_value_heads": 1, "head_dim": 32}, (4, 1, 32, 32, 64)),
], ids=str)  # fmt: skip
def test_sizes_of_a_config_that_may_leave_them_unsaid(given, sizes):
    config = SimpleNamespace(num_attention_heads=4, hidden_size=64, **given)
    assert sizes_of(config) == Sizes(*sizes, 512.0) and sizes_of(config, 7.0, 48) == Sizes(*sizes[:4], 48, 7.0)


@pytest.mark.parametrize("chosen", ["linattn", {"text_config": "linattn"}], ids=str)
def test_options_of_a_model_of_parts_reach_its_text_layers(chosen):
    """They were passed over where they stood on the whole alone."""
    sees = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}

    def logits(*places):
        config = Gemma3Config(text_config=tiny_config("gemma3").to_dict(), vision_config=sees)
        for place in places:
            (config if place == "whole" else config.text_config).linattn = {"decay": "head"}
        torch.manual_seed(0)
        with torch.no_grad():
            return Gemma3ForConditionalGeneration._from_config(config, attn_implementation=chosen).eval()(tiny_tokens()).logits

    expected = logits("text")
    assert torch.equal(logits("whole"), expected) and torch.equal(logits("whole", "text"), expected)
    assert not torch.equal(logits(), expected)
    config = Gemma3Config(text_config=tiny_config("gemma3", decay="head").to_dict(), vision_config=sees)
    config.linattn = {"decay": "key_head"}
    with pytest.raises(ValueError, match="that of its text part, by which layers go, .*set both by LinAttnConfig"):
        Gemma3ForConditionalGeneration._from_config(config, attn_implementation=chosen)


WINDOWS = {"sliding_window": 8, "attention_chunk_size": 16}
KINDS = ["full_attention", "sliding_attention", "chunked_attention"]


@pytest.mark.parametrize(("given", "windows"), [
    ({}, [None] * 3), ({"sliding_window": 8}, [8] * 3), ({"sliding_window": None, "layer_types": None}, [None] * 3),
    ({**WINDOWS, "layer_types": KINDS}, [None, 8, 16]), ({"layer_types": KINDS}, [None] * 3),
    ({"sliding_window": 0, "layer_types": ["full_attention"] * 3}, [None] * 3), ({"sliding_window": 1}, [1] * 3),
], ids=str)  # fmt: skip
def test_windows_of_a_config_that_may_leave_them_unsaid(given, windows):
    assert sliding_windows(SimpleNamespace(num_hidden_layers=3, **given)) == windows


@pytest.mark.parametrize(("given", "sentence"), [
    ({"sliding_window": 0}, "sliding_window must be a whole number above 0, not 0"), ({"sliding_window": True}, "not True"),
    ({"sliding_window": 8.0}, "not 8.0"), ({"attention_chunk_size": -1, "layer_types": KINDS}, "attention_chunk_size must be"),
    ({"layer_types": KINDS[:2]}, "one word for each of 3 layers"), ({"layer_types": [*KINDS[:2], 3]}, "one word"),
    ({"layer_types": "abc"}, "one word"),
], ids=str)  # fmt: skip
def test_windows_that_are_none_are_named(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        sliding_windows(SimpleNamespace(num_hidden_layers=3, **given))


def test_layers_that_keep_softmax_are_those_that_there_are():
    config = tiny_config("llama", softmax_layers=[0, 2])
    assert softmax_layers(config) == {0, 2} and softmax_layers(tiny_config("llama")) == set()
    config.linattn["softmax_layers"] = [3]
    with pytest.raises(ValueError, match="names layer 3, but the model has layers 0 to 2"):
        softmax_layers(config)


def test_a_config_without_options_has_the_defaults():
    assert LinAttnConfig.of(AutoConfig.for_model("llama")) == LinAttnConfig()


OF_A_WINDOW = ("window", "sinks", "beside", "gate")


@pytest.mark.parametrize("change", [
    {"decay": "none"}, {"decay": "head"}, {"features": 3}, {"input_gate": "none"}, {"output_map": "norm"}, {"temperature": 0.5},
    {"gate": "head"}, {"normalize_qk": False}, {"kernel": "quadratic", "c": 0.5}, {"form": "polynomial"},
    {"learnable": False},
], ids=str)  # fmt: skip
def test_what_a_converted_model_has_learned_is_not_read_as_of_other_options(change):
    model = learned_model(form="window", window=5, sinks=2, gate="token", decay="token", input_gate="token")
    ids, stored = tiny_tokens(), dict(model.config.linattn)
    with torch.no_grad():
        expected = model(ids).logits
        model.config.linattn |= change
        name = next(iter(change))
        if name == "form":
            model.config.linattn = {name: value for name, value in model.config.linattn.items() if name not in OF_A_WINDOW}
        with pytest.raises(ValueError, match=f"says {name}=.*, and the numbers that LlamaAttention has learned are of {name}="):
            model(ids)
        model.config.linattn = stored | {"window": 3, "sinks": 1, "dropout": 0.5}
        assert not torch.equal(model(ids).logits, expected)
        model.config.linattn = stored
        assert torch.equal(model(ids).logits, expected)


def test_a_polynomial_that_was_learned_has_no_gate_beside_a_window():
    """It ran, with a gate that nobody had learned."""
    model = learned_model(decay="head")
    model.config.linattn |= {"form": "window", "window": 5, "sinks": 2}
    with pytest.raises(ValueError, match="says form='window', and the numbers that LlamaAttention has learned are of form='polynomial'"):
        model(tiny_tokens())


@pytest.mark.parametrize(
    "change", [{"decay": "key_head"}, {"temperature": 0.5}, {"form": "window", "window": 5}, {"output_map": "gate"}, {"learnable": False}]
)
def test_a_model_that_is_compiled_from_its_first_call_hears_of_other_options(change):
    """The graph that was made after the change ran on with what was learned under others."""
    torch._dynamo.reset()
    model = learned_model(decay="head")
    compiled, ids, stored, name = torch.compile(model, backend="eager"), tiny_tokens(), dict(model.config.linattn), next(iter(change))
    with torch.no_grad():
        expected = compiled(ids).logits
        model.config.linattn |= change
        with pytest.raises(ValueError, match=f"says {name}=.*, and the numbers that LlamaAttention has learned are of {name}="):
            compiled(ids)
        model.config.linattn = stored
        assert torch.equal(compiled(ids).logits, expected)


def test_options_of_a_compiled_model_break_no_graph_and_make_no_second():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model, ids = learned_model(form="window", window=5, sinks=2, gate="token", decay="head"), tiny_tokens()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            compiled(ids)
        assert len(graphs) == 1
        model.config.linattn |= {"window": 3}
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    assert len(graphs) == 2
