"""The compiled kernels against float64: every option, the error beside that of the same formula in the same dtype in plain PyTorch.

The bar is twice that error, three times for gradients. What the reference cannot say (states, masses, noise) is held against the chunked
PyTorch form, in float64 for the truth and in the dtype at hand for the bar.
"""

import itertools

import pytest
import torch
from operator_cases import gradients, make_inputs

from hf_linattn import linear_attention
from hf_linattn.ops import chunked, cuda, reference
from hf_linattn.ops.features import feature_count
from hf_linattn.ops.segments import canonical_segments

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # where the plain form is exact by luck


@pytest.fixture(autouse=True)
def compiled_only(monkeypatch):
    """No test here may pass by falling back."""
    monkeypatch.setenv("HF_LINATTN_BACKEND", "cuda")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def distance(x, exact):
    return ((x.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def exactly(x):
    return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_bar(name, ours, plain, exact, factor, dtype):
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    error, allowed = distance(ours, exact), factor * distance(plain, exact) + FLOOR[dtype] * (1 if factor == 2 else 5)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check(dtype, causal=True, lag=0, normalize_qk=True, **kind):
    tensors, options = make_inputs(dtype=torch.float32, device="cuda", **kind)
    tensors = [x.detach().to(dtype).requires_grad_() for x in tensors]
    fixed = {"causal": causal, "lag": lag, "normalize_qk": normalize_qk}
    exact, exact_grads = gradients(
        lambda *x, **k: reference(*x, **k, **fixed), [exactly(x) for x in tensors], {n: exactly(x) for n, x in options.items()}
    )
    plain, plain_grads = gradients(lambda *x, **k: reference(*x, **k, **fixed), tensors, options)
    ours, our_grads = gradients(lambda *x, **k: linear_attention(*x, **k, **fixed), tensors, options)
    assert ours.dtype == dtype
    assert_bar("out", ours, plain, exact, 2, dtype)
    for name, grad in our_grads.items():
        if exact_grads[name] is None or exact_grads[name].norm() < 1e-9:  # a lone token's weight cancels: no gradient but rounding
            assert grad is None or grad.norm() < 1e-2, name
            continue
        assert_bar(f"gradient of {name}", grad, plain_grads[name], exact_grads[name], 3, dtype)


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


def operator_case(dtype, *, degree=1, causal=True, decay=None, segments=None, stateful=False, noisy=False, batch=2, heads=4, key_heads=2,
                  length=700, head_dim=32, value_dim=24, seed=0):  # fmt: skip
    quadratic = degree == 2
    tensors, options = make_inputs(batch, heads, key_heads, length, head_dim, value_dim, dtype=torch.float32, device="cuda", seed=seed,
                                   decay=decay, segments=segments, quadratic=quadratic, grad=False)  # fmt: skip
    coefficients = torch.stack([options["a"], options["b"], options.get("c", torch.zeros_like(options["a"])), options["temperature"]])
    log_decay = options.get("log_decay")
    runs = canonical_segments(options["segment_ids"], batch, length) if segments else None
    state_heads = chunked.state_heads(*tensors[:2], log_decay)
    shape = batch, state_heads, feature_count(head_dim, degree), value_dim + 1
    generator = torch.Generator("cuda").manual_seed(seed)
    random = lambda *s: torch.randn(*s, generator=generator, device="cuda")  # noqa: E731
    initial = None
    if stateful:
        before = {"length": 50, "head_dim": head_dim, "value_dim": value_dim, "dtype": torch.float32, "device": "cuda", "seed": seed + 1}
        past, _ = make_inputs(batch, heads, key_heads, grad=False, **before)
        rate = None if log_decay is None else (log_decay if log_decay.dim() == 1 else log_decay[..., :1].expand(-1, -1, 50).contiguous())
        initial = chunked.forward(*past, coefficients, rate, None, None, None, None, None, degree, causal, True, True)[2]
        assert initial.shape == shape
    p, noise_seed = (torch.tensor(0.2, device="cuda"), torch.tensor(2**40 + 7, device="cuda")) if noisy else (None, None)
    inputs = [*(x.to(dtype) for x in tensors), coefficients, log_decay, runs, runs, initial, p, noise_seed, degree, causal, True]
    upstream = random(batch, heads, length, value_dim).to(dtype), random(batch, heads, length), random(*shape) if stateful else None
    return inputs, upstream


def run(module, inputs, upstream, stateful, dtype=None):
    cast = lambda x: x.to(dtype) if dtype is not None and isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    inputs, upstream = [cast(x) for x in inputs], [cast(x) for x in upstream]
    out, mass, state = module.forward(*inputs, stateful)
    grads = module.backward(*upstream, *inputs[:10], out, mass, *inputs[10:])
    names = ("query", "key", "value", "coefficients", "log_decay", "initial_state")
    results = {"out": out, "mass": mass, "state": state} | {f"gradient of {name}": x for name, x in zip(names, grads, strict=True)}
    return {name: x for name, x in results.items() if x.numel()}


def compare(dtype, **kind):
    inputs, upstream = operator_case(dtype, **kind)
    stateful = kind.get("stateful", False)
    exact = run(chunked, inputs, upstream, stateful, torch.float64)
    plain = run(chunked, inputs, upstream, stateful)
    ours = run(cuda, inputs, upstream, stateful)
    assert ours.keys() == exact.keys()
    for name, x in ours.items():
        assert x.shape == exact[name].shape
        if exact[name].norm() > 0:
            assert_bar(name, x, plain[name], exact[name], 3 if name.startswith("gradient") else 2, dtype)


CASES = [
    {}, {"stateful": True}, {"noisy": True}, {"stateful": True, "noisy": True, "decay": "key_head"},
    {"stateful": True, "decay": "query_token"}, {"stateful": True, "decay": "key_token", "segments": "packed"},
    {"stateful": True, "segments": "left"}, {"stateful": True, "segments": "right", "decay": "query_head"},
    {"causal": False, "stateful": True}, {"causal": False, "segments": "mask", "noisy": True},
    {"head_dim": 64, "value_dim": 64, "stateful": True, "length": 1100},
    {"head_dim": 128, "value_dim": 128, "causal": False, "stateful": True},
    {"head_dim": 32, "value_dim": 32, "length": 2500, "key_heads": 1}, {"head_dim": 96, "value_dim": 96, "stateful": True, "key_heads": 4},
    {"value_dim": 130, "noisy": True, "head_dim": 20}, {"length": 100, "stateful": True, "head_dim": 200, "value_dim": 64},
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
