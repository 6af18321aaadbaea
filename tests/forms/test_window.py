"""A window with sinks beside linear attention: what the formula says, in pieces, padded, packed, taken back, and learned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learned import check_pieces_give_the_whole, check_tokens_are_taken_back, feed, learned_model
from operator_cases import make_segments
from tiny_models import tiny_model, tiny_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from window_cases import make_tensors

import hf_linattn.forms.window
from hf_linattn import DropoutSchedule, LinAttnConfig, WindowDropCallback, set_window_drop
from hf_linattn.forms import Call, Sizes, Window
from hf_linattn.forms.seen import Seen
from hf_linattn.forms.window import WindowOptions, WindowParameters
from hf_linattn.ops import window_attention

KINDS: list[dict[str, Any]] = [
    {"beside": "none"}, {}, {"decay": "head", "gate": "token"}, {"decay": "key_head", "kernel": "quadratic", "input_gate": "token"},
    {"decay": "key_head", "feature_map": "hedgehog", "output_map": "norm"}, {"gate": "token", "decay": "head", "output_map": "gate"},
    {"decay": "token", "gate": "token", "kernel": "quadratic", "features": 3, "input_gate": "token", "output_map": "norm_gate"},
]  # fmt: skip
SEGMENTS = (None, "left", "right", "middle", "mask", "packed")


def make_form(**options: Any) -> Window:
    return Window(WindowOptions(**{"window": 5, "sinks": 2, **options}))


def make_parameters(form: Window, dtype: torch.dtype = torch.float64) -> WindowParameters | None:
    """Every number other than where it starts."""
    parameters = form.parameters(Sizes(4, 2, 8, 6, 12), True)
    if parameters is None:
        return None
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return parameters.to(dtype)


def make_call(length: int = 40, segments: str | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> Call:
    hidden = torch.randn(2, length, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    ids = None if segments is None else make_segments(segments, 2, length)
    ids = ids > 0 if segments in ("left", "right", "middle") and ids is not None else ids
    return Call(*make_tensors(length, dtype=dtype, grad=False), ids, hidden=hidden, **options)


def cut(call: Call, start: int, stop: int) -> Call:
    segments = None if call.segments is None else call.segments[:, start:stop]
    tensors = (x[:, :, start:stop] for x in (call.query, call.key, call.value))
    return Call(*tensors, segments, call.causal, call.scaling, call.noise, call.hidden[:, start:stop])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("length", [1, 5, 6, 40])
def test_equals_its_formula(kind: dict[str, Any], length: int) -> None:
    form, call = make_form(**kind), make_call(length)
    for x in (call.query, call.key, call.value):
        x.requires_grad_()
    numbers = form.numbers(call, make_parameters(form))
    out, expected = form.attend(call, numbers), form.reference(call, numbers)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)  # rates and gates are float32
    weight = torch.randn_like(out)
    leaves = (call.query, call.key, call.value)
    found = torch.autograd.grad((out * weight).sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    for grad, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, right, rtol=0, atol=2e-5)


def test_each_part_has_its_share() -> None:
    """The gate's share is the window's, and a token that has nothing before its window is the window's alone."""
    form, call = make_form(sinks=0), make_call()
    near = window_attention(call.query, call.key, call.value, window=5)
    parts = [form.attend(call, form.numbers(call, None) | {"gate": gate}) for gate in (0.0, 1.0, 0.25)]
    torch.testing.assert_close(parts[1], near, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts[0][:, :, :5], near[:, :, :5], rtol=0, atol=1e-12)
    torch.testing.assert_close(parts[2][:, :, 5:], (0.25 * parts[1] + 0.75 * parts[0])[:, :, 5:], rtol=0, atol=1e-12)
    assert (parts[0] - near)[:, :, 5:].abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("segments", ["left", "right", "middle", "packed"])
