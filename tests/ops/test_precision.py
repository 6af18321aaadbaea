"""Errors against float64, beside those of the same formula in the same dtype in plain PyTorch: at most twice, gradients three times."""

import pytest
import torch
from operator_cases import gradients, make_inputs

from hf_linattn import linear_attention
from hf_linattn.ops import functional, reference

OPTIONS = {
    "linear": {},
    "decay": {"decay": "query_head"},
    "gate": {"decay": "key_token"},
    "quadratic": {"quadratic": True},
    "packed": {"segments": "packed"},
}


ROUNDED_ONCE = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 3e-4}  # measured: 3e-7, 1.7e-3, 2.1e-4


def distance(x, exact):
    return ((x.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_error_against_float64(dtype, causal, name):
    if name in ("decay", "gate") and not causal:
        pytest.skip("composed of two causal calls, which are tested")
    tensors, options = make_inputs(length=300, head_dim=32, value_dim=32, dtype=dtype, **OPTIONS[name])
    exact_tensors = [x.detach().double().requires_grad_() for x in tensors]
    exact_options = {
        n: x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in options.items()
    }
    exact, exact_grads = gradients(lambda *x, **k: reference(*x, causal=causal, **k), exact_tensors, exact_options)
    plain, plain_grads = gradients(lambda *x, **k: reference(*x, causal=causal, **k), tensors, options)
    ours, our_grads = gradients(lambda *x, **k: linear_attention(*x, causal=causal, **k), tensors, options)
    assert ours.dtype == dtype
    assert distance(ours, exact) <= 2 * distance(plain, exact) + 1e-7
    assert distance(ours, exact) <= ROUNDED_ONCE[dtype]  # whatever is summed, it is not summed in half precision
    for leaf, grad in our_grads.items():
        assert grad.dtype == dtype, leaf
        assert distance(grad, exact_grads[leaf]) <= 3 * distance(plain_grads[leaf], exact_grads[leaf]) + 1e-6, leaf


@pytest.mark.parametrize("heads, key_heads, length, head_dim", [(4, 1, 777, 128), (3, 3, 600, 48)])
@pytest.mark.parametrize("per_token", [False, True])
def test_gradient_of_a_slow_decay(heads, key_heads, length, head_dim, per_token):
    """Time constants up to 500 tokens: what each token's gradient is left with is small beside what cancels in it."""
    exact, plain, ours = [], [], []
    for seed in range(3):  # a head's rate is one number, and its error a matter of luck
        (query, key, value), _ = make_inputs(1, heads, key_heads, length, head_dim, head_dim, dtype=torch.float32, seed=seed, learned=False)
        rate = -torch.logspace(-0.2, -2.7, heads)
        rate = rate[None, :, None] * torch.rand(1, heads, length, generator=torch.Generator().manual_seed(seed)) if per_token else rate
        for results, function, dtype in ((exact, reference, torch.float64), (plain, reference, None), (ours, linear_attention, None)):
            tensors, leaf = [x.to(dtype) for x in (query, key, value)], rate.to(dtype).requires_grad_()
            results.append(gradients(function, tensors, {"log_decay": leaf})[1]["log_decay"].flatten())
    exact, plain, ours = map(torch.cat, (exact, plain, ours))
    assert distance(ours, exact) <= 3 * distance(plain, exact)


@pytest.mark.parametrize("quadratic", [False, True])
def test_a_decay_over_a_long_sequence_in_float32(quadratic):
    """The running sum of the decay keeps its digits: after 16,000 tokens, all forgotten, the last ones are as near as without them."""
    tensors, options = make_inputs(1, 2, 2, 16384, 8, 8, dtype=torch.float32, decay="query_token", quadratic=quadratic, learned=False)
    last = [x.detach()[:, :, -500:] for x in tensors]
    rate = options.pop("log_decay").detach()
    weight = torch.zeros(1, 2, 500, 8).index_fill_(2, torch.arange(300, 500), 1) * torch.randn(1, 2, 500, 8)

    def tail(function, tensors, rate, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (*tensors, rate)]
        out = function(*leaves[:3], **options, log_decay=leaves[3])[:, :, -500:]
        return [x[..., -200:, :] if x.dim() == 4 else x[..., -200:] for x in (out, *torch.autograd.grad((out * weight).sum(), leaves))]

    exact = tail(reference, last, rate[..., -500:], torch.float64)
    plain = tail(reference, last, rate[..., -500:], torch.float32)
    ours = tail(linear_attention, tensors, rate, torch.float32)
    for of_ours, of_plain, of_exact in zip(ours, plain, exact, strict=True):
        assert distance(of_ours, of_exact) <= 3 * distance(of_plain, of_exact)


@pytest.mark.parametrize("quadratic", [False, True])
def test_what_was_forgotten_costs_no_digits(quadratic):
    """Behind 4,000 tokens that forget at once the running sum is -20,000, and states with time constants of 500 tokens matter."""
    tensors, options = make_inputs(1, 2, 2, 8192, 8, 8, dtype=torch.float32, quadratic=quadratic, learned=False, grad=False)
    rate = torch.cat([torch.full((1, 2, 4096), -5.0), torch.full((1, 2, 4096), -1 / 500)], -1)
    weight = torch.randn(1, 2, 8192, 8)

    def slow_half(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (*tensors, rate)]
        out = linear_attention(*leaves[:3], **options, log_decay=leaves[3])
        grads = torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)
        return [x[..., 4096:, :] if x.dim() == 4 else x[..., 4096:] for x in (out, *grads)]

    for single, double in zip(slow_half(torch.float32), slow_half(torch.float64), strict=True):
        assert distance(single, double) < 3e-6  # measured: 3e-7 to 6e-7


def test_long_sequence_in_bfloat16():
    """The state is summed in float32: the error does not grow with N."""
    errors = []
    for length in (256, 8192):
        tensors, _ = make_inputs(1, 1, 1, length, 16, 16, dtype=torch.bfloat16, learned=False)
        exact = linear_attention(*(x.detach().double() for x in tensors), b=0.5)
        errors.append(distance(linear_attention(*tensors, b=0.5), exact))
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("options", [{}, {"decay": "query_token", "segments": "packed"}, {"quadratic": True, "segments": "mask"}], ids=str)
def test_what_onnx_takes_is_summed_in_float32_or_wider(options, monkeypatch):
    monkeypatch.setattr(functional, "is_for_onnx", lambda has_state_or_noise: not has_state_or_noise)
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), *[(x, x) for x in (torch.float32, torch.float64)]):
        tensors, given = make_inputs(dtype=dtype, grad=False, **options)
        ids = {"segment_ids": given["segment_ids"].int()} if "segment_ids" in given else {}
        found = linear_attention(*tensors, **given)
        assert found.dtype == dtype and torch.equal(found, reference(*(x.to(wide) for x in tensors), **given | ids).to(dtype))
