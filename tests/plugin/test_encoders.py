"""BERT, ModernBERT and ViT: every token sees every other, padding excepted."""

import pytest
import torch
from ten_lines import by_reference
from tiny_models import ENCODERS, tiny_model, tiny_tokens

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


def test_images_train():
    model = tiny_model("vit").train()
    model(torch.randn(2, 3, 16, 16)).last_hidden_state.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    attention = next(m for m in model.modules() if hasattr(m, "is_causal"))
    assert attention.q_proj.weight.grad.abs().max() > 0 if hasattr(attention, "q_proj") else True


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
        model(ids, attention_mask=mask).last_hidden_state[1].square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        close(one, other)
