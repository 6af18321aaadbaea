"""The operators as PyTorch sees them: opcheck, compile, export, autocast, checkpointing."""

import pytest
import torch
from operator_cases import gradients, make_inputs
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from hf_linattn import empty_state, linear_attention, linear_attention_step
from hf_linattn.ops import constants, operators, reference
from hf_linattn.ops.segments import canonical_segments


def operator_arguments(decay=None, segments=None, quadratic=False, state=False, noise=False, causal=True):
    (query, key, value), options = make_inputs(length=21, dtype=torch.float32, decay=decay, segments=segments, quadratic=quadratic)
    rows = [options["a"], options["b"], options.get("c", torch.zeros(4)), options["temperature"]]
    coefficients = torch.stack(rows).detach().requires_grad_()
    runs = canonical_segments(options["segment_ids"], 2, 21) if segments else None
    initial = torch.rand(2, 2, 45 if quadratic else 9, 7, requires_grad=True) if state else None
    p, seed = (torch.tensor(0.1), torch.tensor(3)) if noise else (None, None)
    tensors = query, key, value, coefficients, options.get("log_decay"), runs, runs, initial, p, seed
    return (*tensors, 2 if quadratic else 1, causal, True, state)


@pytest.mark.parametrize("case", [
    {}, {"decay": "query_token"}, {"segments": "packed"}, {"quadratic": True}, {"state": True}, {"noise": True}, {"causal": False},
    {"decay": "key_head", "state": True, "quadratic": True, "segments": "left"},
], ids=str)  # fmt: skip
def test_opcheck_forward(case):
    opcheck(torch.ops.linattn.forward.default, operator_arguments(**case))


@pytest.mark.parametrize("case", [{}, {"decay": "key_token", "state": True}], ids=str)
def test_opcheck_backward(case):
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in operator_arguments(**case)]
    out, mass, state = torch.ops.linattn.forward(*arguments)
    *tensors, degree, causal, normalize_qk, return_state = arguments
    grad_state = torch.rand_like(state) if return_state else None
    opcheck(
        torch.ops.linattn.backward.default,
        (*tensors, degree, causal, normalize_qk, out, mass, torch.rand_like(out), torch.rand_like(mass), grad_state),
    )


def test_opcheck_step_and_noise():
    query, key, value, coefficients, *_ = (x.detach() if isinstance(x, torch.Tensor) else x for x in operator_arguments())
    step = (query[:, :, :1], key[:, :, :1], value[:, :, :1], empty_state(2, 2, 8, 6), coefficients, None, None, 1, True)
    opcheck(torch.ops.linattn.step.default, step)
    opcheck(torch.ops.linattn.noise.default, (query.requires_grad_(), torch.tensor(0.2), torch.tensor(3)))


@pytest.mark.parametrize("options", [
    {"dropout_p": 0.1, "seed": 3}, {"decay": "key_head", "causal": False},
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ({"lag": 3, "segments": "packed"}, {"segments": "mask", "causal": False},
                                                              {"dropout_p": 0.1, "seed": 3, "dropout_kind": "moment"})),
], ids=str)  # fmt: skip
def test_compile_fullgraph_with_dynamic_shapes(options):
    options = dict(options)
    made = {name: options.pop(name, None) for name in ("decay", "segments")}
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x, **k: linear_attention(*x, **k, **options), fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (17, 41):
        tensors, given = make_inputs(length=length, dtype=torch.float32, **made)
        expected, expected_grads = gradients(lambda *x, **k: linear_attention(*x, **k, **options), tensors, given)
        out, grads = gradients(compiled, tensors, given)
        torch.testing.assert_close(out, expected)
        for name in grads:
            torch.testing.assert_close(grads[name], expected_grads[name])


