"""The chunked form against the ten-line reference, in float64: every option, and gradients of every input."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import gradients, make_inputs

from hf_linattn import linear_attention
from hf_linattn.ops import chunked, reference
from hf_linattn.ops.unit import unit

DECAYS = (None, "key_head", "query_head", "key_token", "query_token")
SEGMENTS = (None, "left", "right", "middle", "packed", "mask")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of 16 tokens: several of them, and a rest, in sequences short enough for the reference."""
    monkeypatch.setattr(chunked, "CHUNK", 16)


def assert_equal_with_gradients(tensors, options, **fixed):
    out, grads = gradients(lambda *x, **k: linear_attention(*x, **k, **fixed), tensors, options)
    expected, expected_grads = gradients(lambda *x, **k: reference(*x, **k, **fixed), tensors, options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    for name, grad in expected_grads.items():
        message = lambda text, name=name: f"gradient of {name}: {text}"  # noqa: E731
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-9, check_dtype=False, msg=message)


@pytest.mark.parametrize("decay, segments", list(itertools.product(DECAYS, SEGMENTS)))
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("quadratic", [False, True])
def test_equals_reference(decay, segments, causal, quadratic):
    tensors, options = make_inputs(length=53, decay=decay, segments=segments, quadratic=quadratic)
    assert_equal_with_gradients(tensors, options, causal=causal)


@pytest.mark.parametrize("length", [0, 1, 2, 16, 17, 63])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(length, causal):
    tensors, options = make_inputs(length=length, decay="key_head")
    assert_equal_with_gradients(tensors, options, causal=causal)


@pytest.mark.parametrize("length, quadratic, sums_are_kept", [(64, True, False), (65, True, True), (64, False, True)])
def test_short_texts_of_second_degree_form_pairs_instead_of_a_state(monkeypatch, length, quadratic, sums_are_kept):
    """Up to D^2 tokens, which is 64 here."""
    advanced, real = [], chunked.Problem.advance
    monkeypatch.setattr(chunked.Problem, "advance", lambda *given: advanced.append(1) or real(*given))
    tensors, options = make_inputs(length=length, quadratic=quadratic)
    linear_attention(*tensors, **options)
    assert bool(advanced) == sums_are_kept


@pytest.mark.parametrize("lag", [1, 4, 16, 40, 100])
@pytest.mark.parametrize("segments", [None, "packed", "middle", "left"])
def test_lag(lag, segments):
    tensors, options = make_inputs(length=53, decay="query_token", segments=segments)
    assert_equal_with_gradients(tensors, options, lag=lag)


def test_the_reference_in_float32_behind_a_lag_that_decays_to_nothing():
    """exp(-1000) is no number of float32, and what all keys of a row have in common is cancelled by the normalising."""
    tensors, _ = make_inputs(length=53)
    given = {"log_decay": torch.tensor([-25.0, -1.0], dtype=torch.float64), "lag": 40}
    exact = linear_attention(*tensors, **given)
    torch.testing.assert_close(reference(*(x.float() for x in tensors), **given).double(), exact, atol=1e-4, rtol=0)
    torch.testing.assert_close(reference(*tensors, **given), exact)


@pytest.mark.parametrize("head_dim, value_dim, heads, key_heads", [(1, 1, 1, 1), (8, 3, 6, 1), (48, 80, 2, 2), (5, 130, 3, 3)])
def test_shapes(head_dim, value_dim, heads, key_heads):
    tensors, options = make_inputs(length=40, heads=heads, key_heads=key_heads, head_dim=head_dim, value_dim=value_dim)
    assert_equal_with_gradients(tensors, options)


@pytest.mark.parametrize("causal", [True, False])
def test_second_degree_direct_and_state_forms_are_one_function(causal, monkeypatch):
    tensors, options = make_inputs(length=60, quadratic=True, decay="key_token" if causal else None)
    monkeypatch.setattr(chunked, "DIRECT_LENGTH", 0.0)
    assert_equal_with_gradients(tensors, options, causal=causal)
    monkeypatch.setattr(chunked, "DIRECT_LENGTH", 1e9)
    assert_equal_with_gradients(tensors, options, causal=causal)


def test_unbounded_second_degree_without_unit_length():
    tensors, options = make_inputs(length=50, quadratic=True)
    assert_equal_with_gradients(tensors, options, normalize_qk=False)


