"""Training forwards, half precision, checkpointing and compilation of a whole model."""

import pytest
import torch
from ten_lines import by_reference
from tiny_models import CAUSAL, tiny_model, tiny_tokens

from hf_linattn import set_dropout


def gradients(model, ids, **kwargs):
    model.zero_grad()
    model(ids, labels=ids, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_training_forward_with_a_cache_backpropagates(name):
    """use_cache is True by default: the state must not be written in place under autograd."""
    model, ids = tiny_model(name), tiny_tokens()
    without, grads = gradients(model, ids, use_cache=False), gradients(model, ids)
    for key, grad in grads.items():
        close(grad, without[key])
    assert any("q_proj" in key or "query" in key or "Wqkv" in key for key in grads)


def test_gradients_stop_at_the_cache():
    model, ids = tiny_model("llama"), tiny_tokens()
    cache = model(ids[:, :12]).past_key_values
    assert not cache.layers[0].state["sums"].requires_grad
    model(ids[:, 12:], past_key_values=cache, labels=ids[:, 12:]).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = tiny_tokens()
    plain = gradients(tiny_model("llama").train(), ids)
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    for key, grad in gradients(model, ids).items():
        close(grad, plain[key])


@pytest.mark.parametrize("options", [{}, {"kernel": "quadratic"}, {"decay": "head"}], ids=str)
def test_gradients_are_those_of_the_reference(options):
    model, ids = tiny_model("llama", **options), tiny_tokens()
    grads = gradients(model, ids, use_cache=False)
    with by_reference(model):
        expected = gradients(model, ids, use_cache=False)
    for key, grad in grads.items():
        close(grad, expected[key])


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_bfloat16_is_as_close_as_bfloat16_can_be(name):
    ids = tiny_tokens()
    with torch.no_grad():
        exact = tiny_model(name)(ids).logits
        linear = (tiny_model(name).to(torch.bfloat16)(ids).logits.float() - exact).abs().max()
        softmax = tiny_model(name, "eager").to(torch.bfloat16)(ids).logits.float() - tiny_model(name, "eager")(ids).logits
    assert linear <= 2 * softmax.abs().max()


def test_autocast():
    model, ids = tiny_model("llama"), tiny_tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, model(ids, labels=ids).loss, atol=0.05, rtol=0)


class TestDropout:
    def outputs(self, model, ids, seed=0):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(ids).logits

    @pytest.mark.parametrize("kind", ["paper", "moment"])
    def test_noise_in_training_only(self, kind):
        model, ids = tiny_model("llama", dropout=0.2, dropout_kind=kind), tiny_tokens()
        quiet = self.outputs(model, ids)
        assert torch.equal(quiet, self.outputs(tiny_model("llama"), ids))
        model.train()
        noisy = self.outputs(model, ids)
        assert not torch.equal(noisy, quiet)
        other = tiny_model("llama", dropout=0.2, dropout_kind="moment" if kind == "paper" else "paper").train()
        assert not torch.equal(noisy, self.outputs(other, ids))
        assert torch.equal(noisy, self.outputs(model, ids)) and not torch.equal(noisy, self.outputs(model, ids, seed=1))

    @pytest.mark.parametrize("of_model", [0.0, 0.3])
    @pytest.mark.parametrize("of_config", [None, 0.0, 0.2])
    @pytest.mark.parametrize("set_to", [None, 0.0, 0.1])
    def test_whose_probability_wins(self, of_model, of_config, set_to):
        """What `set_dropout` set, else the config's, else the model's; a 0 counts as much as any other."""
        model, ids = tiny_model("llama", layers=1, dropout=of_config).train(), tiny_tokens()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = of_model
        if set_to is not None:
            set_dropout(model, set_to)
        winner = next(p for p in (set_to, of_config, of_model) if p is not None)
        expected = self.outputs(tiny_model("llama", layers=1, dropout=winner).train(winner > 0), ids)
        torch.testing.assert_close(self.outputs(model, ids), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"kernel": "quadratic", "decay": "head"}], ids=str)
def test_the_whole_model_compiles_into_one_graph(options):
    model, ids = tiny_model("llama", layers=1, **options), tiny_tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids, labels=ids, attention_mask=mask).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    for key, grad in gradients(model, ids, attention_mask=mask).items():
        close(grads[key], grad)


def test_packed_sequences_and_caches_compile():
    model, ids = tiny_model("llama", layers=1), tiny_tokens(1)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(ids, position_ids=positions, use_cache=False).logits, model(ids, position_ids=positions).logits)
        full = model(ids).logits
        cache = model(ids[:, :20]).past_key_values
        for i in (20, 21, 22):
            close(compiled(ids[:, i : i + 1], past_key_values=cache).logits, full[:, i : i + 1])
