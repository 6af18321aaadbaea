"""Matrices that meet the same vectors are one behind the other, are multiplied by at once, and are parameters as they were."""

import copy
import gc
import os
import threading
import weakref

import pytest
import torch
from compiling import CHANGES, TOKENS, WINDOW, converted, generate_compiled
from generating import generate
from safetensors.torch import load_file, save_file, save_model
from tiny_models import tiny_tokens
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.generation import BaseStreamer

from hf_linattn import captured, joined

SCORES = {"return_dict_in_generate": True, "output_scores": True}


@pytest.fixture
def products(monkeypatch):
    """The products of the graphs that were compiled, as on a GPU: how many, after and before."""
    torch._dynamo.reset()
    counts, join = [], joined.join

    def count(graph):
        return len(graph.graph.find_nodes(op="call_function", target=torch._C._nn.linear))

    def counted(graph, *given):
        one = join(graph, *given)
        counts.append((count(graph if one is None else one.graph), count(graph)))
        return one

    def compile_graph(*given):
        return captured.Captured(captured.improved(*given))

    monkeypatch.setattr(joined, "DEVICES", ("cpu",))
    monkeypatch.setattr(joined, "join", counted)
    monkeypatch.setattr(captured, "the_gpu", lambda now: None)
    monkeypatch.setattr(captured, "compile_graph", compile_graph)
    return counts


def layer_of(model):
    return model.model.layers[0]


def lie_together(*modules):
    return all(a.weight.data_ptr() + a.weight.nbytes == b.weight.data_ptr() for a, b in zip(modules, modules[1:], strict=False))


@pytest.mark.parametrize("options", [{"decay": "head"}, {"kernel": "quadratic"}, {**WINDOW, "softmax_layers": [1]}], ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_same_tokens_by_fewer_products(options, backend, products):
    model = converted(**options)
    for batch in (2, 1):
        ids = tiny_tokens(batch)
        expected = generate(model, ids, **TOKENS, **SCORES)
        out = generate_compiled(model, ids, **SCORES)
        assert torch.equal(out.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores))
    assert [before - after for after, before in products] == [2 * 3, 2 * 2]  # of one sequence gate and up projection are apart
    attention, mlp = layer_of(model).self_attn, layer_of(model).mlp
    assert lie_together(attention.q_proj, attention.k_proj, attention.v_proj) and lie_together(mlp.gate_proj, mlp.up_proj)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gpt_neox", "phi", "olmo2", "cohere"])
def test_other_models(name, products):
    model = converted(name, decay="head")
    ids = tiny_tokens()
    expected = generate(model, ids, **TOKENS, **SCORES)
    out = generate_compiled(model, ids, **SCORES)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores))
    assert products


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_between_two_texts_is_seen_by_the_second(change, products):
    model, ids = converted(decay="head"), tiny_tokens()
    generate_compiled(model, ids)
    CHANGES[change](model)
    out, expected = generate_compiled(model, ids, **SCORES), generate(model, ids, **TOKENS, **SCORES)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores))


@pytest.mark.parametrize("how", ["in place", "other data", "another parameter", "all others"])
def test_weights_that_are_changed_or_put_elsewhere_are_read_there_or_moved_again(how, products):
    model, ids = converted(decay="head"), tiny_tokens()
    generate_compiled(model, ids)
    if how == "all others":
        model.double().float()
    for module in (layer_of(model).self_attn.k_proj, layer_of(model).mlp.up_proj):
        if how == "in place":
            module.weight.data.mul_(-1.5)
        elif how == "other data":
            module.weight.data = module.weight.data * -1.5
        else:
            module.weight = nn.Parameter(module.weight.detach() * -1.5)
    out, expected = generate_compiled(model, ids, **SCORES), generate(model, ids, **TOKENS, **SCORES)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores))
    assert lie_together(layer_of(model).mlp.gate_proj, layer_of(model).mlp.up_proj) == (how in ("in place", "all others"))
    assert len(products) == 1


def test_weights_that_are_held_elsewhere_are_read_where_they_are(products):
    model, ids = converted(decay="head"), tiny_tokens()
    generate_compiled(model, ids)
    projection = layer_of(model).mlp.gate_proj
    projection.weight.data = projection.weight.data * -1.5
    held = projection.weight.data
    assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
    assert projection.weight.data_ptr() == held.data_ptr() and len(products) == 1


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "invalidate_compile_context_weakrefs"), reason="torch.compile of 2.11 forbids it")
def test_tensors_may_be_swapped(products):
    model, ids = converted(decay="head"), tiny_tokens()
    cache = generate_compiled(model, ids, return_dict_in_generate=True).past_key_values
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * -0.75))
    out, expected = generate_compiled(model, ids, **SCORES), generate(model, ids, **TOKENS, **SCORES)
    assert torch.equal(out.sequences, expected.sequences) and cache.get_seq_length() > ids.shape[1]
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores))


