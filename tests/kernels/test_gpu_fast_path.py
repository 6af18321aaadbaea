"""The tensor-core path with all that multiplies its weights: decays, packed sequences, padding, states, at its head dimensions.

The bar is that of `accuracy_bar.py`. Every test makes sure that it is the fast path it looks at.
"""

import pytest
import torch
from accuracy_bar import assert_bar, check, compare, distance, operator_case, rate_gradient, run
from operator_cases import make_inputs

from hf_linattn.ops import chunked, cuda
from hf_linattn.ops.call import Call

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_only")]
DIMS = (32, 64, 80, 96, 128)
DTYPES = (torch.bfloat16, torch.float16)


def assert_fast(dtype, head_dim, causal=True, **kind):
    shape = {"head_dim": head_dim, "value_dim": head_dim}
    (query, key, value), options = make_inputs(dtype=torch.float32, device="cuda", grad=False, **shape, **kind)
    decay = options.get("log_decay")
    segments = options["segment_ids"].int() if "segment_ids" in options else None
    taken = cuda.paths(*(x.to(dtype) for x in (query, key, value)), causal=causal, log_decay=decay, segments=segments)
    assert taken == ("stream", "stream")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("segments", [None, "left", "middle", "packed", "mask"])
@pytest.mark.parametrize("decay", [None, "key_head", "key_token", "query_token"])
def test_decay_and_segments(dtype, head_dim, segments, decay):
    assert_fast(dtype, head_dim, segments=segments, decay=decay)
    check(dtype, length=333, head_dim=head_dim, value_dim=head_dim, segments=segments, decay=decay)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129, 1000, 4097])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_lengths(dtype, head_dim, length):
    segments = "packed" if length > 8 else None
    check(dtype, length=length, head_dim=head_dim, value_dim=head_dim, segments=segments, decay="key_token", batch=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("segments", ["left", "mask"])
def test_bidirectional_padding(dtype, head_dim, segments):
    assert_fast(dtype, head_dim, causal=False, segments=segments)
    check(dtype, False, length=333, head_dim=head_dim, value_dim=head_dim, segments=segments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", ["key_head", "query_head", "query_token"])
@pytest.mark.parametrize("heads, key_heads", [(8, 1), (6, 2), (32, 4)])
def test_grouped_queries(dtype, heads, key_heads, decay):
    check(dtype, heads=heads, key_heads=key_heads, length=300, head_dim=64, value_dim=64, decay=decay, segments="packed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lag", [1, 64, 100])
@pytest.mark.parametrize("segments", [None, "packed", "middle"])
def test_lag(dtype, lag, segments):
    check(dtype, lag=lag, length=333, head_dim=64, value_dim=64, decay="key_token", segments=segments)


STATEFUL = [
    {}, {"decay": "key_head"}, {"decay": "key_token", "segments": "packed"}, {"decay": "query_token", "segments": "left"},
    {"segments": "right", "decay": "query_head"}, {"segments": "middle"}, {"causal": False, "segments": "mask"},
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_states_and_masses(dtype, head_dim, case):
    compare(dtype, head_dim=head_dim, value_dim=head_dim, length=500, stateful=True, **case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("case", [
    {}, {"decay": "key_head", "stateful": True}, {"segments": "packed"}, {"causal": False, "segments": "mask"},
], ids=str)  # fmt: skip
def test_noise(dtype, head_dim, case):
    inputs, _ = operator_case(dtype, head_dim=head_dim, value_dim=head_dim, noisy=True, length=64)
    assert cuda.paths(*inputs[:3], dropout_p=inputs[8]) == ("stream", "stream")
    compare(dtype, head_dim=head_dim, value_dim=head_dim, length=500, noisy=True, **case)


@pytest.mark.parametrize("kind", [{}, {"decay": "query_head"}, {"decay": "key_token", "segments": "packed", "stateful": True}], ids=str)
def test_whole_heads_to_a_block(kind):
    """About as many heads as multiprocessors: none is cut for the output, and backward takes over the states ahead of its tiles."""
    heads = torch.cuda.get_device_properties(0).multi_processor_count // 4
    compare(torch.bfloat16, head_dim=64, value_dim=64, length=1100, batch=4, heads=heads, key_heads=heads, **kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STATEFUL[:5], ids=str)
def test_sequences_cut_into_segments(dtype, case):
    """Few heads and many tokens: several blocks work on one sequence, and the states between them are scanned."""
    compare(dtype, head_dim=64, value_dim=64, length=9000, batch=1, heads=2, key_heads=1, stateful=True, **case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strong_decay_neither_overflows_nor_underflows_to_nan(dtype):
    inputs, upstream = operator_case(dtype, head_dim=64, value_dim=64, length=500, decay="key_token")
    inputs[4] = torch.full_like(inputs[4], -30.0)
    call = Call(*inputs)
    out, mass, _ = cuda.forward(call, False)
    grads = cuda.backward(call, out, mass, upstream[0], None, None)
    assert all(torch.isfinite(x).all() for x in (out, mass, *grads) if x is not None)
    value = inputs[2].repeat_interleave(2, 1)
    assert (out.float() - value.float()).abs().max() < 0.02 * value.float().abs().max()  # each token sees itself alone


RANGES = {
    "many tokens": {"length": 40_000, "scales": {"value": 20}, "shift": 3.0},
    "small keys and queries": {"scales": {"key": 1e-3, "query": 1e-3}},
    "large keys and queries": {"scales": {"key": 1e3, "query": 1e3, "gradient": 1e3}},
    "large values": {"scales": {"value": 1e3}},
    "large coefficients": {"scales": {"coefficients": 1e6}, "stateful": True},
    "small coefficients": {"scales": {"coefficients": 1e-6}},
    "large gradients": {"scales": {"gradient": 1e3}},
    "gradients of many sizes": {"decay": "key_token", "segments": "packed", "spread": True},
}


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("case", RANGES)
def test_float16_range(head_dim, case):
    """No sum, no weight and no gradient leaves float16's range where inputs and results lie within it."""
    kind = {"length": 700, "stateful": False, **RANGES[case]}
    scales, shift, spread = kind.pop("scales", {}), kind.pop("shift", 0.0), kind.pop("spread", False)
    inputs, upstream = operator_case(torch.float16, head_dim=head_dim, value_dim=head_dim, batch=1, **kind)
    for i, name in enumerate(("query", "key", "value")):
        inputs[i] = (inputs[i].float() * scales.get(name, 1.0) + (shift if name == "value" else 0.0)).half()
    size = torch.logspace(-2, 2, inputs[0].shape[2], device="cuda")[None, None, :, None] if spread else 1.0
    upstream = ((upstream[0].float() * scales.get("gradient", 1.0) * size).half(), None, upstream[2])
    inputs[3] = inputs[3] * torch.tensor([scales.get("coefficients", 1.0)] * 3 + [1.0], device="cuda")[:, None]
    assert cuda.paths(*inputs[:3]) == ("stream", "stream")
    exact, plain, ours = (
        run(module, inputs, upstream, kind["stateful"], dtype)
        for module, dtype in ((chunked, torch.float64), (chunked, None), (cuda, None))
    )
    if inputs[4] is not None:
        plain["gradient of log_decay"] = rate_gradient(inputs, upstream)
    for name, x in ours.items():
        assert_bar(name, x, plain[name], exact[name], 3 if name.startswith("gradient") else 2, torch.float16)


def test_float16_gradient_of_the_mass_alone():
    inputs, upstream = operator_case(torch.float16, head_dim=64, value_dim=64, length=300)
    upstream = (torch.zeros_like(upstream[0]), upstream[1], upstream[2])
    exact, ours = run(chunked, inputs, upstream, False, torch.float64), run(cuda, inputs, upstream, False)
    assert ours["gradient of value"].abs().max() == 0
    for name in ("gradient of query", "gradient of key"):
        assert distance(ours[name], exact[name]) < 3e-3, name
