"""What cannot be computed is refused in one sentence that names it."""

import pytest
import torch

from hf_linattn import empty_state, linear_attention, linear_attention_step

Q, K, V = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 6)
NAN = float("nan")


@pytest.mark.parametrize("tensors, error, words", [
    ((Q[0], K, V), ValueError, "query must have 4 dimensions"),
    ((Q, "k", V), TypeError, "key must be a torch.Tensor"),
    ((Q, K.double(), V), TypeError, "one dtype"),
    ((Q.long(), K.long(), V.long()), TypeError, "float64, float32, bfloat16 or float16"),
    ((Q, K.to("meta"), V), ValueError, "one device"),
    ((Q, K[:, :, :5], V), ValueError, "key and value must agree"),
    ((Q, K[..., :4], V), ValueError, "agree in batch and head_dim"),
    ((Q[:, :3], K, V), ValueError, "3 query heads must be a multiple of the 2 key heads"),
    ((Q[..., :0], K[..., :0], V), ValueError, "head_dim is 0"),
    ((Q[:, :, :5], K, V), ValueError, "as many keys as queries: expected 5, got 9"),
    ((Q[:1], K, V), ValueError, "agree in batch"),
])  # fmt: skip
def test_tensors(tensors, error, words):
    with pytest.raises(error, match=words):
        linear_attention(*tensors)


@pytest.mark.parametrize("options, error, words", [
    ({"a": NAN}, ValueError, "finite"),
    ({"b": 1.00001}, ValueError, "must not be negative"),
    ({"b": -1.00001}, ValueError, "must not be negative"),
    ({"a": 0.5, "b": -0.50001}, ValueError, "must not be negative"),
    ({"temperature": 0.0}, ValueError, "above 0"),
    ({"temperature": 1.00001}, ValueError, "must not be negative"),
    ({"b": torch.tensor([0.1, 0.1, 0.1, NAN])}, ValueError, "finite"),
    ({"b": torch.ones(3)}, ValueError, r"shape \(4,\)"),
    ({"b": "1"}, TypeError, "b must be a number"),
    ({"b": 3.0, "c": 1.0, "temperature": 2.0}, ValueError, "must not be negative"),
    ({"b": 3.0, "c": 2.0}, ValueError, "must not be negative"),  # at s = -0.75, between the ends
    ({"b": -2.00002, "c": 1.0, "temperature": 1.5}, ValueError, "must not be negative"),
    ({"b": 0.5, "c": -0.50001}, ValueError, "must not be negative"),
    ({"b": 2.00001, "c": 1.0, "normalize_qk": False}, ValueError, r"b\^2 <= 4 a c"),
    ({"b": -2.00001, "c": 1.0, "normalize_qk": False}, ValueError, r"b\^2 <= 4 a c"),
    ({"c": -0.00001, "normalize_qk": False}, ValueError, r"b\^2 <= 4 a c"),
    ({"a": -0.00001, "normalize_qk": False}, ValueError, "a >= 0"),
    ({"log_decay": torch.tensor([0.1, -1.0])}, ValueError, "0 or negative"),
    ({"log_decay": torch.tensor([NAN, -1.0])}, ValueError, "not NaN"),
    ({"log_decay": torch.tensor([-float("inf"), -1.0])}, ValueError, "finite"),
    ({"log_decay": torch.zeros(3)}, ValueError, "log_decay must have one of the shapes"),
    ({"log_decay": -1.0}, TypeError, "log_decay must be a tensor"),
    ({"lag": -1}, ValueError, "lag must be 0 or more"),
    ({"lag": 1, "causal": False}, ValueError, "lag must be"),
    ({"segment_ids": torch.ones(2, 5, dtype=torch.long)}, ValueError, r"shape \(2, 9\)"),
    ({"segment_ids": torch.ones(2, 9)}, TypeError, "integers"),
    ({"segment_ids": torch.tensor([[2] * 4 + [1] * 5] * 2)}, ValueError, "never fall"),
    ({"segment_ids": torch.tensor([[1] * 4 + [-1] * 5] * 2)}, ValueError, "never fall"),
    ({"segment_ids": torch.ones(2, 9, dtype=torch.bool, device="meta")}, ValueError, "segment_ids must be on the device of query"),
    ({"dropout_p": 1.0}, ValueError, "below 1"),
    ({"dropout_p": -0.00001}, ValueError, "at least 0"),
    ({"dropout_p": torch.tensor(-0.00001)}, ValueError, "at least 0"),
    ({"dropout_p": NAN}, ValueError, "below 1"),
    ({"dropout_p": "0"}, TypeError, "dropout_p must be a number"),
    ({"dropout_p": 0.1, "dropout_kind": "drop"}, ValueError, '"paper" or "moment"'),
    ({"dropout_p": 0.1, "dropout_kind": "moment", "c": 1.0}, ValueError, "needs c = 0"),
    ({"dropout_p": 0.1, "seed": torch.ones(2)}, ValueError, "seed must be"),
    ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be"),
    ({"initial_state": torch.zeros(2, 2, 9, 6)}, ValueError, "the state must be"),
    ({"initial_state": torch.zeros(2, 2, 9, 7, dtype=torch.bfloat16)}, ValueError, "the state must be"),
    ({"initial_state": empty_state(2, 2, 8, 6), "c": 1.0}, ValueError, "the state must be"),
    ({"return_state": True, "causal": False, "log_decay": -torch.ones(2)}, ValueError, "a state goes with"),
])  # fmt: skip
def test_options(options, error, words):
    with pytest.raises(error, match=words):
        linear_attention(Q, K, V, **options)


