"""The kernel of a few new tokens on the CPU, by the emulator: at the accuracy bar."""

import pytest
import torch
from accuracy_bar import assert_bar, compare, distance, operator_case, paths_of
from emulation import build
from step_cases import SEVERAL, cancelling_case, check_step, step_case

from hf_linattn.ops import chunked, cuda, one_token
from hf_linattn.ops.call import Call
from hf_linattn.ops.known import Launches

pytestmark = [
    pytest.mark.skipif(build.compiler() is None or build.headers() is None, reason="needs g++ or clang++, and CUDA's headers"),
    pytest.mark.timeout(1200),
]
SMALL = {"batch": 1, "heads": 2, "key_heads": 1, "head_dim": 32, "value_dim": 32, "device": "cpu", "stateful": True}
WIDE, OF_128 = {"head_dim": 64, "value_dim": 64}, {"head_dim": 128, "value_dim": 128}


BY_TILES = [
    {"heads": 1, "key_heads": 1, "length": 9}, {"heads": 5, "key_heads": 1, "length": 8}, {"heads": 8, "key_heads": 1, "length": 16},
    {"heads": 4, "key_heads": 2, "state_heads": 4, "length": 16}, {"heads": 4, "key_heads": 1, "length": 7, **OF_128},
    {"heads": 2, "key_heads": 2, "length": 10, **OF_128}, {"degree": 2, "heads": 1, "key_heads": 1, "length": 6},
    {"degree": 2, "heads": 2, "key_heads": 1, "length": 16}, {"degree": 2, "heads": 3, "key_heads": 1, "length": 16},
    {"degree": 2, "heads": 8, "key_heads": 1, "length": 8}, {"degree": 2, "heads": 8, "key_heads": 1, "length": 16},
    {"degree": 2, "heads": 9, "key_heads": 1, "length": 16},
]  # fmt: skip
"""From one tile of 16 pairs of a head and a token to as many as are worked on at once, and one more."""


def in_double(call: Call) -> Call:
    return Call(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in call))


def part(call: Call, begin: int, end: int, state: torch.Tensor | None) -> Call:
    """Some tokens of a call, on a state."""
    rate = call.log_decay if call.log_decay is None or call.log_decay.dim() == 1 else call.log_decay[:, :, begin:end]
    runs = [None if x is None else x[:, begin:end] for x in (call.query_segments, call.key_segments)]
    rows = (x[:, :, begin:end] for x in (call.query, call.key, call.value))
    return Call(*rows, call.coefficients, rate, *runs, state, degree=call.degree, normalize_qk=call.normalize_qk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SEVERAL, ids=str)
def test_in_place(kernels, dtype, kind):
    check_step(dtype, **kind)


@pytest.mark.parametrize("kind", SEVERAL, ids=str)
def test_in_place_out_of_place_and_one_after_the_other(kernels, kind):
    """In the same bits but for the last, which adds up in another order."""
    call, state = step_case(torch.bfloat16, **kind)
    out, mass, after = cuda.forward(part(call, 0, kind["length"], state), True)
    before, outs, masses = state.clone(), [], []
    for t in range(kind["length"]):
        one, of_one, before = cuda.forward(part(call, t, t + 1, before), True)
        outs.append(one), masses.append(of_one)
    torch.testing.assert_close(torch.cat(outs, 2), out, rtol=0.02, atol=0.005)
    for one_by_one, together in ((torch.cat(masses, 2), mass), (before, after)):
        torch.testing.assert_close(one_by_one, together, rtol=1e-4, atol=1e-5)
    assert torch.equal(cuda.step(call, state), out) and torch.equal(state, after)


@pytest.mark.parametrize("kind", BY_TILES, ids=str)
def test_as_many_pairs_as_a_state_has(kernels, kind):
    kind = {"batch": 1, "decay": "head"} | kind
    check_step(torch.bfloat16, **kind)
    call, state = step_case(torch.bfloat16, **kind)
    call = call._replace(initial_state=state)
    mass, exact = cuda.forward(call, True)[1], chunked.forward(in_double(call), True)[1]
    assert distance(mass, exact) < (1e-4 if kind["heads"] < 9 else 1e-3)  # the last is not by units


@pytest.mark.parametrize("dtype, degree, dim", [
    (torch.float32, 1, 32), (torch.float32, 2, 32), (torch.float16, 1, 32), (torch.float16, 2, 32),
    (torch.bfloat16, 1, 64), (torch.bfloat16, 2, 64), (torch.bfloat16, 1, 128),
], ids=str)  # fmt: skip
def test_terms_that_cancel(kernels, dtype, degree, dim):
    """Keys that lie together, and queries that face away: f(s) = (1 + s)^degree is a difference of what the state says."""
    call = cancelling_case(dtype, degree, dim)
    ours, plain, exact = cuda.forward(call, True), chunked.forward(call, True), chunked.forward(in_double(call), True)
    assert_bar("out", ours[0], plain[0], exact[0], 2, dtype)