def test_cross_attention_to_more_keys():
    (query, _, _), options = make_inputs(length=21, learned=False)
    (_, key, value), _ = make_inputs(length=50, learned=False)
    out = linear_attention(query, key, value, causal=False, **options)
    padded = torch.cat([query, query.new_zeros(2, 4, 29, 8)], 2)
    torch.testing.assert_close(out, reference(padded, key, value, causal=False, **options)[:, :, :21], rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_combination(data):
    draw = lambda *options: data.draw(st.sampled_from(options))  # noqa: E731
    key_heads = draw(1, 2, 3)
    tensors, options = make_inputs(
        batch=draw(1, 3), key_heads=key_heads, heads=key_heads * draw(1, 2, 4), length=data.draw(st.integers(0, 70)),
        head_dim=draw(1, 3, 8, 17), value_dim=draw(1, 4, 9), decay=draw(*DECAYS), segments=draw(*SEGMENTS),
        quadratic=draw(False, True), learned=draw(False, True),
        seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    causal = draw(True, False)
    assert_equal_with_gradients(tensors, options, causal=causal, lag=draw(0, 3, 20) if causal else 0)


@pytest.mark.parametrize("quadratic, causal", list(itertools.product([False, True], [False, True])))
def test_gradcheck(quadratic, causal):
    decay = "query_token" if causal else None
    tensors, options = make_inputs(batch=1, length=18, head_dim=3, value_dim=2, quadratic=quadratic, decay=decay)
    names = list(options)
    torch.autograd.gradcheck(
        lambda q, k, v, *rest: linear_attention(q, k, v, **dict(zip(names, rest, strict=True)), causal=causal),
        (*tensors, *options.values()), nondet_tol=0.0,
    )  # fmt: skip


def test_strides_and_transformers_layout():
    """Transposed, sliced and expanded inputs give the very same bits; the output keeps the query's memory order."""
    (query, key, value), _ = make_inputs(length=45, learned=False, dtype=torch.float32, grad=False)
    expected = linear_attention(query, key, value)
    fused = torch.randn(2, 45, 4, 24)
    fused[..., :8] = query.transpose(1, 2)
    sliced = fused[..., :8].transpose(1, 2)
    out = linear_attention(sliced, key.transpose(1, 2).contiguous().transpose(1, 2), value[:, :, ::1])
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous()
    assert expected.is_contiguous()
    one = value[:, :1, :, :1].expand(2, 2, 45, 6)
    torch.testing.assert_close(linear_attention(query, key, one), linear_attention(query, key, one.contiguous()), rtol=0, atol=0)


def test_same_inputs_same_bits():
    tensors, options = make_inputs(length=90, dtype=torch.float32, decay="key_head")
    first_out, first = gradients(linear_attention, tensors, options)
    for _ in range(5):
        out, grads = gradients(linear_attention, tensors, options)
        assert torch.equal(out, first_out) and all(torch.equal(grads[name], first[name]) for name in first)


@pytest.mark.parametrize("segments", ["left", "right", "middle", "packed"])
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_at_padding_reaches_a_token(segments, causal):
    """NaN in query, key, value and the incoming gradient at padding changes no other row, and gives no NaN gradient."""
    (query, key, value), options = make_inputs(length=53, segments=segments, decay="key_head", dtype=torch.float32, grad=False)
    padding = (options["segment_ids"] == 0)[:, None, :, None]
    results = []
    for filler in (0.0, float("nan")):
        tensors = [x.masked_fill(padding, filler).requires_grad_() for x in (query, key, value)]
        out = linear_attention(*tensors, causal=causal, **options)
        assert torch.equal(out.masked_fill(~padding, 0), torch.zeros_like(out))
        grads = torch.autograd.grad(out, tensors, torch.ones_like(out).masked_fill(padding, filler))
        results.append((out, *grads))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("scale", [1e-11, 1e-7, 1e5])
def test_lengths_make_no_difference(scale):
    """Down to 1e-12, where a vector has no direction any more."""
    tensors, options = make_inputs(length=20, learned=False)
    query, key, value = (x / x.norm(dim=-1, keepdim=True) for x in tensors)
    scaled = linear_attention(scale * query, scale * key, value, **options)
    torch.testing.assert_close(scaled, linear_attention(query, key, value, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_that_sum_to_zero_give_nothing_and_pass_no_gradient(dtype):
    """f(-1) = 0: the first token sees itself alone and weighs nothing. There is no average of it, and no slope."""
    key = torch.tensor([[[[0.0, 1.0], [0.6, 0.8], [1.0, 0.0]]]], dtype=dtype)
    query = torch.cat([-key[:, :, :1], key[:, :, 1:]], 2)
    value = torch.randn(1, 1, 3, 4, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    linear_attention(*leaves, normalize_qk=False)[:, :, 0].sum().backward()
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_zero_vector_has_no_direction():
    """Its scores are 0 and its gradient is 0, where a clamped norm would give 1e12."""
    tensors, options = make_inputs(length=20, learned=False)
    query, key, value = (x.detach().clone() for x in tensors)
    query[:, :, 3] = 0
    key[:, :, 5] = 0
    for x in (query, key, value):
        x.requires_grad_()
    out = linear_attention(query, key, value, **options)
    torch.testing.assert_close(out[:, :, 3], value[:, :, :4].mean(2).repeat_interleave(2, 1))
    grad_query, grad_key = torch.autograd.grad(out.sum(), (query, key))
    assert grad_query[:, :, 3].abs().max() == 0 and grad_key[:, :, 5].abs().max() == 0


def test_a_length_of_1e_12_is_the_last_without_direction():
    short = torch.tensor([[1e-12, 0], [1.0001e-12, 0], [0, -1]], dtype=torch.float64)
    torch.testing.assert_close(unit(short), torch.tensor([[0, 0], [1, 0], [0, -1]], dtype=torch.float64))