def test_step():
    with pytest.raises(ValueError, match="takes 1 to 16 tokens a call, not 18"):
        linear_attention_step(*(torch.cat([x, x], 2) for x in (Q, K, V)), empty_state(2, 2, 8, 6))
    with pytest.raises(ValueError, match="takes 1 to 16 tokens a call, not 0"):
        linear_attention_step(*(x[:, :, :0] for x in (Q, K, V)), empty_state(2, 2, 8, 6))
    with pytest.raises(ValueError, match="the state must be"):
        linear_attention_step(Q[:, :, :1], K[:, :, :1], V[:, :, :1], empty_state(2, 4, 8, 6))


def test_a_step_of_tensors_on_another_device():
    """Of shapes and dtypes that were right before."""
    tensors, state = (Q[:, :, :1], K[:, :, :1], V[:, :, :1]), empty_state(2, 2, 8, 6)
    for ids in (torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 1, dtype=torch.long)):
        linear_attention_step(*tensors, state, segment_ids=ids)
        with pytest.raises(ValueError, match="segment_ids must be on the device of query"):
            linear_attention_step(*tensors, state, segment_ids=ids.to("meta"))
    with pytest.raises(ValueError, match="the state must be on the device of query"):
        linear_attention_step(*tensors, state.to("meta"))


@pytest.mark.parametrize("options", [
    {"b": 1.0}, {"b": -1.0}, {"a": 0.5, "temperature": 0.5}, {"b": 2.0, "c": 1.0}, {"b": -2.0, "c": 1.0, "temperature": 3.0},
    {"b": 0.5, "c": -0.5}, {"b": 2.0, "c": 1.0, "normalize_qk": False}, {"b": 0.2, "normalize_qk": False}, {"dropout_p": 0.0},
    {"log_decay": torch.zeros(2)}, {"log_decay": torch.zeros(2, 4, 9)}, {"lag": 0, "causal": False},
    {"a": 2.0**20, "b": 2.0**20 + 1}, {"a": 0.0, "b": 0.0, "c": 1.0},
    {"a": 0.0, "b": 0.0, "c": 1.0, "normalize_qk": False}, {"a": torch.zeros(4), "b": 0.0, "c": 1.0},
], ids=str)  # fmt: skip
def test_the_bound_itself_is_allowed(options):
    """Such as a = b * temperature: f(s) = 1 + s touches 0 at s = -1 alone."""
    assert linear_attention(Q, K, V, **options).isfinite().all()


@pytest.mark.parametrize("options", [{"b": 1 + 2e-6}, {"a": 1e-3, "b": 1e-3 + 2e-6}, {"a": 2.0**20, "b": 2.0**20 + 2}], ids=str)
def test_just_beyond_the_bound_is_refused(options):
    """Rounding may be a millionth of a, or of 1 where a is smaller."""
    with pytest.raises(ValueError, match="must not be negative"):
        linear_attention(Q, K, V, **options)


@pytest.mark.parametrize("keys", [5, 6, 8, 9])
def test_keys_behind_a_lag_are_those_of_the_rows_and_the_lag(keys):
    state, call = empty_state(2, 2, 8, 6), (Q[:, :, :5], K[:, :, :keys], V[:, :, :keys])
    if keys == 5:
        linear_attention(*call, lag=2, initial_state=state)
        return
    with pytest.raises(ValueError, match="expected 5, or 7 with the 2 tokens before"):
        linear_attention(*call, lag=2, initial_state=state)
