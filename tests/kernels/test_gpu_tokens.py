"""The kernel of a few new tokens: at the accuracy bar, repeated, and in graphs."""

import pytest
import torch
from accuracy_bar import check, compare, paths_of
from step_cases import SEVERAL, check_step, step_case

from hf_linattn import linear_attention
from hf_linattn.ops import cuda

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_only")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SEVERAL, ids=str)
def test_at_the_bar(dtype, kind):
    check_step(dtype, device="cuda", **kind)


@pytest.mark.parametrize("length", [2, 7, 8, 16])
@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("batch, heads, key_heads, state_heads", [(300, 32, 4, 4), (40, 32, 4, 32), (3, 9, 3, 3), (1, 24, 1, 1)])
def test_batches_and_heads(degree, batch, heads, key_heads, state_heads, length):
    if degree == 2:
        batch = min(batch, 20)
    kind = {"degree": degree, "batch": batch, "heads": heads, "key_heads": key_heads, "state_heads": state_heads, "length": length}
    check_step(torch.bfloat16, device="cuda", decay="token", padded=batch > 1, **kind)


@pytest.mark.parametrize("head_dim, value_dim", [(1, 1), (64, 200), (128, 128), (192, 96), (256, 256)])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_dims_and_groups(heads, head_dim, value_dim):
    for degree in (1, 2):
        kind = {"heads": heads, "key_heads": 1, "head_dim": head_dim, "value_dim": value_dim, "degree": degree}
        check_step(torch.float32, device="cuda", length=11, batch=1, decay="head", **kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [
    {"decay": "query_token", "segments": "packed", "length": 12}, {"decay": "key_head", "length": 16, "head_dim": 64, "value_dim": 64},
    {"degree": 2, "decay": "key_token", "segments": "middle", "length": 9},
], ids=str)  # fmt: skip
def test_with_gradients(dtype, kind):
    assert paths_of(dtype, stateful=True, **kind)[0] == "tokens"
    compare(dtype, stateful=True, **kind)


@pytest.mark.parametrize("lag", [0, 3])
def test_gradients_through_the_operator(lag):
    check(torch.float32, lag=lag, length=13, head_dim=32, value_dim=32, decay="key_token", segments="packed")


@pytest.mark.parametrize("kind", SEVERAL, ids=str)
def test_in_place_out_of_place_and_the_same_bits_each_time(kind):
    call, state = step_case(torch.bfloat16, device="cuda", **kind)
    out, _, after = cuda.forward(call._replace(initial_state=state), True)
    for _ in range(100):
        again = state.clone()
        assert torch.equal(cuda.step(call, again), out) and torch.equal(again, after)


def test_a_captured_graph():
    call, state = step_case(torch.bfloat16, device="cuda", length=5, decay="head", degree=2)
    expected_state = state.clone()
    expected = cuda.step(call, expected_state)
    static = state.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.step(call, static)
    static.copy_(state)
    graph.replay()
    assert torch.equal(out, expected) and torch.equal(static, expected_state)


def test_a_call_does_not_wait_for_the_device():
    x = torch.randn(2, 4, 6, 64, device="cuda")
    state = linear_attention(x, x, x, return_state=True)[1]
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_attention(x, x, x, initial_state=state, return_state=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
