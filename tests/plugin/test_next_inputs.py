"""What a model is given of a new token without asking Transformers is what Transformers would give it."""

import inspect

import pytest
import torch
from compiling import TOKENS, converted
from generating import generate, left_padded
from tiny_models import tiny_tokens
from transformers import GenerationMixin, Phi3ForCausalLM, StaticCache

from hf_linattn import next_inputs

STATIC = {**TOKENS, "cache_implementation": "static"}


@pytest.fixture
def asked(monkeypatch):
    """What Transformers was asked about."""
    seen, ask = [], GenerationMixin.prepare_inputs_for_generation

    def noted(model, input_ids, **given):
        seen.append(given)
        return ask(model, input_ids, **given)

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", noted)
    return seen


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_transformers_is_asked_at_a_texts_first_tokens(padded, asked):
    model, (ids, mask) = converted(decay="head"), left_padded(tiny_tokens())
    mask = mask if padded else torch.ones_like(mask)
    expected = generate(model, ids, mask, **TOKENS)
    for rows in (2, 1, 2):
        asked.clear()
        assert torch.equal(generate(model, ids[:rows], mask[:rows], **STATIC), expected[:rows])
        assert 2 < len(asked) < 6


def test_a_model_with_layers_of_softmax_is_given_a_mask_of_each_token(asked):
    model, ids = converted(decay="head", softmax_layers=[1]), tiny_tokens()
    assert torch.equal(generate(model, ids, **STATIC), generate(model, ids, **TOKENS))
    assert len(asked) == 32


def inputs(model, ids, cache, mask, **given):
    more = {"position_ids": torch.arange(ids.shape[1])[None], "past_key_values": cache, "attention_mask": mask, "use_cache": True}
    return model.prepare_inputs_for_generation(ids, next_sequence_length=1, **more, **given)


def same(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        assert value is other[name] or value == other[name] if not isinstance(value, torch.Tensor) else torch.equal(value, other[name])


def test_each_token_is_given_what_transformers_would_give_it(asked):
    model = converted(decay="head")
    cache = StaticCache(config=model.config, max_cache_len=40)
    ids, kept = tiny_tokens(2, 20), {"attention_mask": left_padded(tiny_tokens())[1][:, :12]}
    with torch.no_grad():
        model(ids[:, :12], attention_mask=kept["attention_mask"], past_key_values=cache)
        for number in range(13, 21):
            kept = model._update_model_kwargs_for_generation({}, kept)
            more = {"logits_to_keep": 1} if number > 18 else {}
            asked.clear()
            made = inputs(model, ids[:, :number], cache, kept["attention_mask"], **more)
            assert len(asked) == (number < 15 or number > 18)
            there = {"position_ids": torch.arange(number)[None], "past_key_values": cache, "attention_mask": kept["attention_mask"]}
            own = GenerationMixin.prepare_inputs_for_generation
            same(made, own(model, ids[:, :number], next_sequence_length=1, **there, use_cache=True, **more))
            model(**made)


def test_a_padding_mask_that_is_written_into_is_read_anew():
    model, ids = converted(decay="head"), tiny_tokens(2, 20)
    cache, kept = StaticCache(config=model.config, max_cache_len=40), {"attention_mask": torch.ones(2, 12, dtype=torch.long)}
    with torch.no_grad():
        model(ids[:, :12], attention_mask=kept["attention_mask"], past_key_values=cache)
        for number in range(13, 19):
            kept = model._update_model_kwargs_for_generation({}, kept)
            if number == 18:
                kept["attention_mask"][0, -1] = 0
            made = inputs(model, ids[:, :number], cache, kept["attention_mask"])
            model(**made)
    assert made["attention_mask"].shape[-1] > 1


def test_another_option_within_a_text_is_asked_about(asked):
    model, ids = converted(decay="head"), tiny_tokens(1, 20)
    cache, kept = StaticCache(config=model.config, max_cache_len=40), {"attention_mask": torch.ones(1, 12, dtype=torch.long)}
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        for number in range(13, 18):
            kept = model._update_model_kwargs_for_generation({}, kept)
            asked.clear()
            if number == 17:
                model.config.linattn["softmax_layers"] = [1]
            made = inputs(model, ids[:, :number], cache, kept["attention_mask"])
            assert len(asked) == (number < 15 or number == 17)
            if number < 17:
                model(**made)


class Shifted(torch.nn.Embedding):
    """Writes into the tokens that it is given."""

    def forward(self, ids):
        return super().forward(ids.mul_(3).add_(1).remainder_(80))


def _shifts(module, args):
    args[0].mul_(3).add_(1).remainder_(80)


def _doubles(module, args, kwargs):
    kwargs["position_ids"].mul_(2)


def _hooked(model):
    model.model.embed_tokens.register_forward_pre_hook(_shifts)


def _hooked_at_positions(model):
    model.model.rotary_emb.register_forward_pre_hook(_doubles, with_kwargs=True)


def _replaced(model):
    model.model.embed_tokens.__class__ = Shifted


@pytest.mark.parametrize("change", [_hooked, _hooked_at_positions, _replaced])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_written_into_a_tokens_inputs_is_not_written_into_the_text(batch, change, monkeypatch):
    model, (ids, mask) = converted(decay="head"), left_padded(tiny_tokens())
    change(model)
    given = ids[:batch], mask[:batch]
    ours = generate(model, given[0].clone(), given[1], **STATIC)
    monkeypatch.setattr(next_inputs.Before, "fits", lambda *_: False)
    assert torch.equal(generate(model, given[0].clone(), given[1], **STATIC), ours)


def test_arguments_may_all_be_given_by_place():
    model, ids = converted(layers=1, decay="head"), tiny_tokens()
    embeds, own = model.get_input_embeddings()(ids), GenerationMixin.prepare_inputs_for_generation
    for first in (True, False):
        given = ids, None if first else 1, None, torch.ones_like(ids), embeds, first
        same(model.prepare_inputs_for_generation(*given, use_cache=True), own(model, *given, use_cache=True))


def test_generating_from_embeddings_and_beams():
    model, ids = converted(decay="head"), tiny_tokens()
    own, plain = (inspect.signature(owner.prepare_inputs_for_generation).parameters for owner in (type(model), GenerationMixin))
    assert list(own) == list(plain)
    embeds = model.get_input_embeddings()(ids).detach()
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    got, expected = (model.generate(inputs_embeds=embeds, **options, **more) for more in (STATIC, TOKENS))
    assert torch.equal(got, expected)
    assert torch.equal(generate(model, ids, **STATIC, num_beams=3), generate(model, ids, **TOKENS, num_beams=3))


def test_an_architecture_with_a_way_of_its_own_keeps_it():
    from hf_linattn.models import config_class_for, model_class_for

    own = model_class_for(config_class_for("phi3")).prepare_inputs_for_generation
    assert own is Phi3ForCausalLM.prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    model = converted(layers=1)
    assert type(model).prepare_inputs_for_generation is next_inputs.prepare_inputs_for_generation
    assert not hasattr(model_class_for(type(model.config), "LlamaModel"), "prepare_inputs_for_generation")
    assert not model_class_for(type(model.config), "LlamaForSequenceClassification").can_generate()
