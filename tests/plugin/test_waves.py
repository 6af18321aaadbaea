"""Cosines and sines are made once, behind them comes what each layer does with them, and the tokens are the same."""

import pytest
import torch
from compiling import TOKENS, converted, generate_compiled, graphs_changed_by, made_in
from generating import generate
from tiny_models import tiny_tokens

from hf_linattn import waves


@pytest.fixture
def graphs(monkeypatch):
    """Those that were changed, as on a GPU."""
    return graphs_changed_by(monkeypatch, waves.make_once)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "phi"])
def test_the_same_tokens(name, graphs):
    model, ids = converted(name, decay="head"), tiny_tokens()
    assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
    assert len(made_in(graphs[0])) == 2


def test_they_are_made_behind_what_each_layer_would_make_again(graphs):
    generate_compiled(converted(layers=3, decay="head"), tiny_tokens())
    for node in made_in(graphs[0]):
        assert [user.target for user in node.users] == ["unsqueeze"] * 3


def test_a_wave_that_is_the_result_itself(graphs):
    x, found = torch.rand(5), []

    def backend(graph, inputs):
        waves.make_once(graph)
        found.append(graph)
        return graph

    with torch.no_grad():
        ours = torch.compile(lambda x: (x.cos(), torch.sin(x) * 2, x.sin()), backend=backend)(x)
    for wave, expected in zip(ours, (x.cos(), torch.sin(x) * 2, x.sin()), strict=True):
        assert torch.equal(wave, expected)
    assert len(made_in(found[0])) == 3


def test_a_wave_in_memory_that_was_there_before_is_left(graphs):
    """Two names are the same tensor, and it is written."""

    def doubled(x):
        there = torch.empty_like(x)
        torch.cos(x, out=there).mul_(2)
        wave = torch.sin(x, out=there)
        wave.add_(1)
        return there + wave

    def backend(graph, inputs):
        waves.make_once(graph)
        return graph

    x = torch.rand(5)
    with torch.no_grad():
        assert torch.equal(torch.compile(doubled, backend=backend)(x), doubled(x))