def test_small_states_that_are_many(kernels):
    """By blocks of fewer warps."""
    many = {"batch": 55, "heads": 4, "key_heads": 2, "state_heads": 4}
    check_step(torch.bfloat16, length=5, head_dim=24, value_dim=32, decay="token", padded=True, **many)


@pytest.mark.parametrize("dtype, length, kind", [
    (torch.float32, 16, {"decay": "key_head"}), (torch.bfloat16, 2, {}), (torch.bfloat16, 1, {"decay": "query_head"}),
    (torch.bfloat16, 12, {"segments": "packed", "decay": "query_token", "heads": 4, "key_heads": 2, "batch": 2}),
    (torch.bfloat16, 11, {"segments": "middle", "decay": "key_token", "batch": 3}), (torch.float16, 5, {"segments": "left", "batch": 2}),
    (torch.float32, 9, {"degree": 2, "decay": "query_token", "heads": 2, "key_heads": 2, "segments": "packed"}),
    (torch.bfloat16, 16, {"heads": 12, "key_heads": 1, "head_dim": 24, "value_dim": 40}),
], ids=str)  # fmt: skip
def test_with_gradients(kernels, dtype, length, kind):
    """Forward, and a backward of another engine from its masses."""
    kind = SMALL | {"length": length} | kind
    assert paths_of(dtype, **kind)[0] == "tokens"
    compare(dtype, **kind)


@pytest.mark.parametrize("heads, length", [(2, 16), (8, 8)])
def test_what_a_kernel_declares_counts_where_shared_memory_is_small(kernels, monkeypatch, heads, length):
    """What launches of the kernels for head dims of 128 ask for would fit here, but not with what these declare: 3 and 6 KB."""
    monkeypatch.setenv("EMULATED_SHARED_KB", "99")
    kind = {"batch": 1, "heads": heads, "key_heads": 1, "length": length, **OF_128}
    call, state = step_case(torch.bfloat16, **kind)
    plan = cuda._Launch(call).plan("step", cuda._ForwardResult(cuda._describe(call.empty_out()), None, state.data_ptr()))
    assert 0 < plan.shared_bytes <= (99 - 6) * 1024
    check_step(torch.bfloat16, **kind)


@pytest.mark.parametrize("length, state, asked, path", [
    (16, True, True, "tokens"), (16, True, False, "tokens"), (16, False, True, "tokens"), (16, False, False, "stream"),
    (17, True, True, "stream"),
])  # fmt: skip
def test_which_calls(kernels, length, state, asked, path):
    x, before = torch.empty(1, 2, length, 64, dtype=torch.bfloat16), torch.empty(1, 2, 65, 65) if state else None
    kind = {"initial_state": before, "return_state": asked}
    assert cuda.paths(x, x, x, **kind)[0] == path
    assert "tokens" not in cuda.paths(x, x, x, **kind, dropout_p=torch.tensor(0.1))
    if not asked:
        assert "tokens" not in cuda.paths(x, x, x, causal=False, **kind)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("dtype, degree", [(torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 2)], ids=str)
def test_a_state_that_is_not_given_or_not_asked_for(kernels, given, asked, dtype, degree):
    call, state = step_case(dtype, length=6, decay="head", degree=degree)
    call = part(call, 0, 6, state if given else None)
    for name, ours, plain in zip(("out", "mass", "state"), cuda.forward(call, asked), chunked.forward(call, asked), strict=True):
        if ours is not None or plain is not None:
            assert_bar(name, ours, plain, plain.double(), 2, dtype)


