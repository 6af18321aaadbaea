"""The compiled kernels against float64: every option, held to the bar of `accuracy_bar.py`."""

import itertools

import pytest
import torch
from accuracy_bar import check, compare, paths_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_only")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal, quadratic", list(itertools.product([True, False], [False, True])))
@pytest.mark.parametrize("length, head_dim, value_dim", [
    (1, 8, 8), (63, 48, 48), (64, 64, 64), (1000, 64, 64), (1000, 32, 32), (300, 128, 128), (257, 80, 80), (130, 96, 96),
    (70, 1, 1), (200, 256, 256), (150, 33, 7), (90, 16, 200), (140, 128, 64), (129, 32, 32), (1500, 128, 128),
], ids=str)  # fmt: skip
def test_shapes(dtype, causal, quadratic, length, head_dim, value_dim):
    check(dtype, causal, length=length, head_dim=head_dim, value_dim=value_dim, quadratic=quadratic)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("segments", [None, "left", "right", "middle", "packed", "mask"])
@pytest.mark.parametrize("decay", [None, "key_head", "query_head", "key_token", "query_token"])
def test_decay_and_segments(dtype, quadratic, segments, decay):
    check(dtype, length=333, head_dim=32, value_dim=24, heads=6, key_heads=2, quadratic=quadratic, segments=segments, decay=decay)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("segments", [None, "left", "packed"])
@pytest.mark.parametrize("decay", [None, "query_head", "key_token"])
def test_decay_and_segments_of_dims_far_apart(dtype, segments, decay):
    """The generic kernels: such rows are not padded."""
    for head_dim, value_dim in ((136, 40), (24, 136)):
        kind = {"length": 333, "head_dim": head_dim, "value_dim": value_dim, "segments": segments, "decay": decay}
        assert paths_of(dtype, **kind) == ("generic", "generic")
        check(dtype, heads=6, key_heads=2, **kind)


@pytest.mark.parametrize("segments", ["left", "packed", "mask"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quadratic", [False, True])
def test_bidirectional_padding(dtype, quadratic, segments):
    check(dtype, False, length=333, head_dim=32, value_dim=32, quadratic=quadratic, segments=segments)


@pytest.mark.parametrize("lag", [1, 64, 100])
@pytest.mark.parametrize("segments", [None, "packed", "middle"])
def test_lag(lag, segments):
    check(torch.float32, lag=lag, length=333, head_dim=32, value_dim=32, decay="query_token", segments=segments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, key_heads", [(8, 1), (6, 2), (32, 4)])
def test_grouped_queries(dtype, heads, key_heads):
    check(dtype, heads=heads, key_heads=key_heads, length=200, head_dim=64, value_dim=64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_unit_length(dtype):
    check(dtype, normalize_qk=False, quadratic=True, length=200, head_dim=16, value_dim=16)


# ---- what only the chunked form says: states in and out, masses, noise, and long second-degree sequences through the state


CASES = [
    {}, {"stateful": True}, {"noisy": True}, {"stateful": True, "noisy": True, "decay": "key_head"},
    {"stateful": True, "decay": "query_token"}, {"stateful": True, "decay": "key_token", "segments": "packed"},
    {"stateful": True, "segments": "left"}, {"stateful": True, "segments": "right", "decay": "query_head"},
    {"causal": False, "stateful": True}, {"causal": False, "segments": "mask", "noisy": True},
    {"head_dim": 64, "value_dim": 64, "stateful": True, "length": 1100},
    {"head_dim": 128, "value_dim": 128, "causal": False, "stateful": True},
    {"head_dim": 32, "value_dim": 32, "length": 2500, "key_heads": 1}, {"head_dim": 96, "value_dim": 96, "stateful": True, "key_heads": 4},
    {"value_dim": 130, "noisy": True, "head_dim": 20}, {"value_dim": 136, "stateful": True, "decay": "key_token", "segments": "packed"},
    {"length": 100, "stateful": True, "head_dim": 200, "value_dim": 64},
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_mass_and_noise(dtype, degree, case):
    if degree == 2 and case.get("head_dim", 0) > 64:
        case = case | {"head_dim": 48}
    compare(dtype, degree=degree, **case)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", [{}, {"decay": "key_token", "segments": "packed"}, {"stateful": True, "decay": "query_head"}], ids=str)
def test_long_second_degree(causal, case):
    if not causal and case.get("decay"):
        pytest.skip("bidirectional calls have no decay")
    compare(torch.float32, degree=2, causal=causal, length=3000, head_dim=16, value_dim=16, batch=1, **case)


def test_long_sequence_with_gradients():
    compare(torch.float32, length=20000, batch=1, heads=2, key_heads=1, head_dim=64, value_dim=64, decay="key_head")
