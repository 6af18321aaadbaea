"""What a matrix meets with one row is made once, and the tokens are the same."""

import pytest
import torch
from compiling import MADE, TOKENS, converted, generate_compiled, graphs_as_on_a_gpu
from generating import generate
from tiny_models import tiny_tokens

from hf_linattn import captured, made, sums, vectors


@pytest.fixture
def graphs(monkeypatch):
    """Those that were changed, as on a GPU."""
    return graphs_as_on_a_gpu(monkeypatch, captured.improved)


def made_before_products(graph):
    return [node for node in graph.graph.nodes if node.target is MADE and any(user.target is torch._C._nn.linear for user in node.users)]


@pytest.mark.parametrize(("name", "a_layer"), [("llama", 4), ("gpt_neox", 4), ("gemma2", 4), ("phi", 3)])
def test_the_same_tokens_of_one_sequence(name, a_layer, graphs):
    model, ids = converted(name, decay="head"), tiny_tokens(1)
    assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
    assert len(made_before_products(graphs[0])) == 2 * a_layer + 1


def test_of_several_sequences_nothing_is(graphs):
    model, ids = converted(decay="head"), tiny_tokens(2)
    assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
    assert not made_before_products(graphs[0])


def test_inductor_copies_nothing(monkeypatch):
    """Beside what is made there is one loop for the product, which does not make it again."""
    torch._dynamo.reset()
    made._tell_inductor()
    gate, up, matrix = torch.randn(1, 64), torch.randn(1, 64), torch.randn(32, 64)

    def product(gate, up, matrix):
        return (torch.ops.linattn.made(torch.nn.functional.silu(gate) * up) * matrix).sum(-1)

    with torch.no_grad():
        out, (code,) = torch._inductor.utils.run_and_get_code(torch.compile(product), gate, up, matrix)
    torch.testing.assert_close(out, product(gate, up, matrix))
    assert "linattn.made" not in code and code.count(".exp(") + code.count("exp_") <= 2


def test_a_product_that_names_its_arguments(monkeypatch):
    monkeypatch.setattr(made, "is_on_gpu", lambda node: True)

    def of_names(x, weight):
        return torch.nn.functional.linear(input=torch.sigmoid(x), weight=weight)

    graph = torch.fx.symbolic_trace(of_names)
    vectors.make_once(graph)
    assert len(graph.graph.find_nodes(op="call_function", target=MADE)) == 1


def test_a_sum_that_a_matrix_meets_is_made_once(monkeypatch):
    monkeypatch.setattr(made, "is_on_gpu", lambda node: True)

    def residual(x, weight):
        x = x + torch.nn.functional.linear(x, weight)
        return x + torch.nn.functional.linear(x, weight)

    graph = torch.fx.symbolic_trace(residual)
    sums.make_once(graph)
    vectors.make_once(graph)
    assert len(graph.graph.find_nodes(op="call_function", target=MADE)) == 1
