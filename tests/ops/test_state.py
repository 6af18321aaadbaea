"""State in, state out: a sequence cut anywhere gives what the whole gives, with its gradients, and so does one token at a time."""

import pytest
import torch
from operator_cases import make_inputs

from hf_linattn import empty_state, linear_attention, linear_attention_step
from hf_linattn.ops import chunked, operators

DECAYS = (None, "key_head", "query_head", "key_token", "query_token")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 16)


def cut(options, start, stop, state_from=None):
    """The options of one piece of the sequence."""
    pieces = dict(options)
    if "log_decay" in options and options["log_decay"].dim() == 3:
        pieces["log_decay"] = options["log_decay"][:, :, start:stop]
    if "segment_ids" in options:
        pieces["segment_ids"] = options["segment_ids"][:, start:stop]
    return pieces


def in_pieces(tensors, options, cuts, lag=0, **fixed):
    query, key, value = tensors
    outs, state = [], None
    for start, stop in zip([0, *cuts], [*cuts, query.shape[2]], strict=True):
        front = max(start - lag, 0) if state is not None else start
        out, state = linear_attention(query[:, :, start:stop], key[:, :, front:stop], value[:, :, front:stop], **cut(options, front, stop),
                                      lag=lag, initial_state=state, return_state=True, **fixed)  # fmt: skip
        outs.append(out)
    return torch.cat(outs, 2), state


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("quadratic", [False, True])
def test_cut_anywhere(decay, quadratic):
    tensors, options = make_inputs(length=53, decay=decay, quadratic=quadratic)
    leaves = [*tensors, *[x for x in options.values() if isinstance(x, torch.Tensor)]]
    whole, state = linear_attention(*tensors, **options, return_state=True)
    weight, state_weight = torch.randn_like(whole), torch.randn_like(state)
    expected = torch.autograd.grad((whole * weight).sum() + (state * state_weight).sum(), leaves)
    for cuts in ([1], [16, 32], [5, 20, 21, 50], [52]):
        out, last = in_pieces(tensors, options, cuts)
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-11)
        torch.testing.assert_close(last, state, rtol=0, atol=1e-11)
        grads = torch.autograd.grad((out * weight).sum() + (last * state_weight).sum(), leaves)
        for grad, right in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("segments", ["left", "right", "middle", "mask"])
def test_cut_with_padding(segments):
    """A padded row's state is that of its tokens, wherever the padding lies and wherever the row is cut."""
    tensors, options = make_inputs(length=53, decay="key_token", segments=segments)
    whole, state = linear_attention(*tensors, **options, return_state=True)
    for cuts in ([3], [20, 40], [27, 30, 31]):
        out, last = in_pieces(tensors, options, cuts)
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-11)
        torch.testing.assert_close(last, state, rtol=0, atol=1e-11)


def test_state_is_that_of_the_last_segment():
    tensors, options = make_inputs(length=40, segments=None)
    ids = torch.ones(2, 40, dtype=torch.long)
    ids[:, 25:] = 2
    _, state = linear_attention(*tensors, **options, segment_ids=ids, return_state=True)
    _, alone = linear_attention(*(x[:, :, 25:] for x in tensors), **options, return_state=True)
    torch.testing.assert_close(state, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lag", [1, 5, 20])
@pytest.mark.parametrize("segments", [None, "left"])
def test_cut_with_lag(lag, segments):
    tensors, options = make_inputs(length=53, decay="query_token", segments=segments)
    whole = linear_attention(*tensors, **options, lag=lag)
    out, _ = in_pieces(tensors, options, [24, 30, 45], lag=lag)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-11)


def test_state_holds_the_sums_it_says():
    """S, z, sum of v and the count, in the rows and columns that the documentation names; states without decay add."""
    tensors, _ = make_inputs(length=30, learned=False)
    _, key, value = tensors
    _, state = linear_attention(*tensors, return_state=True)
    unit = key / key.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(state[..., :8, :6], unit.mT @ value)
    torch.testing.assert_close(state[..., :8, 6], unit.sum(2))
    torch.testing.assert_close(state[..., 8, :6], value.sum(2))
    torch.testing.assert_close(state[..., 8, 6], torch.full((2, 2), 30.0, dtype=torch.float64))
    halves = [linear_attention(*(x[:, :, part] for x in tensors), return_state=True)[1] for part in (slice(0, 11), slice(11, 30))]
    torch.testing.assert_close(sum(halves), state)


