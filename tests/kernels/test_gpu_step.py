"""The kernel of one new token, at the accuracy bar; in graphs, compiled, repeated, and against the whole sequence."""

import pytest
import torch
from operator_cases import make_inputs
from step_cases import ALONE, check_step, step_case

from hf_linattn import empty_state, linear_attention, linear_attention_step
from hf_linattn.ops import cuda, one_token

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_only")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ALONE, ids=str)
def test_at_the_bar(dtype, kind):
    check_step(dtype, device="cuda", **kind)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("batch", [1, 3, 300])
@pytest.mark.parametrize("heads, key_heads, state_heads", [(32, 4, 4), (32, 4, 32), (9, 3, 3), (1, 1, 1)])
def test_batches_and_heads(degree, batch, heads, key_heads, state_heads):
    if degree == 2 and batch == 300:
        batch = 40
    kind = {"degree": degree, "batch": batch, "heads": heads, "key_heads": key_heads, "state_heads": state_heads}
    check_step(torch.bfloat16, device="cuda", decay="token", padded=batch > 1, **kind)


def test_same_inputs_same_bits():
    call, state = step_case(torch.bfloat16, device="cuda", degree=2, decay="head", heads=8)
    first = state.clone()
    out = cuda.step(call, first)
    for _ in range(250):
        again = state.clone()
        assert torch.equal(cuda.step(call, again), out) and torch.equal(again, first)


@pytest.mark.parametrize("quadratic", [False, True])
def test_a_whole_sequence_by_a_graph(quadratic):
    """A captured step, replayed for every token, gives what the whole sequence gives at once."""
    kind = {"decay": "query_head", "quadratic": quadratic, "dtype": torch.float32, "device": "cuda"}
    tensors, options = make_inputs(2, 4, 2, 200, 64, 64, grad=False, **kind)
    whole, last = linear_attention(*tensors, **options, return_state=True)
    state = empty_state(2, 4, 64, 64, degree=2 if quadratic else 1, device="cuda")
    token = [x[:, :, :1].clone() for x in tensors]
    linear_attention_step(*token, state.clone(), **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear_attention_step(*token, state, **options)
    state.zero_()
    outs = []
    for t in range(200):
        for static, x in zip(token, tensors, strict=True):
            static.copy_(x[:, :, t : t + 1])
        graph.replay()
        outs.append(out.clone())
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


def test_compiled():
    tensors, options = make_inputs(2, 4, 2, 1, 64, 64, dtype=torch.bfloat16, device="cuda", decay="key_head", grad=False)
    states = [empty_state(2, 2, 64, 64, device="cuda") for _ in range(2)]
    compiled = torch.compile(linear_attention_step, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(*tensors, states[0], **options), linear_attention_step(*tensors, states[1], **options))
    assert torch.equal(*states)


def test_a_strided_state_is_written_in_place():
    call, state = step_case(torch.float32, device="cuda")
    wide = torch.zeros(*state.shape[:-1], 2 * state.shape[-1], device="cuda")
    wide[..., ::2] = state
    torch.testing.assert_close(cuda.step(call, wide[..., ::2]), one_token.step(call, state), rtol=0, atol=1e-5)
    torch.testing.assert_close(wide[..., ::2], state, rtol=0, atol=1e-5)
    assert not wide[..., 1::2].any()
