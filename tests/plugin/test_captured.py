"""Compiled steps as CUDA graphs of their own: what is where, what is copied, what is not captured. Without a GPU a stand-in is replayed."""

import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from compiling import CHANGES, TOKENS, WINDOW, converted, generate_compiled
from generating import generate, left_padded
from tiny_models import tiny_tokens
from transformers import CompileConfig, StaticCache

from hf_linattn import captured

STUDENTS = [
    {"decay": "head"},
    {"kernel": "quadratic", "decay": "key_head"},
    {**WINDOW, "kernel": "quadratic"},
    {**WINDOW, "softmax_layers": [1]},
]
SCORES = {"return_dict_in_generate": True, "output_scores": True}


class Replayed:
    """Like a CUDA graph: computes from the memory it was recorded with, into its own."""

    def __init__(self, graph, inputs):
        self.graph, self.inputs, self.replays = graph, inputs, 0
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        self.results = [x.clone() if isinstance(x, torch.Tensor) else x for x in graph(*inputs)]
        for x, was in zip(inputs, before, strict=True):
            if isinstance(x, torch.Tensor) and not torch.equal(x, was):
                x.detach().copy_(was)

    def replay(self):
        self.replays += 1
        for kept, x in zip(self.results, self.graph(*self.inputs), strict=True):
            if isinstance(x, torch.Tensor):
                kept.copy_(x)


@pytest.fixture
def graphs(monkeypatch):
    """The stand-ins recorded so far."""
    torch._dynamo.reset()
    made = []

    def record(graph, inputs, device):
        made.append(Replayed(graph, inputs))
        return made[-1], made[-1].results

    monkeypatch.setattr(captured, "record", record)
    monkeypatch.setattr(captured, "the_gpu", lambda now: torch.device("cpu"))
    monkeypatch.setattr(captured, "compile_graph", lambda backend, graph, inputs, joins: captured.Captured(backend(graph, inputs)))
    return made


@pytest.mark.parametrize("options", STUDENTS, ids=str)
def test_the_same_tokens_at_every_batch(options, graphs):
    model = converted(**options)
    for batch in (2, 1, 2):
        ids = tiny_tokens(batch)
        assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
    assert graphs and sum(graph.replays for graph in graphs) > 30


def test_padding(graphs):
    model, (ids, mask) = converted(decay="head"), left_padded(tiny_tokens())
    for given in (mask, torch.ones_like(mask), mask):
        assert torch.equal(generate_compiled(model, ids, given), generate(model, ids, given, **TOKENS))
    assert graphs


def test_one_cache_is_captured_once(graphs):
    model, ids = converted(decay="head"), tiny_tokens(1, 9)
    cache = StaticCache(config=model.config, max_cache_len=40)
    for seed in range(4):
        ids = tiny_tokens(1, 9, seed=seed)
        cache.reset()
        out = generate_compiled(model, ids, cache_implementation=None, past_key_values=cache)
        assert torch.equal(out, generate(model, ids, **TOKENS))
    assert len(graphs) == 1 and graphs[0].replays > 50


def test_what_is_kept_is_bounded_and_holds_no_cache(graphs, monkeypatch):
    kept = []
    make = captured.Captured.__init__
    monkeypatch.setattr(captured.Captured, "__init__", lambda self, graph: kept.append(self) or make(self, graph))
    model, ids = converted(layers=1, decay="head"), tiny_tokens(1, 9)
    caches = [StaticCache(config=model.config, max_cache_len=40) for _ in range(captured.KEPT + 2)]
    for cache in caches:
        generate_compiled(model, ids, cache_implementation=None, past_key_values=cache)
    (one,) = kept
    assert len(graphs) == captured.KEPT + 2 and len(one.kept) == captured.KEPT
    held = {id(x) for capture in one.kept for x in (*capture.buffers, *capture.results)}
    assert not held & {id(tensor) for cache in caches for layer in cache.layers for tensor in layer.state.values()}


def test_captures_go_with_their_model_or_its_hooks(graphs):
    model, ids = converted(layers=1, decay="head"), tiny_tokens(1, 9)
    generate_compiled(model, ids)
    hook = model.model.norm.register_forward_hook(lambda module, args, out: out * 2)
    generate_compiled(model, ids)
    made = [weakref.ref(graph) for graph in graphs]
    graphs.clear()
    hook.remove()
    assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
    made += [weakref.ref(graph) for graph in graphs]
    graphs.clear()
    gc.collect()
    assert [graph() is None for graph in made] == [True, True, False]
    del model
    gc.collect()
    assert made[-1]() is None


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_between_two_texts_is_seen_by_the_second(change, graphs):
    model, ids = converted(decay="head"), tiny_tokens()
    generate_compiled(model, ids)
    assert graphs
    CHANGES[change](model)
    out, expected = generate_compiled(model, ids, **SCORES), generate(model, ids, **TOKENS, **SCORES)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores))