def test_parameters_are_what_they_were(products, tmp_path):
    model = converted(decay="head")
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path / "before")
    generate_compiled(model, tiny_tokens())
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and parameter.is_leaf and parameter.requires_grad and torch.equal(parameter, before[name][1])
    model.save_pretrained(tmp_path / "after")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    files = [sorted((path.name, os.path.getsize(path)) for path in (tmp_path / when).iterdir()) for when in ("before", "after")]
    assert files[0] == files[1]
    for found in (AutoModelForCausalLM.from_pretrained(tmp_path / "after").state_dict(), torch.load(tmp_path / "state.pt")):
        for name, (_, expected) in before.items():
            assert torch.equal(found[name], expected)
    model(tiny_tokens()).logits.square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    ids = tiny_tokens(seed=1)
    assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))


def test_what_safetensors_writes(products, tmp_path):
    """As docs/faq.md says."""
    model = converted(decay="head")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate_compiled(model, tiny_tokens())
    with pytest.raises(RuntimeError, match="None is covering the entire storage"):
        save_model(model, tmp_path / "refused")
    save_file(model.state_dict(), tmp_path / "file")
    save_model(copy.deepcopy(model), tmp_path / "copy")
    for name in ("file", "copy"):
        found = load_file(tmp_path / name)
        assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("held_as", ["a view of more", "memory of another's", "a state dict", "no parameter"])
def test_what_may_be_known_elsewhere_stays_where_it_is(held_as, products):
    model = converted(layers=1, decay="head")
    projection = layer_of(model).self_attn.k_proj
    held = projection.weight
    if held_as == "a view of more":
        held.data = torch.cat([held.data, held.data])[: len(held)]
    elif held_as == "memory of another's":
        other = nn.Parameter(held.data)  # noqa: F841
    elif held_as == "a state dict":
        state = model.state_dict()  # noqa: F841
    else:
        del projection.weight
        projection.weight = held.detach()
    where, ids = projection.weight.data_ptr(), tiny_tokens()
    assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
    assert projection.weight.data_ptr() == where
    (after, before), *_ = products
    assert after == before - {"no parameter": 2, "a state dict": 0}.get(held_as, 1)


def test_hooks_of_the_users_may_bring_weights_of_their_own(products):
    model, ids = converted(layers=1, decay="head"), tiny_tokens()
    where = layer_of(model).mlp.gate_proj.weight.data_ptr()
    layer_of(model).register_forward_pre_hook(lambda module, args: None)
    assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
    assert layer_of(model).mlp.gate_proj.weight.data_ptr() == where and not products


def test_nothing_is_moved_while_another_thread_generates(products):
    model, ids = converted(layers=1, decay="head"), tiny_tokens()
    where, begun, goes_on = layer_of(model).mlp.gate_proj.weight.data_ptr(), threading.Event(), threading.Event()

    class Waits(BaseStreamer):
        def put(self, value):
            if value.dim() == 1:  # a token, and not the prompt
                begun.set()
                assert goes_on.wait(60)

        def end(self):
            pass

    other = threading.Thread(target=lambda: generate(model, ids[:1], streamer=Waits()))
    other.start()
    assert begun.wait(60)
    try:
        assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
        assert layer_of(model).mlp.gate_proj.weight.data_ptr() == where
    finally:
        goes_on.set()
        other.join()
    torch._dynamo.reset()
    assert torch.equal(generate_compiled(model, ids[:1]), generate(model, ids[:1], **TOKENS))
    assert products == [(8, 8), (6, 8)]


def test_a_backend_that_fails_at_it_is_given_the_graph_as_it_was(products, monkeypatch):
    model, ids = converted(layers=1, decay="head"), tiny_tokens()
    made = captured.improved

    def of_few_products(backend, *given):
        def refusing(graph, inputs):
            if len(graph.graph.find_nodes(op="call_function", target=torch._C._nn.linear)) < 8:
                raise NotImplementedError
            return backend(graph, inputs)

        return made(refusing, *given)

    monkeypatch.setattr(captured, "improved", of_few_products)
    assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
    assert products == [(5, 8)]


def test_nothing_of_a_model_outlives_it(products):
    model, ids = converted(layers=1, decay="head"), tiny_tokens()
    weights = {name: weakref.ref(weight) for name, weight in model.named_parameters()}
    generate_compiled(model, ids)
    assert products == [(5, 8)]
    del model
    gc.collect()
    assert not [name for name, weight in weights.items() if weight() is not None]


class Writing(nn.Module):
    """The user's own: what its second product meets is not what the first one met."""

    def __init__(self, mlp, write):
        super().__init__()
        self.mlp, self.write = mlp, write

    def forward(self, x):
        gate = self.mlp.gate_proj(x)
        self.write(x)
        return self.mlp.down_proj(gate * self.mlp.up_proj(x))


@pytest.mark.parametrize("write", [lambda x: x.view(-1).mul_(-2.0), lambda x: nn.functional.relu(x, inplace=True)], ids=["view", "inplace"])
def test_vectors_that_a_users_module_writes_into(products, write):
    model, ids = converted(layers=1, decay="head"), tiny_tokens()
    layer_of(model).mlp = Writing(layer_of(model).mlp, write)
    expected, out = generate(model, ids, **TOKENS, **SCORES), generate_compiled(model, ids, **SCORES)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores))
    assert not products
