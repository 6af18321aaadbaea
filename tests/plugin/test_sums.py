"""Sums of the residual stream are made once, so that layers are the same kernels, and the tokens are the same."""

import importlib.util
from pathlib import Path

import pytest
import torch
from compiling import TOKENS, converted, generate_compiled, graphs_changed_by, made_in
from generating import generate
from tiny_models import tiny_tokens

from hf_linattn import made, sums


@pytest.fixture
def graphs(monkeypatch):
    """Those that were changed, as on a GPU."""
    return graphs_changed_by(monkeypatch, sums.make_once)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("name", "count"), [("llama", 5), ("gpt_neox", 2), ("gemma2", 6), ("phi", 2)])
def test_the_same_tokens(name, count, batch, graphs):
    """Each layer's sums, but for the last where the last norm reads it once."""
    model, ids = converted(name, layers=3, decay="head"), tiny_tokens(batch)
    assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
    assert len(made_in(graphs[0])) == count


def test_sums_of_learned_numbers_are_left(monkeypatch):
    monkeypatch.setattr(made, "is_on_gpu", lambda node: True)

    def scaled(x, weight, one, other):
        both = one + other
        return torch.nn.functional.linear(x * both, weight) * both

    graph = torch.fx.symbolic_trace(scaled)
    sums.make_once(graph)
    assert not made_in(graph)


def test_a_sum_in_memory_that_was_there_before_is_left(monkeypatch):
    """Two names are the same tensor, and it is written."""
    monkeypatch.setattr(made, "is_on_gpu", lambda node: True)

    def added(x, weight):
        there = torch.empty_like(x)
        both = torch.add(torch.nn.functional.linear(x, weight), x, out=there)
        both.mul_(2)
        return both * 3, there

    def backend(graph, inputs):
        sums.make_once(graph)
        return graph

    torch._dynamo.reset()
    given = torch.randn(2, 8), torch.randn(8, 8)
    with torch.no_grad():
        for out, right in zip(torch.compile(added, backend=backend)(*given), added(*given), strict=True):
            torch.testing.assert_close(out, right)


def kernels_of(layers, once):
    """How many loops Inductor writes for layers of a norm and a product; those that are the same are one."""

    def residual(x, weights):
        for weight in weights:
            x = x + torch.nn.functional.linear((x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), weight)
        return x

    def backend(graph, inputs):
        if once:
            made._tell_inductor()
            sums.make_once(graph)
        return torch._inductor.compile(graph, inputs)

    torch._dynamo.reset()
    x, weights = torch.randn(2, 1, 64), [torch.randn(64, 64) / 8 for _ in range(layers)]
    with torch.no_grad():
        out, (code,) = torch._inductor.utils.run_and_get_code(torch.compile(residual, backend=backend), x, weights)
    torch.testing.assert_close(out, residual(x, weights), rtol=1e-4, atol=1e-4)
    return code.count("async_compile.cpp_pybinding(")


def test_layers_share_kernels(monkeypatch):
    monkeypatch.setattr(made, "is_on_gpu", lambda node: True)
    assert kernels_of(8, once=True) == 4 < kernels_of(8, once=False)  # the first, the second, that of all others, and the sum behind them


def test_what_another_version_compiled_is_not_found_on_disk(tmp_path):
    """Inductor's cache there knows an operator by its name."""
    changed = tmp_path / "made.py"
    changed.write_text(Path(made.__file__).read_text().replace(" if x.get_name() in V.graph.graph_inputs else x", ""))
    spec = importlib.util.spec_from_file_location("changed", changed)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)

    def misses(version):
        version._tell_inductor()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        x = torch.ones(4)
        assert torch.equal(torch.compile(lambda x: version.MADE(x + 1) * 2)(x), (x + 1) * 2)
        counts = torch._dynamo.utils.counters["inductor"]
        return counts["fxgraph_cache_miss"], counts["fxgraph_cache_hit"]

    with torch._inductor.utils.fresh_cache(), torch._functorch.config.patch(enable_autograd_cache=False):
        assert [misses(version) for version in (made, made, another)] == [(1, 0), (0, 1), (1, 0)]
