"""generate() compiled gives, token for token, what it gives uncompiled, whatever is changed on the model between two texts."""

import copy
import threading
import time

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from compiling import CHANGES, TOKENS, WINDOW, compile_config, converted, generate_compiled
from generating import NEW, generate, left_padded
from tiny_models import tiny_tokens
from torch._inductor import compile_fx, config
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import CompileConfig, StaticCache, masking_utils
from transformers.generation import BaseStreamer

from hf_linattn import captured, compiled

STUDENTS = [
    ("llama", {"decay": "head"}),
    ("llama", {"kernel": "quadratic", "decay": "key_head"}),
    ("llama", {**WINDOW, "kernel": "quadratic"}),
    ("llama", {**WINDOW, "softmax_layers": [1]}),
    ("qwen3", {"decay": "token", "input_gate": "token", "output_map": "norm_gate"}),
]


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """How many tokens went straight to the graph."""
    torch._dynamo.reset()
    seen, run = [], compiled.Direct.run
    monkeypatch.setattr(compiled.Direct, "run", lambda self, inputs: seen.append(1) or run(self, inputs))
    return seen


@pytest.mark.parametrize("student", STUDENTS, ids=lambda v: "-".join([v[0], *map(str, v[1].values())]))
def test_the_same_tokens(student, direct):
    name, options = student
    model, (ids, mask) = converted(name, **options), left_padded(tiny_tokens())
    expected = generate(model, ids, mask, **TOKENS)
    for _ in range(2):
        direct.clear()
        assert torch.equal(generate_compiled(model, ids, mask), expected)
        assert len(direct) > 10


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("options", [{"decay": "head"}, {"decay": "head", "softmax_layers": [1]}], ids=str)
def test_the_padding_mask_is_read_once_a_text_where_it_says_the_same(options, padded, direct, monkeypatch):
    model, (ids, mask), calls = converted(**options), left_padded(tiny_tokens()), []
    mask, other = (mask, torch.ones_like(mask)) if padded else (torch.ones_like(mask), mask)
    expected = generate(model, ids, mask, **TOKENS)
    make = masking_utils.create_masks_for_generate
    monkeypatch.setattr(masking_utils, "create_masks_for_generate", lambda **given: calls.append(1) or make(**given))
    assert torch.equal(generate_compiled(model, ids, mask), expected)
    assert len(calls) == (16 if "softmax_layers" in options else 2)  # with the prompt's
    assert not torch.equal(generate_compiled(model, ids, other), expected)


def test_no_mask_behind_padding_is_refused_at_any_token():
    """None says that all tokens are real; kept from the token before, it says so still."""
    model, (ids, mask) = converted(decay="head"), left_padded(tiny_tokens())
    cache, one = StaticCache(config=model.config, max_cache_len=40), tiny_tokens(2, 1)
    with torch.no_grad():
        for tokens in (one, one, one):
            inputs = model.prepare_inputs_for_generation(tokens, past_key_values=cache, attention_mask=None)
            model(**inputs)
        cache.reset()
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="hides other tokens of the past"):
            model(**model.prepare_inputs_for_generation(one, past_key_values=cache, attention_mask=None))


def test_a_loop_of_the_users_that_writes_into_the_padding_mask_is_heard():
    """Of a sequence that has ended, say, whose tokens are padding from there on."""
    model, (ids, mask) = converted(decay="head"), left_padded(tiny_tokens())
    new, logits = tiny_tokens(2, 5, seed=1), []
    cache = StaticCache(config=model.config, max_cache_len=40)
    kept = {"attention_mask": mask, "past_key_values": cache}
    with torch.no_grad():
        kept = model._update_model_kwargs_for_generation(model(ids, **kept), kept)
        for number in range(5):
            if number == 3:
                kept["attention_mask"][0, -1] = 0
            inputs = model.prepare_inputs_for_generation(new[:, number : number + 1], **kept)
            logits.append(model(**inputs).logits)
            kept = model._update_model_kwargs_for_generation({}, kept)
        whole = model(torch.cat([ids, new], 1), attention_mask=kept["attention_mask"][:, :-1]).logits[:, 28:]
    told = kept["attention_mask"][:, 28:-1].bool()
    torch.testing.assert_close(torch.cat(logits, 1)[told], whole[told], atol=1e-4, rtol=0)
    assert not told[0, 3]