def test_a_sequence_gives_what_it_gives_alone(kind: dict[str, Any], segments: str) -> None:
    form, call = make_form(**kind), make_call(segments=segments)
    parameters = make_parameters(form)
    together = form.attend(call, form.numbers(call, parameters))
    torch.testing.assert_close(form.reference(call, form.numbers(call, parameters)), together, rtol=0, atol=1e-6)
    assert call.segments is not None
    assert together.masked_fill((call.segments > 0)[:, None, :, None], 0).abs().max() == 0
    for row in range(2):
        for run in range(1, int(call.segments.max()) + 1):
            at = call.segments[row] == run
            alone = Call(*(x[row : row + 1, :, at] for x in (call.query, call.key, call.value)), hidden=call.hidden[row : row + 1, at])
            expected = form.attend(alone, form.numbers(alone, parameters))
            torch.testing.assert_close(together[row : row + 1, :, at], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("cuts", [[1], [3, 4, 20, 21, 22], [12, 30]], ids=str)
def test_cut_anywhere(kind: dict[str, Any], segments: str | None, cuts: list[int]) -> None:
    """Pieces through the state, one token by `step`, and `advance`, which takes tokens in again, leaves the same state."""
    form, call = make_form(**kind), make_call(segments=segments)
    if segments == "packed":
        cuts = [at for at in cuts if at < 12]  # a piece begins with the sequence that the one before ended with
    parameters = make_parameters(form)
    numbers = form.numbers(call, parameters)
    whole = form.attend(call, numbers)
    outs, state = [], None
    for start, stop in zip([0, *cuts], [*cuts, 40], strict=True):
        piece = cut(call, start, stop)
        given = form.numbers(piece, parameters)
        again = None
        if not piece.is_packed:
            real = torch.ones(2, stop - start, dtype=torch.bool) if piece.segments is None else piece.segments
            again = form.advance(state, form.tokens(piece, given) | {"real": real[:, None]}, given, 4)
        if state is not None and stop == start + 1:
            outs.append(form.step(piece, given, state))
        else:
            out, state = form.attend_from(piece, given, state)
            outs.append(out)
        for name, x in (again or {}).items():
            seen = int(state["seen"].min())
            if name in ("sums", "seen") or seen >= 7:
                torch.testing.assert_close(x, state[name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=0, atol=1e-6)
    layout = form.layout(Sizes(4, 2, 8, 6), torch.float64)
    assert {name: (tuple(x.shape[1:]), x.dtype) for name, x in state.items()} == layout


def test_nothing_at_padding_reaches_a_token() -> None:
    form = make_form(**KINDS[-1])
    parameters, results = make_parameters(form), []
    for filler in (0.0, float("nan")):
        call = make_call(segments="middle")
        padding = ~call.segments[:, None, :, None]
        call = Call(*(x.masked_fill(padding, filler) for x in (call.query, call.key, call.value)), call.segments,
                    hidden=call.hidden.masked_fill(padding[:, 0], filler))  # fmt: skip
        results.append(form.attend_from(call, form.numbers(call, parameters), None))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


# ---- in a model


def windowed(name: str = "llama", **options: Any) -> Any:
    return learned_model(name, **{"form": "window", "window": 5, "sinks": 2, **options})


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pieces_through_a_cache_give_the_whole(kind: dict[str, Any]) -> None:
    assert check_pieces_give_the_whole(windowed(**kind))["key"].shape[2] == 7


@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_tokens_are_taken_back(kind: dict[str, Any]) -> None:
    check_tokens_are_taken_back(windowed(**kind))


def generated(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0, **kwargs)[:, ids.shape[1] :]


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids=str)
def test_generates_what_full_passes_say(kind: dict[str, Any]) -> None:
    """Alone, left-padded, in a static cache, with beams and with a draft: token for token."""
    model, ids = windowed(**kind), tiny_tokens()[:1, :12]
    alone = generated(model, ids)
    so_far = ids
    for _ in range(9):
        with torch.no_grad():
            so_far = torch.cat([so_far, model(so_far, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(alone, so_far[:, 12:])
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    beside = torch.cat([padded, tiny_tokens(seed=5)[:1, :16]])
    mask = torch.ones_like(beside)
    mask[0, :4] = 0
    assert torch.equal(generated(model, beside, attention_mask=mask)[:1], alone)
    assert torch.equal(generated(model, ids, cache_implementation="static", disable_compile=True), alone)
    assert torch.equal(generated(model, ids, prompt_lookup_num_tokens=3), alone)
    with_cache, without = (generated(model, ids, num_beams=3, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_packed_sequences_are_apart() -> None:
    model, ids = windowed(**KINDS[-1]), tiny_tokens()[:1, :23]
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(ids[:, :9], use_cache=False).logits, model(ids[:, 9:], use_cache=False).logits], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_a_compiled_step_is_one_graph() -> None:
    model, ids = windowed(**KINDS[-1]), tiny_tokens()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=32)
    feed(model, ids[:, :14], cache, [14])
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    addresses = [x.data_ptr() for layer in cache.layers for x in layer.state.values()]
    with torch.no_grad():
        outs = [step(ids[:, t : t + 1], past_key_values=cache).logits for t in range(14, 18)]
    torch.testing.assert_close(torch.cat(outs, 1), full[:, 14:18], atol=1e-5, rtol=0)
    assert [x.data_ptr() for layer in cache.layers for x in layer.state.values()] == addresses


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trains_under_autocast(compiled: bool) -> None:
    model, ids = windowed(**KINDS[-1]), tiny_tokens()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    expected = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, list(model.parameters()))
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(ids, labels=ids, use_cache=False).loss
    found = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), grad, right in zip(model.named_parameters(), found, expected, strict=True):
        assert (grad - right).norm() <= 0.1 * right.norm() + 1e-3, name


class Launches(TorchDispatchMode):
    """Counts the operators that a GPU would be given kernels for: all but views and memory that nothing is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in operator._schema.returns)
        self.count += not is_view and not any(word in operator.__name__ for word in ("empty", "_unsafe_view"))
        return operator(*args, **(kwargs or {}))


def test_training_takes_few_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host, which starts them, is what a training step waits for."""
    monkeypatch.setattr(hf_linattn.ops.checks, "values_are_readable", lambda x: False)  # on a GPU they are not looked at
    form = make_form(decay="key_head", gate="token", kernel="quadratic", features=3)
    parameters = make_parameters(form, torch.float32)
    query, key, value = make_tensors(40, value_dim=8, dtype=torch.bfloat16)  # as wide as keys: softmax is one operator on the CPU too
    call = make_call(dtype=torch.bfloat16)._replace(query=query, key=key, value=value)
    form.attend(call, form.numbers(call, parameters))  # masks and constants are made once
    with Launches() as forward:
        out = form.attend(call, form.numbers(call, parameters))
    with Launches() as backward:
        out.backward(torch.ones_like(out))
    print(forward.count, backward.count)
    assert forward.count <= 30 and backward.count <= 50


def test_pieces_under_autocast() -> None:
    model, ids = windowed(**KINDS[-1]), tiny_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            full = model(ids, use_cache=False).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
            torch.testing.assert_close(feed(model, ids, cache, [8, 1, 1, 13]), full, atol=0.05, rtol=0)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, ids = windowed(**KINDS[-1]), tiny_tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert LinAttnConfig.of(loaded.config).attention.describe() == (
        "window 5 + 2, gate per token, beside quadratic with decay per token, features=3, input gate per token, output norm and gate"
    )


def test_a_model_of_softmax_takes_it_as_it_is() -> None:
    """No new parameters: the untrained window, and beside a polynomial with its fixed gate."""
    ids = tiny_tokens()
    for options in ({"beside": "none"}, {}, {"decay": "head"}):
        model = tiny_model("llama", form="window", window=5, sinks=2, **options)
        with torch.no_grad():
            full = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        torch.testing.assert_close(feed(model, ids, cache, [8, 1, 1, 13]), full, atol=1e-5, rtol=0)


def test_the_window_is_dropped_for_some_heads_in_training() -> None:
    """A head without its window gives what the polynomial gives, but where nothing lies before the window; the others stay as they are."""
    form, call = make_form(), make_call()
    numbers = form.numbers(call, None)
    both, far = form.attend(call, numbers), form.attend(call, numbers | {"gate": 0.0})
    torch.manual_seed(0)
    dropped = form.attend(make_call(drop=torch.tensor(0.5)), numbers)
    is_dropped = torch.isclose(dropped, far).flatten(2).all(-1)
    assert 0 < is_dropped.sum() < 8
    torch.testing.assert_close(dropped, torch.where(is_dropped[..., None, None], far, both))
    torch.testing.assert_close(form.attend(make_call(drop=1.0), numbers), far)


def test_set_window_drop() -> None:
    model, ids = windowed(**KINDS[-1]), tiny_tokens()
    with torch.no_grad():
        plain = model(ids).logits
        set_window_drop(model, 0.7)
        kept = model.model.layers[0].self_attn.linattn_window_drop
        assert torch.equal(model(ids).logits, plain)
        assert not torch.allclose(model.train()(ids).logits, plain)
        set_window_drop(model, 0.0)
        torch.testing.assert_close(model(ids).logits, plain)
    assert model.model.layers[0].self_attn.linattn_window_drop is kept
    callback = WindowDropCallback(DropoutSchedule("linear", 0.5, 10))
    callback.on_step_begin(None, SimpleNamespace(global_step=4), None, model=model)
    assert kept.item() == pytest.approx(0.3)
    for p in (0.0, 1.0):
        set_window_drop(model, p)
        assert kept.item() == p
    for p in (1.00001, -0.00001, float("nan")):
        with pytest.raises(ValueError, match="must be from 0 to 1"):
            set_window_drop(model, p)
    for other in (windowed(beside="none"), learned_model()):
        with pytest.raises(ValueError, match="no window beside another attention"):
            set_window_drop(other, 0.1)


def test_noise_is_on_the_mix() -> None:
    form, call = make_form(), make_call(noise={"dropout_p": 0.3, "dropout_kind": "paper"})
    numbers = form.numbers(call, None)
    torch.manual_seed(0)
    noisy = torch.stack([form.attend(call, numbers) for _ in range(200)])
    out = form.attend(make_call(), numbers)
    assert ((noisy.mean(0) - 0.7 * out).abs().max() / out.abs().max()).item() < 0.15
    torch.testing.assert_close(noisy.std(0), 0.7 * 0.3**0.5 * out.abs(), rtol=0.3, atol=1e-3)


def test_a_ring_is_not_exported() -> None:
    model = windowed(beside="none")
    cache = StaticCache(config=model.config, max_cache_len=32)
    feed(model, tiny_tokens(1, 4), cache, [4])

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, past_key_values=cache).logits

    with torch.no_grad(), pytest.raises(Exception, match="carries one tensor a cache layer"):
        torch.export.export(Decoder(), (tiny_tokens(1, 1),), strict=False)


class Forward(torch.nn.Module):
    """One layer's model without a cache."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.model = windowed(**options)
        self.model.model.layers, self.model.config.num_hidden_layers = self.model.model.layers[:1], 1
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@torch.no_grad()
def test_a_forward_pass_is_exported() -> None:
    """For lengths beyond the window, W + 2 or more: shorter ones are another graph."""
    plain = Forward()
    length = torch.export.Dim("length", min=7, max=64)
    program = torch.export.export(plain, (tiny_tokens(1, 9),), dynamic_shapes={"ids": {1: length}}, strict=False).module()
    for ids in (tiny_tokens(1, 7), tiny_tokens(1, 23)):
        torch.testing.assert_close(program(ids), plain(ids), atol=1e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_takes_the_formula_over_all_pairs() -> None:
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    plain, ids = Forward(**KINDS[-1]), tiny_tokens(2, 13)
    shapes = {"ids": {1: torch.export.Dim("length", min=2, max=256)}}
    exported = torch.onnx.export(plain, (tiny_tokens(2, 9),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    (out,) = evaluator(exported.model_proto).run(None, {exported.model_proto.graph.input[0].name: ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), plain(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
@torch.no_grad()
def test_what_onnx_takes_is_summed_in_float32_or_wider(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    form = make_form(**kind)
    numbers = form.numbers(make_call(), make_parameters(form))
    monkeypatch.setattr(hf_linattn.forms.window, "is_for_onnx", lambda has_state_or_noise: not has_state_or_noise)
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), *[(x, x) for x in (torch.float32, torch.float64)]):
        call = make_call(dtype=dtype)
        wider = Call(*(x.to(wide) for x in (call.query, call.key, call.value)))
        found = form.attend(call, numbers)
        assert found.dtype == dtype and torch.equal(found, form.reference(wider, numbers).to(dtype))


def test_calibration_reads_the_gate_off_the_teacher() -> None:
    """The share of its weight on what the window and the sinks see, kept from 0.02 to 0.98; rates of what lies before the window."""
    form = make_form(decay="head")
    parameters = form.parameters(Sizes(4, 2, 8, 6, 12), True)
    mass = torch.zeros(4, 30, dtype=torch.float64)
    mass[0, 0], mass[1, 20], mass[2, [1, 9]], mass[3, 25] = 1.0, 1.0, 0.3, 0.2
    sinks = torch.tensor([0.0, 0.0, 0.0, 0.8], dtype=torch.float64)
    seen = Seen(torch.ones(4, 8, 8).double(), torch.zeros(2, 8).double(), torch.eye(8).double().expand(2, 8, 8), mass, sinks)
    with torch.no_grad():
        form.calibrate(parameters, seen)
    numbers = parameters()
    torch.testing.assert_close(numbers["gate"], torch.tensor([0.98, 0.02, 0.5, 0.8]))
    torch.testing.assert_close(-1 / numbers["log_decay"][1:], torch.tensor([15.0, 4.0, 20.0]))


@pytest.mark.parametrize("options, error, words", [
    ({"window": 0}, ValueError, "window must be 1 or more"),
    ({"sinks": -1}, ValueError, "sinks must be 0 or more"),
    ({"window": 4.5}, TypeError, "window must be a whole number"),
    ({"gate": "layer"}, ValueError, "gate='layer' is unknown"),
    ({"beside": "softmax"}, ValueError, "beside='softmax' is unknown"),
    ({"b": 3.0}, ValueError, "weight go below 0"),
])  # fmt: skip
def test_options_out_of_bounds(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LinAttnConfig(form="window", **options)


def test_what_a_window_has_not_is_refused() -> None:
    call = make_call()
    with pytest.raises(ValueError, match="is causal, and this layer sees ahead"):
        make_form().attend(Call(call.query, call.key, call.value, causal=False), {})
    noise = {"dropout_p": 0.1, "dropout_kind": "moment"}
    with pytest.raises(ValueError, match="dropout_kind='moment' is of form"):
        make_form().attend(make_call(noise=noise), {"gate": 0.5})
    with pytest.raises(ValueError, match="only converted checkpoints are"):
        make_form(gate="token").numbers(call, None)
    with pytest.raises(ValueError, match="it needs learnable=true"):
        make_form(gate="token").parameters(Sizes(4, 2, 8, 6, 12), False)
    with pytest.raises(ValueError, match="width of the hidden states"):
        make_form(gate="token").parameters(Sizes(4, 2, 8, 6), True)
    with pytest.raises(ValueError, match="none were seen to enter it"):
        make_form(gate="token").parameters(Sizes(4, 2, 8, 6, 12), True)()
