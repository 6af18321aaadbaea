"""What is kept of a layer's numbers from token to token: made once, and made anew as soon as somebody writes a parameter."""

import copy

import pytest
import torch
from tiny_models import tiny_config, tiny_tokens
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_linattn.forms.kept import Kept, once
from hf_linattn.forms.parameters import LinAttnParams
from hf_linattn.models import config_class_for

STUDENTS = [
    {"decay": "head"}, {"kernel": "quadratic", "decay": "key_head", "features": 8}, {"decay": "token", "input_gate": "token"},
    {"form": "window", "window": 4, "gate": "head", "decay": "head"}, {"feature_map": "hedgehog"},
    {"output_map": "norm"}, {"output_map": "norm_gate", "decay": "head"},
    {"form": "window", "window": 4, "kernel": "quadratic", "gate": "token", "features": 8},
]  # fmt: skip


def converted(options):
    torch.manual_seed(0)
    config = config_class_for("llama")(**tiny_config("llama", 1).to_diff_dict(), linattn={"learnable": True, **options})
    return AutoModelForCausalLM.from_config(config).eval()


def logits(model, cache, tokens):
    with torch.no_grad():
        return torch.stack([model(token, past_key_values=cache).logits[:, -1] for token in tokens])


WRITES = {
    "in place": lambda parameter: parameter.add_(0.3),
    "exchanged": lambda parameter: setattr(parameter, "data", parameter + 0.3),
    "exchanged twice": lambda parameter: [setattr(parameter, "data", parameter + 0.3) for _ in range(2)],
    "an optimizer": lambda parameter: torch.optim.SGD([parameter], lr=0.3).step() or parameter.sub_(0.1),
    "a fused optimizer": lambda parameter: fused_step(parameter),
}


def fused_step(parameter):
    """By a kernel that writes a parameter and does not count its version up."""
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.3, fused=True).step()
    parameter.grad = None