def test_a_padding_mask_longer_than_the_text_says_of_each_token_what_it_says():
    model, ids = converted(decay="head"), tiny_tokens()
    mask = torch.cat([torch.ones_like(ids), torch.tensor([[0, 1], [1, 1]])], 1)
    expected = generate(model, ids, mask, **TOKENS)
    assert torch.equal(generate(model, ids, mask, **TOKENS, cache_implementation="static"), expected)
    assert not torch.equal(generate(model, ids, **TOKENS), expected)


def test_the_same_scores(direct):
    model, ids = converted(decay="head"), tiny_tokens()
    options = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    expected, out = generate(model, ids, **TOKENS, **options), generate_compiled(model, ids, **options)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores))
    for step, other in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(step, other)


def test_a_prompt_in_chunks(direct):
    model, (ids, mask) = converted(decay="head"), left_padded(tiny_tokens())
    assert torch.equal(generate_compiled(model, ids, mask, prefill_chunk_size=6), generate(model, ids, mask, **TOKENS))
    assert direct


def test_another_batch_and_another_length(direct):
    model, ids = converted(kernel="quadratic"), tiny_tokens()
    for rows, tokens in ((2, 16), (1, 16), (1, 9), (2, 20)):
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        direct.clear()
        assert torch.equal(generate_compiled(model, ids[:rows], **options), generate(model, ids[:rows], **{**NEW, **options}))
        assert direct


def test_a_cache_that_counts_in_python_is_looked_through_at_each_token(direct):
    model, ids = converted("mistral", softmax_layers=[1]), tiny_tokens()[:, :4]  # a window of 8: it fills while tokens come
    assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
    assert not direct


# ---- what is changed between two texts


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_between_two_texts_is_seen_by_the_second(change, direct):
    model, ids = converted(decay="head"), tiny_tokens()
    options = {"return_dict_in_generate": True, "output_scores": True}
    before = generate_compiled(model, ids, **options)
    assert direct
    CHANGES[change](model)
    out = generate_compiled(model, ids, **options)
    expected = generate(model, ids, **TOKENS, **options)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores))
    assert not torch.allclose(torch.stack(out.scores).float(), torch.stack(before.scores))


def test_a_module_of_the_users_own_is_seen_where_it_comes_later(monkeypatch):
    """Matrices were moved beside it, as at the first text, when all modules were known."""
    joins, model, ids = [], converted(), tiny_tokens(1, 9)

    class Own(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x) * 2

    def compile_graph(backend, graph, inputs, may_be_moved):
        joins.append(may_be_moved)
        return backend(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(captured, "compile_graph", compile_graph)
    generate_compiled(model, ids)
    model.model.layers[0].mlp = Own(model.model.layers[0].mlp)
    tokens = generate_compiled(model, ids)
    assert joins == [True, False] and torch.equal(tokens, generate(model, ids, None, **TOKENS))


def test_training_mode_is_seen(direct):
    model, ids = converted(decay="head"), tiny_tokens()
    generate_compiled(model, ids)
    model.config.linattn["dropout"] = 0.5
    model.train()
    torch.manual_seed(0)
    noisy = generate_compiled(model, ids, return_dict_in_generate=True, output_scores=True)
    model.eval()
    plain = generate_compiled(model, ids, return_dict_in_generate=True, output_scores=True)
    expected = generate(model, ids, **TOKENS, return_dict_in_generate=True, output_scores=True)
    assert not torch.allclose(torch.stack(noisy.scores), torch.stack(plain.scores))
    torch.testing.assert_close(torch.stack(plain.scores), torch.stack(expected.scores))


@pytest.mark.timeout(600)  # the inner text would wait for the outer one, which waits for it
def test_a_hook_may_generate_by_itself():
    outer, inner, ids = converted(layers=1, decay="head"), converted(layers=1, scale=1.5, decay="head"), tiny_tokens(1, 9)
    few, made = {"max_new_tokens": 3, "min_new_tokens": 3}, []
    expected, of_inner = generate(outer, ids, **few), generate(inner, ids, **few)
    outer.model.norm.register_forward_hook(torch.compiler.disable(lambda *_: made.append(generate_compiled(inner, ids, **few))))
    assert torch.equal(generate_compiled(outer, ids, **few), expected)
    assert len(made) == 3 and all(torch.equal(out, of_inner) for out in made)


def test_a_hook_that_only_looks_on_is_called_at_every_token(direct):
    model, ids, seen = converted(decay="head"), tiny_tokens(), []
    model.model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    generate_compiled(model, ids)
    assert len(seen) == 16 and not direct


def test_a_copy_of_a_model_has_a_call_of_its_own(direct):
    model, ids = converted(decay="head"), tiny_tokens()
    generate_compiled(model, ids)
    other = copy.deepcopy(model)
    CHANGES["another state dict"](other)
    assert torch.equal(generate_compiled(other, ids), generate(other, ids, **TOKENS))
    assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))