def test_inductor_compiles_forward_backward_and_step():
    torch._dynamo.reset()
    tensors, _ = make_inputs(length=33, dtype=torch.float32, learned=False)
    compiled = torch.compile(lambda *x: linear_attention(*x).sin(), fullgraph=True)
    expected, expected_grads = gradients(lambda *x: linear_attention(*x).sin(), tensors, {})
    out, grads = gradients(compiled, tensors, {})
    torch.testing.assert_close(out, expected)
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name])
    one = [x[:, :, :1].detach() for x in tensors]
    states = empty_state(2, 2, 8, 6), empty_state(2, 2, 8, 6)
    step = torch.compile(linear_attention_step, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(step(*one, states[0]), linear_attention_step(*one, states[1]))
    torch.testing.assert_close(*states)


def test_a_schedule_does_not_recompile():
    torch._dynamo.reset()
    tensors, _ = make_inputs(length=20, dtype=torch.float32, learned=False, grad=False)
    counter = CompileCounter()
    compiled = torch.compile(lambda p: linear_attention(*tensors, dropout_p=p, seed=1), fullgraph=True, backend=counter)
    for p in (0.2, 0.1, 0.0):
        compiled(torch.tensor(p))
    assert counter.frame_count == 1


def test_export_keeps_the_operator_and_dynamic_shapes():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return linear_attention(query, key, value)

    tensors, _ = make_inputs(length=20, dtype=torch.float32, learned=False, grad=False)
    length, batch = torch.export.Dim("length", min=2), torch.export.Dim("batch", min=2)
    shapes = {name: {0: batch, 2: length} for name in ("query", "key", "value")}
    program = torch.export.export(Attention(), tuple(tensors), dynamic_shapes=shapes)
    assert any("linattn" in str(node.target) for node in program.graph.nodes)
    others, _ = make_inputs(batch=3, length=51, dtype=torch.float32, learned=False, grad=False)
    torch.testing.assert_close(program.module()(*others), linear_attention(*others))


class Watched(torch.utils._python_dispatch.TorchDispatchMode):
    """Names the operators of ours that pass torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names += [function.name()] if "linattn" in function.name() else []
        return function(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    calls = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def operators_recorded(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return [event.key for event in profile.key_averages() if "linattn" in event.key]


def test_the_dispatcher_is_passed_where_something_watches_and_only_there():
    (query, key, value), _ = make_inputs(length=9, dtype=torch.float32, learned=False)
    run = lambda *x: linear_attention(*x).sum().backward()  # noqa: E731
    assert operators_recorded(lambda: run(query, key, value)) == []
    with Watched() as mode:
        run(query, key, value)
    assert mode.names == ["linattn::forward", "linattn::backward"]
    linear_attention(query, key.as_subclass(Marked), value)
    assert any("linattn.forward" in name for name in Marked.calls)
    mapped = [x.detach()[None] for x in (query, key, value)]
    assert operators_recorded(lambda: torch.vmap(linear_attention)(*mapped))


def test_what_nobody_used_asks_for_no_gradient(monkeypatch):
    """Of the mass and of a state that is not looked at, backward is given None, and computes nothing for them."""
    given, backward = [], operators._BACKWARD["cpu"]
    monkeypatch.setitem(operators._BACKWARD, "cpu", lambda call, *rest: given.append(rest[2:]) or backward(call, *rest))
    tensors, options = make_inputs(dtype=torch.float32)
    out, state = linear_attention(*tensors, **options, return_state=True)
    torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    torch.autograd.grad(state.sum(), tensors[1:])
    assert [[x is None for x in gradients] for gradients in given] == [[False, True, True], [False, True, False]]


def test_views_of_conjugates():
    x = torch.complex(*torch.randn(2, 1, 2, 5, 8)).conj().imag
    assert x.is_neg() and operators_recorded(lambda: linear_attention(x, x, x))  # the dispatcher resolves them
    torch.testing.assert_close(linear_attention(x, x, x), linear_attention(*[x.resolve_neg()] * 3))


def test_what_escaped_a_transform():
    """Its numbers are reached through the dispatcher, as it has no memory of its own."""
    escaped, (query, key, value) = [], torch.randn(3, 1, 2, 5, 8)
    torch.func.grad(lambda x: escaped.append(x) or x.sum())(query)
    with torch.no_grad():
        assert operators_recorded(lambda: linear_attention(escaped[0], key, value))
    value.requires_grad_()
    found = [torch.autograd.grad(linear_attention(x, key, value).square().sum(), value) for x in (escaped[0], query)]
    torch.testing.assert_close(*found)


def test_a_second_derivative_is_refused():
    tensors, _ = make_inputs(length=9, learned=False)
    with pytest.raises(RuntimeError, match="no second derivative.*create_graph"):
        torch.autograd.grad(linear_attention(*tensors).square().sum(), tensors, create_graph=True)


def test_autocast_brings_mixed_inputs_to_its_dtype():
    (query, key, value), options = make_inputs(length=20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_attention(query, key, value.bfloat16(), **options)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, linear_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), **options))
    out.sum().backward()
    assert query.grad.dtype == torch.float32 and options["a"].grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    tensors, options = make_inputs(length=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_attention(*tensors, **options)
    assert out.dtype == torch.float64 and torch.equal(out, linear_attention(*tensors, **options))


def test_gradient_checkpointing_draws_the_same_noise():
    tensors, _ = make_inputs(length=30, learned=False, dtype=torch.float32)
    results = []
    for run in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(0)
        out = run(lambda *x: linear_attention(*x, dropout_p=0.2), *tensors)
        results.append((out, *torch.autograd.grad(out.sum(), tensors)))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_coefficients_are_kept_for_a_shape_and_not_for_ever():
    constants._constants.clear()
    for heads in (4, 2, 4):
        query, key, value = torch.randn(3, 1, heads, 5, 8).unbind()
        torch.testing.assert_close(linear_attention(query, key, value, b=0.3), reference(query, key, value, b=0.3))
    assert len(constants._constants) == 2
    for number in range(600):
        linear_attention(query, key, value, b=number / 1000)
    assert len(constants._constants) <= 256


def test_coefficients_made_in_inference_mode_serve_training():
    tensors, _ = make_inputs(length=9, learned=False, dtype=torch.float32)
    with torch.inference_mode():
        linear_attention(*tensors, a=1.37)
    linear_attention(*tensors, a=1.37).sum().backward()
    assert tensors[0].grad is not None


def test_meta_device():
    tensors = [torch.empty(2, 4, 9, 8, device="meta") for _ in range(3)]
    out, state = linear_attention(*tensors, return_state=True)
    assert out.device.type == "meta" and state.shape == (2, 4, 9, 9)
    for kind, causal in (("paper", True), ("moment", True), ("moment", False)):  # within the kernel and outside
        out = linear_attention(*tensors, causal=causal, dropout_p=0.1, dropout_kind=kind, seed=1)
        assert out.device.type == "meta" and out.shape == (2, 4, 9, 8)