def test_results_stay_as_they_were(graphs):
    model, ids = converted(decay="head"), tiny_tokens()
    options = {"return_dict_in_generate": True, "output_hidden_states": True}
    expected, out = generate(model, ids, **TOKENS, **options), generate_compiled(model, ids, **options)
    for step, other in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(step, other)
    assert graphs


def test_training_draws_numbers_and_is_not_captured(graphs):
    model = converted(decay="head")
    model.config.linattn["dropout"] = 0.5
    model.train()
    generate_compiled(model, tiny_tokens())
    assert not graphs


def test_under_inference_mode_and_outside(graphs):
    model, ids = converted(decay="head"), tiny_tokens()
    expected = generate(model, ids, **TOKENS)
    with torch.inference_mode():
        assert torch.equal(generate_compiled(model, ids), expected)
    assert torch.equal(generate_compiled(model, ids), expected)
    assert graphs


def test_a_capture_that_fails_leaves_the_step_uncaptured(graphs, monkeypatch, caplog):
    def fail(*given):
        graphs.append(given)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured, "record", fail)
    captured.logger.warning_once.cache_clear()
    model, ids = converted(decay="head"), tiny_tokens()
    for _ in range(2):
        assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
    assert len(graphs) == 1


# ---- one graph, by hand


def calls(function, token, kept):
    with captured.given([token]):
        return [x.clone() for x in function(token, kept)]


def test_a_graph_that_writes_what_it_is_given_is_not_captured(graphs):
    made, kept = captured.Captured(lambda token, kept: [token.add_(kept)]), torch.ones(3)
    tokens = [torch.full((3,), float(number)) for number in range(4)]
    for number, token in enumerate(tokens):
        assert torch.equal(calls(made, token, kept)[0], torch.full((3,), number + 1.0))
        assert torch.equal(token, torch.full((3,), number + 1.0))
    assert not made.kept and len(graphs) == 1


def test_other_places_and_shapes_are_captured_by_themselves(graphs):
    made, kept = captured.Captured(lambda token, kept: [token + kept]), torch.ones(3)
    for number in range(3):
        calls(made, torch.full((3,), float(number)), kept)
    assert len(graphs) == 1 and graphs[0].replays == 2 and made.again is not None
    other = torch.full((3,), 5.0)
    for _ in range(3):  # two texts that take turns
        assert torch.equal(calls(made, torch.zeros(3), other)[0], other)
        assert torch.equal(calls(made, torch.zeros(2, 3), kept)[0], torch.ones(2, 3))
    assert [graph.replays for graph in graphs] == [2, 2, 2]
    for _ in range(3):
        assert torch.equal(calls(made, torch.zeros(3).expand(2, 3), kept)[0], torch.ones(2, 3))  # lies over itself
    assert len(graphs) == 3 and made.again is made.graph


def test_a_graph_whose_small_kernels_cannot_be_one_is_compiled_without():
    from torch._inductor import config

    asked = []

    def backend(graph, inputs):
        asked.append(config.combo_kernels)
        if config.combo_kernels or len(inputs) == 2:
            raise RuntimeError("a bug")
        return graph

    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    assert captured.compile_graph(backend, graph, [torch.ones(2)])(torch.ones(2)).tolist() == [2, 2]
    assert asked == [True, False] and not config.combo_kernels
    with pytest.raises(RuntimeError, match="a bug"):
        captured.compile_graph(backend, graph, [torch.ones(2)] * 2)