@torch._dynamo.config.patch(recompile_limit=1)
def test_more_models_than_pytorch_keeps_graphs_of_one_function(direct):
    ids = tiny_tokens()
    for number in range(2):
        model = converted(layers=1, scale=1 + number / 8, decay="head")
        direct.clear()
        assert torch.equal(generate_compiled(model, ids), generate(model, ids, **TOKENS))
        assert direct


# ---- how it is compiled


def test_a_users_options_go_to_the_backend_that_pytorch_makes_of_them():
    for options in ({"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"options": {"max_autotune": True}}, {"dynamic": True}, {}):
        given = CompileConfig(**{"mode": None, **options}).to_dict()
        theirs = torch._TorchCompileInductorWrapper(
            given["mode"] or ("default" if given["options"] is None else None), given["options"], given["dynamic"]
        )
        assert compiled._watched(given).backend.config == theirs.config


@pytest.mark.parametrize("searches_again", [True, False])
@pytest.mark.parametrize("rows, options, searched", [(1, {}, True), (2, {}, False), (1, {"coordinate_descent_tuning": False}, False)])
def test_matrices_that_meet_one_row_are_multiplied_by_what_inductor_finds_best(rows, options, searched, searches_again, monkeypatch):
    found = []

    def inductor(graph, inputs, config_patches, **_):
        with config.patch(config_patches):
            found.append((config.coordinate_descent_tuning, config.use_static_cuda_launcher))
        return graph

    monkeypatch.setattr(compile_fx, "compile_fx", inductor)
    monkeypatch.setattr(captured, "SEARCHES_AGAIN", searches_again)
    watched = compiled._watched(CompileConfig(mode=None, options={"triton.cudagraphs": True, **options}).to_dict())
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(torch.nn.Linear(4, 3), backend=watched)(torch.ones(rows, 1, 4))
    assert found == [(searched, not (rows == 1 and searches_again))]


@pytest.mark.parametrize("select, known", [(lambda x: x[x[:, 0] > 0], False), (lambda x: x[:1], True)])
def test_rows_of_a_number_that_data_decides(select, known):
    """As of the tokens that an expert is given: no graph may ask whether there is one."""
    found, linear = [], torch.nn.Linear(4, 3)

    def backend(graph, _):
        found.append(captured.multiplies_one_row(graph))
        return graph

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.compile(lambda x: linear(select(x)), backend=backend, fullgraph=True)(torch.ones(3, 4))
    assert found == [known]


def test_mode_beside_options_is_refused_as_pytorch_refuses_it():
    model = converted(layers=1)
    with pytest.raises(RuntimeError, match="Either mode or options"):
        generate_compiled(model, tiny_tokens(), compile_config=compile_config(mode="default", options={"max_autotune": True}))


def test_a_guard_filter_of_the_user_is_asked(direct):
    asked = []
    options = {"guard_filter_fn": lambda guards: asked.append(len(guards)) or [True] * len(guards)}
    model, ids = converted(layers=1), tiny_tokens()
    assert torch.equal(generate_compiled(model, ids, compile_config=compile_config(options=options)), generate(model, ids, **TOKENS))
    assert asked and direct


def test_a_compiled_call_of_the_user_is_kept():
    model, called = converted(layers=1), []
    model._compiled_call = lambda **inputs: called.append(1) or model(**inputs)
    model.generation_config.compile_config = compile_config()
    generate_compiled(model, tiny_tokens(), max_new_tokens=4, min_new_tokens=4)
    assert len(called) == 3


def test_a_model_that_has_generated_is_saved(tmp_path):
    model, ids = converted(layers=1, decay="head"), tiny_tokens()
    generate_compiled(model, ids)
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(generate_compiled(other, ids), generate(model, ids, **TOKENS))


# ---- what is changed within a text


class Callback(BaseStreamer):
    """Calls a function at the tenth token."""

    def __init__(self, function):
        self.seen, self.function = 0, function

    def put(self, value):
        self.seen += 1
        if self.seen == 10:
            self.function()

    def end(self):
        pass


@pytest.mark.parametrize("change", ["written in place", "an optimizer's step"])
def test_what_is_written_within_a_text_is_seen_at_once(change, direct):
    outs = []
    for run in (generate, generate_compiled):
        model = converted(decay="head")
        streamer = Callback(lambda model=model: torch.enable_grad()(CHANGES[change])(model))
        options = {"return_dict_in_generate": True, "output_scores": True, "streamer": streamer}
        outs.append(run(model, tiny_tokens(1), **TOKENS, **options))
    assert torch.equal(outs[0].sequences, outs[1].sequences) and direct
    torch.testing.assert_close(torch.stack(outs[0].scores), torch.stack(outs[1].scores))


def test_memory_that_a_parameter_leaves_within_a_text_is_kept_until_its_end():
    """A CUDA graph would go on reading there."""
    model, left = converted(decay="head"), []
    weight = model.model.layers[0].mlp.down_proj.weight

    def leave():
        left.append(StorageWeakRef(weight.untyped_storage()))
        weight.data = weight.data * 2

    class Streamer(Callback):
        def put(self, value):
            super().put(value)
            assert not left or not left[0].expired()

    generate_compiled(model, tiny_tokens(1), streamer=Streamer(leave))
    assert torch.equal(generate_compiled(model, tiny_tokens(1)), generate(model, tiny_tokens(1), **TOKENS))
    assert left[0].expired()


def one_memory(graph, inputs):
    """A backend whose graph has one memory for its results, as CUDA graphs have, and does not bear two calls at once."""
    memory, at_work = [], threading.Lock()

    def run(*given):
        assert at_work.acquire(blocking=False), "two calls at once"
        try:
            made = graph(*given)
            time.sleep(0.01)
            if not memory:
                memory.extend(x.clone() for x in made)
            for kept, x in zip(memory, made, strict=True):
                kept.copy_(x)
            return list(memory)
        finally:
            at_work.release()

    return run


def test_threads_take_turns_and_keep_what_they_were_given(monkeypatch):
    model, prompts = converted(decay="head"), [tiny_tokens(2, 9, seed=number) for number in range(3)]
    expected = [generate(model, ids, **TOKENS) for ids in prompts]
    update, got, compiling = model._update_model_kwargs_for_generation, {}, compile_config(backend=one_memory)

    def slow(*args, **kwargs):  # between the step and the look at what it returned
        time.sleep(0.002)
        return update(*args, **kwargs)

    def work(number):
        cache = StaticCache(config=model.config, max_cache_len=40)
        options = {"cache_implementation": None, "compile_config": compiling, "past_key_values": cache}
        got[number] = generate_compiled(model, prompts[number], **options)

    monkeypatch.setattr(model, "_update_model_kwargs_for_generation", slow)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[number], expected[number]) for number in range(3))


def test_a_model_that_is_spread_over_devices_is_not_compiled():
    torch._dynamo.reset()
    model, ids = converted(decay="head"), tiny_tokens()
    expected = generate(model, ids, **TOKENS)
    for layer in model.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    torch._dynamo.utils.counters.clear()
    with pytest.warns(UserWarning, match="the step is not compiled"):
        assert torch.equal(generate_compiled(model, ids), expected)
    assert not torch._dynamo.utils.counters["frames"]


def test_an_offloaded_cache_is_decoded_without_compiling():
    model = converted(decay="head")
    cache = StaticCache(config=model.config, max_cache_len=40)
    cache.offloading = True
    generation = copy.copy(model.generation_config)
    assert not model._valid_auto_compile_criteria({"past_key_values": cache}, generation)
    generation.compile_config = compile_config()
    with pytest.warns(UserWarning, match="the step is not compiled"):
        assert not model._valid_auto_compile_criteria({"past_key_values": cache}, generation)
    cache.offloading = False
    assert model._valid_auto_compile_criteria({"past_key_values": cache}, generation)