@pytest.mark.parametrize("behind", [1, 3])
@pytest.mark.parametrize("degree", [1, 2])
def test_states_off_a_boundary_of_16_bytes(kernels, degree, behind):
    """Both as far from one, or not: the same numbers but for their last place."""
    call, state = step_case(torch.bfloat16, length=5, degree=degree, decay="token")
    out, _, after = cuda.forward(call._replace(initial_state=state), True)
    apart = torch.empty(state.numel() + behind)[behind:].view(state.shape).copy_(state)
    elsewhere, _, after_elsewhere = cuda.forward(call._replace(initial_state=apart), True)
    torch.testing.assert_close(elsewhere, out, rtol=0.02, atol=0.005)
    torch.testing.assert_close(after_elsewhere, after, rtol=1e-5, atol=1e-5)
    assert torch.equal(cuda.step(call, apart), out) and torch.equal(apart, after)


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("behind", [0, 1, 2, 3])
def test_units_of_products_and_of_single_numbers_one_after_the_other(kernels, monkeypatch, behind, heads):
    """They lie differently among 16 bytes, and where blocks share no state a warp sends for the one behind the other."""
    monkeypatch.setenv("EMULATED_PROCESSORS", "1")
    call, state = step_case(torch.bfloat16, length=9, degree=2, heads=heads, key_heads=1, batch=1)
    exact, plain = state.double(), state.clone()
    one_token.step(in_double(call), exact), one_token.step(call, plain)
    place = torch.empty(state.numel() + behind)[behind:].view(state.shape).copy_(state)
    cuda.step(call, place)
    assert_bar("state", place, plain, exact, 2, torch.float32)


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("dtype, kind", [(torch.float32, {}), (torch.bfloat16, WIDE), (torch.bfloat16, WIDE | {"degree": 2})], ids=str)
def test_queries_of_another_run_than_the_keys(kernels, lag, dtype, kind):
    """A lag shifts the tokens against each other: a query whose run has no key yet sees nothing."""
    inputs, _ = operator_case(dtype, **SMALL | {"length": 16, "segments": "packed"} | kind)
    query, key, value, coefficients, _, runs, _, state, *_ = inputs
    count = 16 - lag
    rows = query[:, :, lag:], key[:, :, :count], value[:, :, :count]
    call = Call(*(x.contiguous() for x in rows), coefficients, None, runs[:, lag:], runs[:, :count], state, degree=kind.get("degree", 1))
    for name, ours, plain in zip(("out", "mass", "state"), cuda.forward(call, True), chunked.forward(call, True), strict=True):
        assert_bar(name, ours, plain, plain.double(), 2, dtype)


@pytest.mark.parametrize("kind", [{"decay": "token", "padded": True}, {"degree": 2, "heads": 12, "key_heads": 1}], ids=str)
def test_nothing_at_padding_is_read_and_warps_take_any_turn(kernels, kind):
    call, state = step_case(torch.bfloat16, length=8, **kind)
    first = state.clone()
    out = cuda.step(call, first)
    if call.key_segments is not None:
        padding = (call.key_segments <= 0)[:, None, :, None]
        query, key, value = (x.masked_fill(padding, float("nan")) for x in (call.query, call.key, call.value))
        call = call._replace(query=query, key=key, value=value)
    again = state.clone()
    assert torch.equal(cuda.step(call, again), out) and torch.equal(again, first)


@pytest.mark.parametrize("kind", [{"decay": "head"}, {"degree": 2, "heads": 4, "key_heads": 2, "batch": 2}, {"decay": "token"}], ids=str)
def test_a_step_that_is_launched_as_the_one_before(kernels, kind, monkeypatch):
    """Other tensors in the same layout, and another layout, give what they give without one before."""
    call, first = step_case(torch.bfloat16, length=1, **kind)
    states, known = [first.clone(), first.clone()], cuda._steps
    others = [{}, {}, {"coefficients": call.coefficients * 0.5}, {"query": call.query.repeat(1, 1, 1, 2)[..., : call.query.shape[-1]]}, {}]
    if call.log_decay is not None:
        others.append({"log_decay": call.log_decay * 2})
    for other in others:
        new = {name: torch.randn_like(getattr(call, name)) for name in ("query", "key", "value")}
        call = call._replace(**new | other)
        anew = cuda.step(call, states[0])
        monkeypatch.setattr(cuda, "_steps", known)
        assert torch.equal(cuda.step(call, states[1]), anew) and torch.equal(*states)
        monkeypatch.setattr(cuda, "_steps", Launches())
        states[1] = states[1].clone()  # elsewhere in memory
    assert len(known) == 2


def test_a_strided_state_is_written_in_place(kernels):
    call, state = step_case(torch.float32, length=3)
    wide = torch.zeros(*state.shape[:-1], 2 * state.shape[-1])
    wide[..., ::2] = state
    assert torch.equal(cuda.step(call, wide[..., ::2]), cuda.step(call, state))
    assert torch.equal(wide[..., ::2], state) and not wide[..., 1::2].any()


def test_more_than_16_tokens_are_refused(kernels):
    x = torch.empty(1, 2, 17, 64)
    launch, out = cuda._Launch(Call(x, x, x, torch.ones(4, 2))), cuda._describe(x)
    assert launch.plan("step", cuda._ForwardResult(out, None, x.data_ptr())).engine == 0
