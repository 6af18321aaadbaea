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
    """The vectors that a matrix meets, each once."""
    return {
        node.args[0] for node in graph.graph.nodes if node.target is MADE and any(user.target is torch._C._nn.linear for user in node.users)
    }


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
        return (MADE(torch.nn.functional.silu(gate) * up) * matrix).sum(-1)

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


def _the_whole_of_it(x, weight):
    whole = x * 2
    row = whole[:1]
    out = torch.nn.functional.linear(row, weight)
    whole.add_(1)
    return out, row


def _one_of_two_names(x, weight):
    name = x * 2
    other = torch.nn.functional.silu(name, inplace=True)
    out = torch.nn.functional.linear(other, weight)
    other.add_(1)
    return out, name


def _between_two_products(x, weight):
    whole = x * 2
    row = whole[:1]
    out = torch.nn.functional.linear(row, weight)
    whole.add_(1)
    return out, torch.nn.functional.linear(row, weight)


@pytest.mark.parametrize("written", [_the_whole_of_it, _one_of_two_names, _between_two_products], ids=lambda written: written.__name__)
def test_what_is_written_behind_a_product(written, monkeypatch):
    """A vector is a view of it."""
    monkeypatch.setattr(made, "is_on_gpu", lambda node: True)
    torch._dynamo.reset()

    def backend(graph, inputs):
        vectors.make_once(graph)
        assert made_before_products(graph)
        return graph

    given = torch.randn(2, 8), torch.randn(8, 8)
    with torch.no_grad():
        for out, right in zip(torch.compile(written, backend=backend)(*given), written(*given), strict=True):
            torch.testing.assert_close(out, right)


def test_what_the_graph_was_given_is_written_behind_a_product(monkeypatch):
    """Inductor may write it where it lies, before it comes to the second product."""
    monkeypatch.setattr(made, "is_on_gpu", lambda node: True)
    torch._dynamo.reset()

    def written(x, weight, place):
        row = x[:1]
        out, before = torch.nn.functional.linear(row, weight), row.clone()
        x.index_put_((place,), out)
        return torch.nn.functional.linear(before, weight) + row

    def backend(graph, inputs):
        vectors.make_once(graph)
        return torch._inductor.compile(graph, inputs)

    x, weight, place = torch.randn(3, 64), torch.randn(64, 64) / 8, torch.tensor([0])
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        out = torch.compile(written, backend=backend)(x.clone(), weight, place)
        torch.testing.assert_close(out, written(x.clone(), weight, place), atol=1e-4, rtol=1e-4)
