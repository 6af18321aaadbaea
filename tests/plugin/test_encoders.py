"""BERT, ModernBERT and ViT: every token sees every other, padding excepted."""

import pytest
import torch
from ten_lines import by_reference
from tiny_models import ENCODERS, tiny_model, tiny_tokens
from transformers import Siglip2VisionConfig, Siglip2VisionModel

TEXT = ["bert", "modernbert"]
OPTIONS = [{}, {"kernel": "quadratic"}, {"decay": "head"}]


def hidden(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).last_hidden_state


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", TEXT)
def test_padding_on_either_side(name, options):
    model, ids = tiny_model(name, **options), tiny_tokens(2, 9)
    right = torch.ones_like(ids)
    right[0, 6:] = 0
    close(hidden(model, ids, attention_mask=right)[0, :6], hidden(model, ids[:1, :6])[0])
    close(hidden(model, ids, attention_mask=right)[1], hidden(model, ids[1:])[0])
    left = torch.ones_like(ids)
    left[0, :3] = 0
    positions = (left.cumsum(-1) - 1).clamp(min=0)
    close(hidden(model, ids, attention_mask=left, position_ids=positions)[0, 3:], hidden(model, ids[:1, 3:])[0])


@pytest.mark.parametrize("name", TEXT)
def test_padding_that_is_not_told_is_seen(name):
    model, ids = tiny_model(name), tiny_tokens(2, 9)
    assert (hidden(model, ids)[0, :6] - hidden(model, ids[:1, :6])[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", TEXT)
def test_every_token_sees_the_last(name):
    model, ids = tiny_model(name), tiny_tokens(1, 9)
    other = ids.clone()
    other[0, -1] += 1
    assert (hidden(model, ids) - hidden(model, other)).abs().amax(-1).min() > 1e-5


@pytest.mark.parametrize("name", ENCODERS)
def test_the_model_computes_the_ten_lines_of_the_reference(name):
    inputs = torch.randn(2, 3, 16, 16) if name == "vit" else tiny_tokens()
    model = tiny_model(name)
    linear = hidden(model, inputs)
    with by_reference(model):
        close(linear, hidden(model, inputs))
    assert (linear - hidden(tiny_model(name, "sdpa"), inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("name", TEXT)
def test_chosen_layers_stay_softmax(name):
    ids = tiny_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    model = tiny_model(name, softmax_layers=[1])
    close(hidden(model, ids, attention_mask=mask)[0, :6], hidden(model, ids[:1, :6])[0])
    all_softmax = tiny_model(name, softmax_layers=[0, 1, 2])
    close(hidden(all_softmax, ids, attention_mask=mask)[0, :6], hidden(tiny_model(name, "sdpa"), ids, attention_mask=mask)[0, :6])


def gradients(model, inputs, **kwargs):
    """Of a random projection: a sum of squares behind a layer norm is a constant, whose gradients all zeros would pass for."""
    model.zero_grad()
    out = model(inputs, **kwargs).last_hidden_state
    if "attention_mask" in kwargs:
        out = out[kwargs["attention_mask"] > 0]
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def close_and_not_zero(grads, expected):
    assert grads.keys() == expected.keys() and len(grads) > 15
    for name, grad in grads.items():
        size = expected[name].abs().max().item()
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=2e-5 * size, msg=lambda text, name=name: f"{name}: {text}")
        assert size > 1e-2, name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_are_those_of_the_reference(name, options):
    inputs = torch.randn(2, 3, 16, 16) if name == "vit" else tiny_tokens(2, 9)
    model = tiny_model(name, **options)
    grads = gradients(model, inputs)
    with by_reference(model):
        close_and_not_zero(grads, gradients(model, inputs))


@pytest.mark.parametrize("name", TEXT)
def test_training_and_checkpointing_give_the_same_gradients(name):
    ids, grads = tiny_tokens(2, 9), []
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    for checkpointing in (False, True):
        model = tiny_model(name)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "is_causal"):
                    module.linattn_dropout_p = 0.0
        grads.append(gradients(model, ids, attention_mask=mask))
    close_and_not_zero(*grads)


@torch.no_grad()
@pytest.mark.parametrize("rows", [5, 2, 1])
def test_a_pooling_head_that_computes_its_own_softmax_gets_its_mask(rows):
    """Siglip2's probe attends past the interface, from one token to all patches: padding is hidden from it too."""
    torch.manual_seed(0)
    config = Siglip2VisionConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, patch_size=4)
    model, patches = Siglip2VisionModel._from_config(config, attn_implementation="linattn").eval(), torch.randn(2, 36, 48)
    shapes = torch.tensor([[rows, 6], [6, 6]])
    mask = torch.arange(36) < shapes.prod(-1)[:, None]
    both = model(patches, pixel_attention_mask=mask.long(), spatial_shapes=shapes).pooler_output
    alone = model(patches[:1, : 6 * rows], pixel_attention_mask=mask[:1, : 6 * rows].long(), spatial_shapes=shapes[:1]).pooler_output
    other = model(patches.roll(1, 0), pixel_attention_mask=mask.long(), spatial_shapes=shapes).pooler_output
    close(both[:1], alone)
    assert (both - other).abs().max() > 1e-2
