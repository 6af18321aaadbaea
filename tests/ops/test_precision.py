"""Errors against float64, beside those of the same formula in the same dtype in plain PyTorch: at most twice, gradients three times."""

import pytest
import torch
from operator_cases import gradients, make_inputs

from hf_linattn import linear_attention
from hf_linattn.ops import reference

OPTIONS = {
    "linear": {},
    "decay": {"decay": "query_head"},
    "gate": {"decay": "key_token"},
    "quadratic": {"quadratic": True},
    "packed": {"segments": "packed"},
}


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
    for leaf, grad in our_grads.items():
        assert grad.dtype == dtype, leaf
        assert distance(grad, exact_grads[leaf]) <= 3 * distance(plain_grads[leaf], exact_grads[leaf]) + 1e-6, leaf


def test_long_sequence_in_bfloat16():
    """The state is summed in float32: the error does not grow with N."""
    errors = []
    for length in (256, 8192):
        tensors, _ = make_inputs(1, 1, 1, length, 16, 16, dtype=torch.bfloat16, learned=False)
        exact = linear_attention(*(x.detach().double() for x in tensors), b=0.5)
        errors.append(distance(linear_attention(*tensors, b=0.5), exact))
    assert errors[1] < 2 * errors[0]
