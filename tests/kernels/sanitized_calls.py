"""Small calls of every kind, forward and backward, for compute-sanitizer to watch: `test_gpu_sanitizer.py` runs this file under it, with a
dtype and a head dim."""

import sys

import torch
from operator_cases import gradients, make_inputs

from hf_linattn import linear_attention

KINDS = [
    {},
    {"decay": "key_head"},
    {"decay": "query_token", "segments": "packed"},
    {"segments": "mask", "causal": False},
    {"causal": False},
    {"quadratic": True},
    {"quadratic": True, "decay": "key_head", "segments": "left"},
    {"dropout_p": 0.1, "seed": 3},
]


def call(dtype, head_dim, length, causal=True, dropout_p=0.0, seed=None, **kind):
    tensors, options = make_inputs(dtype=torch.float32, device="cuda", length=length, head_dim=head_dim, value_dim=head_dim, **kind)
    tensors = [x.detach().to(dtype).requires_grad_() for x in tensors]
    gradients(lambda *x, **k: linear_attention(*x, **k, causal=causal, dropout_p=dropout_p, seed=seed), tensors, options)


def call_with_state(dtype, head_dim):
    tensors, options = make_inputs(dtype=torch.float32, device="cuda", length=130, head_dim=head_dim, value_dim=head_dim)
    tensors = [x.detach().to(dtype).requires_grad_() for x in tensors]
    _, state = linear_attention(*tensors, **options, return_state=True)
    out, state = linear_attention(*tensors, **options, initial_state=state, return_state=True)
    torch.autograd.grad(out.float().sum() + state.sum(), tensors)


if __name__ == "__main__":
    dtype, head_dim = getattr(torch, sys.argv[1]), int(sys.argv[2])
    for kind in KINDS:
        call(dtype, head_dim, 130, **kind)
    call_with_state(dtype, head_dim)
    call(dtype, head_dim, 2500, batch=1, heads=1, key_heads=1)  # few heads and many tokens: a sequence is cut into segments
    torch.cuda.synchronize()
    print("every call ran")
