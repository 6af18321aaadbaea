"""The encoder: one set of weights under three kinds of attention, padding that changes nothing, towers, pooling, saving and loading."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import hf_linattn
from recipes.lra.model import NORMS, POOLINGS, LRAConfig, LRAForSequenceClassification, LRAModel

ATTENTIONS = ("eager", "sdpa", "linattn")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 40, "num_labels": 3, "vocab_size": 30}


def model_of(attention: str = "sdpa", **changed) -> LRAForSequenceClassification:
    torch.manual_seed(0)
    model = LRAForSequenceClassification._from_config(LRAConfig(**{**SIZES, **changed}), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def batch(towers: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(32) < torch.tensor([[32], [20], [1]])
    ids = torch.randint(1, 30, (3, 32)) * mask
    pair = {"pair_ids": ids.flip(0), "pair_mask": mask.flip(0)} if towers == 2 else {}
    return {"input_ids": ids, "attention_mask": mask, **pair}


@pytest.mark.parametrize(("pooling", "norm", "towers"), list(itertools.product(POOLINGS, NORMS, (1, 2))))
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_padded_sequence_gives_what_it_gives_alone(attention, pooling, norm, towers):
    model = model_of(attention, pooling=pooling, norm=norm, towers=towers)
    whole = batch(towers)
    together = model(**whole).logits
    alone = {"input_ids": whole["input_ids"][1:2, :20]}
    if towers == 2:
        alone["pair_ids"] = whole["pair_ids"][1:2, :20]
    torch.testing.assert_close(model(**alone).logits, together[1:2], atol=1e-5, rtol=1e-5)
    changed = {**whole, "input_ids": torch.where(whole["attention_mask"], whole["input_ids"], 7)}
    torch.testing.assert_close(model(**changed).logits, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("towers", (1, 2))
def test_eager_and_sdpa_agree_and_linattn_differs(towers):
    model = model_of("eager", towers=towers)
    eager = model(**batch(towers)).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(**batch(towers)).logits, eager, atol=1e-5, rtol=1e-5)
    model.set_attn_implementation("linattn")
    assert (model(**batch(towers)).logits - eager).abs().max() > 1e-3


def test_linattn_is_the_projects_operator():
    model = model_of("linattn", pooling="mean")
    layer = model.encoder.layers[0].attention
    hidden = torch.randn(2, 9, 16)
    query, key, value = (p(hidden).view(2, 9, 2, 8).transpose(1, 2) for p in (layer.query, layer.key, layer.value))
    out = hf_linattn.linear_attention(query, key, value, causal=False)
    torch.testing.assert_close(layer(hidden, None), layer.out(out.transpose(1, 2).flatten(2)))


def test_pooling_by_its_definition():
    whole = batch()
    count = whole["attention_mask"].sum(1, keepdim=True)
    for pooling in POOLINGS:
        output = model_of(pooling=pooling).encoder(**whole)
        states = output.last_hidden_state
        if pooling == "cls":
            assert states.shape[1] == 33
            expected = states[:, 0]
        else:
            total = (states * whole["attention_mask"][:, :, None]).sum(1)
            expected = total / (count if pooling == "mean" else 40)
        torch.testing.assert_close(output.pooler_output, expected)


def test_states_are_pooled_in_float32():
    """In bfloat16 a sum of ones would stop at 256."""
    encoder, states = model_of(max_position_embeddings=2000).encoder, torch.rand(2, 2000, 16).bfloat16()
    for mask in (None, torch.arange(2000) < torch.tensor([[2000], [700]])):
        expected = [x[keep].double().mean(0) for x, keep in zip(states, [slice(2000)] * 2 if mask is None else mask, strict=True)]
        torch.testing.assert_close(encoder.pool(states, mask).double(), torch.stack(expected), rtol=4e-3, atol=0)


def test_two_towers_share_the_encoder_and_see_both_sequences():
    model = model_of(towers=2)
    whole = batch(2)
    a = model.encoder(whole["input_ids"], whole["attention_mask"]).pooler_output
    b = model.encoder(whole["pair_ids"], whole["pair_mask"]).pooler_output
    torch.testing.assert_close(model(**whole).logits, model.classifier(torch.cat([a, b, a * b, a - b], -1)))
    with pytest.raises(ValueError, match="2 tower"):
        model(whole["input_ids"])
    with pytest.raises(ValueError, match="1 tower"):
        model_of()(**whole)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_saved_and_loaded_by_the_auto_classes(tmp_path, attention):
    model = model_of(attention, pooling="cls", towers=2, attention_size=8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert type(loaded) is LRAForSequenceClassification and isinstance(AutoConfig.from_pretrained(tmp_path), LRAConfig)
    assert loaded.config.num_labels == 3 and loaded.config.attention_size == 8 and loaded.config.pooling == "cls"
    torch.testing.assert_close(loaded(**batch(2)).logits, model(**batch(2)).logits, rtol=0, atol=0)
    assert type(AutoModel.from_pretrained(tmp_path)) is LRAModel


def test_fresh_weights_are_as_large_as_stated():
    model = LRAForSequenceClassification(LRAConfig(num_labels=2))
    assert 0.019 < model.encoder.tokens.weight.std() < 0.021 and 0.019 < model.encoder.positions.weight.std() < 0.021
    assert abs(model.encoder.layers[1].attention.key.weight.std() - (3 * 64) ** -0.5) < 0.003
    assert (model.encoder.norm.weight == 1).all() and (model.encoder.layers[0].attention.key.bias.abs() <= 1 / 8).all()


def test_each_kind_of_dropout_acts_in_training_alone():
    whole = batch()
    for attention, changed in (("sdpa", {"attention_dropout": 0.5}), ("linattn", {})):
        model = model_of(attention, hidden_dropout=0.0, **changed)
        if attention == "linattn":
            torch.testing.assert_close(model.train()(**whole).logits, model(**whole).logits)
            hf_linattn.set_dropout(model, 0.5)
        still = model.eval()(**whole).logits
        torch.testing.assert_close(model(**whole).logits, still)
        assert (model.train()(**whole).logits - still).abs().max() > 1e-3


def test_gradients_reach_every_parameter():
    model = model_of("linattn", towers=2, pooling="cls", hidden_dropout=0.0).train()
    model(**batch(2), labels=torch.tensor([0, 1, 2])).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # softmax's shift invariance does not hold here, so key biases count too
    assert missing == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"norm": "none"}, "norm is 'none'"),
        ({"towers": 3}, "towers is 3"),
        ({"hidden_size": 15}, "not a multiple"),
    ],
)
def test_a_bad_configuration_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        LRAConfig(**{**SIZES, **changed})


def test_a_sequence_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="41 tokens are given and the model has 40 positions"):
        model_of()(torch.ones(1, 41, dtype=torch.long))