def test_bidirectional_state_is_added_to_what_every_token_sees():
    tensors, _ = make_inputs(length=30, learned=False)
    query, key, value = tensors
    whole, state = linear_attention(*tensors, causal=False, return_state=True)
    _, past = linear_attention(*(x[:, :, :12] for x in tensors), causal=False, return_state=True)
    out, last = linear_attention(*(x[:, :, 12:] for x in tensors), causal=False, initial_state=past, return_state=True)
    torch.testing.assert_close(out, whole[:, :, 12:])
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("quadratic", [False, True])
def test_one_token_at_a_time(decay, quadratic):
    tensors, options = make_inputs(length=23, decay=decay, quadratic=quadratic, grad=False)
    whole, last = linear_attention(*tensors, **options, return_state=True)
    heads = 4 if decay in ("query_head", "query_token") else 2
    state = empty_state(2, heads, 8, 6, degree=2 if quadratic else 1, dtype=torch.float64)
    outs = [linear_attention_step(*(x[:, :, t : t + 1] for x in tensors), state, **cut(options, t, t + 1)) for t in range(23)]
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=0, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-11)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("segments", [None, "middle"])
def test_a_few_tokens_at_a_time(decay, quadratic, segments):
    tensors, options = make_inputs(length=23, decay=decay, quadratic=quadratic, segments=segments, grad=False)
    whole, last = linear_attention(*tensors, **options, return_state=True)
    heads = 4 if decay in ("query_head", "query_token") else 2
    state, outs = empty_state(2, heads, 8, 6, degree=2 if quadratic else 1, dtype=torch.float64), []
    ends = [2, 3, 7, 23]
    for start, stop in zip([0, *ends], ends, strict=False):
        outs.append(linear_attention_step(*(x[:, :, start:stop] for x in tensors), state, **cut(options, start, stop)))
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=0, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-11)


def test_step_with_padding_leaves_the_state():
    tensors, options = make_inputs(length=23, decay="query_head", segments="middle", grad=False)
    poisoned = [x.masked_fill((options["segment_ids"] == 0)[:, None, :, None], float("nan")) for x in tensors]
    whole, last = linear_attention(*tensors, **options, return_state=True)
    state = empty_state(2, 4, 8, 6, dtype=torch.float64)
    outs = [linear_attention_step(*(x[:, :, t : t + 1] for x in poisoned), state, **cut(options, t, t + 1)) for t in range(23)]
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=0, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-11)


@pytest.mark.parametrize("quadratic", [False, True])
def test_a_first_token_that_weighs_nothing_gives_0(quadratic):
    """f(-1) = 0 at its bound: neither form divides by it."""
    key, value = torch.zeros(1, 1, 1, 8), torch.randn(1, 1, 1, 6)
    key[..., 0] = 1
    options = {"b": 2.0, "c": 1.0} if quadratic else {}
    state = empty_state(1, 1, 8, 6, degree=2 if quadratic else 1)
    assert torch.equal(linear_attention(-key, key, value, **options), torch.zeros_like(value))
    assert torch.equal(linear_attention_step(-key, key, value, state, **options), torch.zeros_like(value))


def test_bfloat16_step_keeps_a_float32_state():
    """A state in bfloat16 would stop growing after some hundred tokens."""
    tensors, _ = make_inputs(length=600, learned=False, dtype=torch.bfloat16, grad=False)
    state = empty_state(2, 2, 8, 6)
    for t in range(600):
        out = linear_attention_step(*(x[:, :, t : t + 1] for x in tensors), state)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    _, expected = linear_attention(*(x.double() for x in tensors), return_state=True)
    torch.testing.assert_close(state.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_step_is_counted_as_a_write_to_its_state(monkeypatch):
    """What autograd saved of a state before cannot be used after, also where the kernel writes by a pointer."""
    query, key, value = torch.randn(3, 2, 4, 1, 8)
    state = empty_state(2, 4, 8, 8)
    out = linear_attention(query.clone().requires_grad_(), key, value, initial_state=state)
    monkeypatch.setitem(operators._STEP, "cpu", lambda call, state: state.data.add_(1)[:, :, :1, 1:])
    with torch.no_grad():
        linear_attention_step(query, key, value, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_state_of_inference_mode_is_not_written_outside_it():
    query, key, value = torch.randn(3, 2, 4, 1, 8)
    with torch.inference_mode():
        state = empty_state(2, 4, 8, 8)
        linear_attention_step(query, key, value, state)
    with pytest.raises(RuntimeError, match="outside InferenceMode"):
        linear_attention_step(query, key, value, state)


@pytest.mark.parametrize("length", [1, 3])
def test_a_step_of_no_sequences(length):
    query, key = torch.randn(0, 4, length, 8), torch.randn(0, 2, length, 8)
    out = linear_attention_step(query, key, key[..., :6], empty_state(0, 2, 8, 6))
    assert out.shape == (0, 4, length, 6)