def test_memory_of_captures_outlives_them(monkeypatch):
    """PyTorch's rule: no capture into memory that graphs have had and none has any more, while what they left there is in use."""
    uses = {}

    class Graph:
        pool = None

        def capture_begin(self, pool, capture_error_mode):
            if uses.get(pool) == 0:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            self.pool, uses[pool] = pool, uses.get(pool, 0) + 1

        def capture_end(self):
            pass

        def __del__(self):
            uses[self.pool] = uses.get(self.pool, 0) - 1

    class Stream:
        def wait_stream(self, other):
            pass

    fakes = {"CUDAGraph": Graph, "Stream": lambda device: Stream(), "current_stream": lambda device: Stream(), "graph_pool_handle": object}
    for name, fake in {**fakes, "stream": lambda stream: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(captured, "_places", {})
    for number in range(2):  # the graph of the first is gone when the second comes
        assert captured.record(lambda x: [x + 1], [number], torch.device("cuda", 0))[1] == [number + 1]


# ---- on a GPU


@pytest.fixture
def on_gpu():
    torch._dynamo.reset()
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options, mode",
    [*((options, "reduce-overhead") for options in STUDENTS), pytest.param(STUDENTS[0], "max-autotune", marks=pytest.mark.slow)],
    ids=str,
)
def test_the_same_tokens_on_a_gpu(options, mode, on_gpu, monkeypatch):
    runs, run = [], captured.Capture.run
    monkeypatch.setattr(captured.Capture, "run", lambda self, *now: runs.append(1) or run(self, *now))
    model = converted(**options).to(on_gpu)
    for batch in (2, 1, 2):
        ids, mask = (x[:batch].to(on_gpu) for x in left_padded(tiny_tokens()))
        for given in (mask, None) if options == STUDENTS[0] else (mask,):
            runs.clear()
            out = generate_compiled(model, ids, given, compile_config=CompileConfig(mode=mode))
            assert torch.equal(out, generate(model, ids, given, **TOKENS))
            assert len(runs) > 10


@pytest.mark.gpu
def test_threads_on_a_gpu(on_gpu):
    model, prompts = converted(decay="head").to(on_gpu), [tiny_tokens(2, 9, seed=number).to(on_gpu) for number in range(3)]
    expected, got = [generate(model, ids, **TOKENS) for ids in prompts], {}

    def work(number, stream):
        cache = StaticCache(config=model.config, max_cache_len=40)
        with torch.cuda.stream(stream):
            for _ in range(3):
                cache.reset()
                options = {"cache_implementation": None, "compile_config": CompileConfig(), "past_key_values": cache}
                got[number] = generate_compiled(model, prompts[number], **options)

    for stream_of in (lambda: torch.cuda.Stream(), lambda: None):
        streams = [stream_of() for _ in prompts]
        torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(number, stream)) for number, stream in enumerate(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(got[number], expected[number]) for number in range(3))


@pytest.mark.gpu
def test_a_capture_that_fails_on_a_gpu_leaves_pytorch_usable(on_gpu):
    made, kept = captured.Captured(lambda token, kept: [token + kept * kept.sum().item()]), torch.ones(3, device=on_gpu)
    for number in range(3):
        token = torch.full((3,), float(number), device=on_gpu)
        assert torch.equal(calls(made, token, kept)[0], token + 3)
    assert made.refused
    torch.manual_seed(0)
    first = torch.randn(5, device=on_gpu)
    torch.manual_seed(0)
    assert torch.equal(torch.randn(5, device=on_gpu), first)
    torch.cuda.empty_cache()
    again = captured.Captured(lambda token, kept: [token + kept])
    for number in range(3):
        token = torch.full((3,), float(number), device=on_gpu)
        assert torch.equal(calls(again, token, kept)[0], token + 1)  # captured or not


@pytest.mark.gpu
def test_memory_of_captures_outlives_them_on_a_gpu(on_gpu, monkeypatch):
    monkeypatch.setattr(captured, "_places", {})
    x, results = torch.ones(3, device=on_gpu), []
    for _ in range(2):  # what the first left lies in the memory that the second is captured into
        graph, result = captured.record(lambda x: [x + 1], [x], torch.device("cuda", torch.cuda.current_device()))
        graph.replay()
        results += result
        del graph, result
        gc.collect()
    assert all(torch.equal(y, x + 1) for y in results)


@pytest.mark.gpu
def test_what_inductor_holds_to_be_unfit_runs_uncaptured(on_gpu):
    table = torch.arange(5.0)  # on the CPU

    def function(x):
        return x + table[2].to(x.device)

    graphs = []

    def backend(graph, inputs):
        with torch.no_grad():
            graphs.append(captured.compile_graph(torch._TorchCompileInductorWrapper("reduce-overhead", None, None), graph, inputs))
        return graphs[-1]

    x = torch.ones(3, device=on_gpu)
    with torch.no_grad():
        assert torch.equal(torch.compile(function, backend=backend)(x), x + 2)
        assert not isinstance(graphs[0], captured.Captured)
        assert torch.equal(torch.compile(lambda x: x * 3, backend=backend)(x), x * 3)
    assert isinstance(graphs[1], captured.Captured)