@pytest.mark.parametrize("options", STUDENTS, ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_a_written_parameter_is_seen_by_the_next_token(options, write):
    model, tokens = converted(options), list(tiny_tokens(1, 12)[0].split(1))
    prompt, before, after = torch.stack(tokens[:6]).T, [x[None] for x in tokens[6:9]], [x[None] for x in tokens[9:]]
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        logits(model, cache, [prompt, *before])
    parameters = list(model.model.layers[0].self_attn.linattn.parameters())
    with torch.no_grad():
        for parameter in parameters:
            WRITES[write](parameter)
    caches[1].layers[0]._kept.forget()
    assert torch.equal(logits(model, caches[0], after), logits(model, caches[1], after))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_numbers_are_made_once_a_text(kind, monkeypatch):
    model, made, learned = converted(STUDENTS[0]), [], LinAttnParams.learned
    monkeypatch.setattr(LinAttnParams, "learned", lambda self, dtype: made.append(self.names) or learned(self, dtype))
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    logits(model, cache, list(tiny_tokens(1, 26).split([17, 1, 1, 5, 1, 1], 1)))
    assert made == [["temperature_logit", "log_rate"]] * 2  # for the prompt, and for all tokens behind it


def test_a_captured_graph_makes_its_numbers_itself(monkeypatch):
    """Else a replay would read what they were, in memory that a reset gives back."""
    model, (prompt, *tokens) = converted(STUDENTS[0]), tiny_tokens(1, 20).split([17, 1, 1, 1], 1)
    cache, made, learned = DynamicCache(config=model.config), [], LinAttnParams.learned
    monkeypatch.setattr(LinAttnParams, "learned", lambda self, dtype: made.append(self.names) or learned(self, dtype))
    logits(model, cache, [prompt, tokens[0]])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cache.layers[0].device = torch.device("cuda")  # as a layer of a GPU asks
    logits(model, cache, tokens[1:])
    assert len(made) == 4


@pytest.mark.parametrize("normalize_qk", [True, False])
def test_another_scaling_is_seen_by_the_next_token(normalize_qk):
    options = {"form": "window", "window": 4, "kernel": "quadratic", "normalize_qk": normalize_qk}
    model, (prompt, *tokens) = converted(options), tiny_tokens(1, 9).split([6, 1, 1, 1], 1)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        logits(model, cache, [prompt, tokens[0]])
    model.model.layers[0].self_attn.scaling *= 2
    caches[1].layers[0]._kept.forget()
    assert torch.equal(*(logits(model, cache, tokens[1:]) for cache in caches))


@pytest.mark.parametrize("ends", ["a reset", "many tokens"])
def test_what_is_written_uncounted_is_seen_at_the_latest_by_the_next_text(ends):
    model, (prompt, *tokens) = converted(STUDENTS[0]), tiny_tokens(1, 24).split([4, 1, 1, 17, 1], 1)
    caches = [StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
    for cache in caches:
        logits(model, cache, [prompt, *tokens[:2]])
    model.model.layers[0].self_attn.linattn.log_rate.data.fill_(-0.2)
    caches[1].layers[0]._kept.forget()
    if ends == "a reset":
        for cache in caches:
            cache.reset()
    rest = tokens[:1] if ends == "a reset" else tokens[2:]
    assert torch.equal(logits(model, caches[0], rest), logits(model, caches[1], rest))


def test_nothing_is_kept_where_a_gradient_is_recorded_or_writes_are_not_counted():
    kept, parameter = Kept(), torch.nn.Parameter(torch.ones(2))
    assert kept.of((parameter,)) is None
    with torch.no_grad():
        assert kept.of((parameter,)) is not None
        assert kept.of((torch.ones(2).as_subclass(type("Other", (torch.Tensor,), {})),)) is None
    with torch.inference_mode():
        assert kept.of((torch.ones(2),)) is None


@pytest.mark.parametrize("options", STUDENTS, ids=str)
def test_nothing_is_kept_of_parameters_that_others_have_a_say_in(options):
    model, (prompt, *tokens) = converted(options), tiny_tokens(1, 8).split([4, 1, 1, 1, 1], 1)
    layer, factor = model.model.layers[0].self_attn.linattn, 1.0
    hook = layer.register_forward_hook(lambda *given: {name: number * factor for name, number in given[2].items()})
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        logits(model, cache, [prompt, *tokens[:2]])
    factor = 0.9
    caches[1].layers[0]._kept.forget()
    assert torch.equal(*(logits(model, cache, tokens[2:3]) for cache in caches))
    hook.remove()
    for name, _ in list(layer.named_parameters()):
        parametrize.register_parametrization(layer, name, torch.nn.Tanh())
    for cache in caches:
        logits(model, cache, tokens[2:3])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3)
    caches[1].layers[0]._kept.forget()
    assert torch.equal(*(logits(model, cache, tokens[3:]) for cache in caches))


@pytest.mark.parametrize("options", STUDENTS, ids=str)
def test_a_gradient_behind_tokens_of_inference_mode(options):
    """What was kept inside it could not be saved for the backward pass of a model without gradients of its own."""
    model, (prompt, *tokens) = converted(options).requires_grad_(False), tiny_tokens(1, 7).split([4, 1, 1, 1], 1)
    gradients = []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = DynamicCache(config=model.config)
        with mode():
            for token in (prompt, *tokens[:2]):
                model(token, past_key_values=cache)
        embedded = model.get_input_embeddings()(tokens[2]).requires_grad_()
        model(inputs_embeds=embedded, past_key_values=cache).logits.square().sum().backward()
        gradients.append(embedded.grad)
    assert torch.equal(*gradients)


def test_memory_of_an_exchanged_parameter_is_not_given_to_the_next():
    kept, parameter = Kept(), torch.nn.Parameter(torch.ones(2))
    first = StorageWeakRef(parameter.untyped_storage())
    with torch.no_grad():
        kept.of((parameter,))
        parameter.data = torch.ones(2)
        assert not first.expired()
        kept.of((parameter,))
    assert first.expired()


def test_a_copy_of_a_cache_copies_no_parameters():
    kept = Kept()
    with torch.no_grad():
        once(kept.of((torch.ones(2),)), "sum", lambda: 2)
    assert kept._tensors and not copy.deepcopy(kept)._tensors
