"""Small calls of every kind, forward and backward, for compute-sanitizer to watch: `test_gpu_sanitizer.py` runs this file under it, with a
dtype and a head dim."""

import sys

import torch
from accuracy_bar import operator_case, run
from step_cases import step_case
from window_step_cases import on, window_case

from hf_linattn.ops import cuda, padding, window_cuda
from hf_linattn.ops.call import Call

KINDS = [
    {},
    {"decay": "key_head", "stateful": True},
    {"decay": "key_token", "stateful": True, "key_heads": 4},
    {"decay": "query_token", "segments": "packed"},
    {"segments": "mask", "causal": False},
    {"causal": False, "stateful": True},
    {"degree": 2, "length": 70, "batch": 1},
    {"degree": 2, "length": 150, "batch": 1, "causal": False},
    {"degree": 2, "length": 70, "batch": 1, "decay": "key_head", "segments": "left", "stateful": True},
    {"degree": 2, "length": 200, "batch": 1, "decay": "query_token", "segments": "mask"},
    {"noisy": True},
    {"length": 2500, "batch": 1, "heads": 1, "key_heads": 1},  # few heads and many tokens: a sequence is cut into segments
]

# the second degree over 16 features in one pass, as a Hopper of 114 or 132 multiprocessors has it: a block a head, and heads in segments
IN_ONE_PASS = [
    {"length": 1023, "heads": 114, "key_heads": 114, "decay": "key_head", "strengths": (0.01,), "segments": "mask"},
    {"length": 3900, "heads": 16, "key_heads": 16, "decay": "key_token", "strengths": (0.01, 1.0)},
]


def case(dtype, head_dim, **kind):
    """Inputs and upstream gradients, made on the host, for the sanitizer does not see what PyTorch's kernels write."""
    made = operator_case(dtype, device="cpu", **{"length": 130, "head_dim": head_dim, "value_dim": head_dim, **kind})
    return ([x.cuda() if isinstance(x, torch.Tensor) else x for x in given] for given in made)


def padded_on_the_host() -> None:
    """For the same reason: rows and states are padded there."""
    for name in ("padded_rows", "padded_state"):
        made = getattr(padding, name)

        def of_host(x, dim, made=made):
            return None if x is None else made(x.cpu(), dim).cuda()

        setattr(padding, name, of_host)
        setattr(cuda, name, of_host)


if __name__ == "__main__":
    padded_on_the_host()
    dtype, head_dim = getattr(torch, sys.argv[1]), int(sys.argv[2])
    for kind in KINDS:
        run(cuda, *case(dtype, head_dim, **kind), kind.get("stateful", False))
        torch.cuda.synchronize()
        print(kind, flush=True)
    if dtype == torch.bfloat16 and head_dim in (32, 64):
        long = {"degree": 2, "length": 112 * head_dim + 65, "batch": 1, "heads": 2, "key_heads": 1}  # the second degree by states
        cuda.forward(Call(*next(case(dtype, head_dim, **long))), True)
        torch.cuda.synchronize()
        print(long, flush=True)
        gated = {"value_dim": 64, "decay": "key_token", "strengths": (0.01,), "segments": "mask"}  # keys half as wide as the head dim
        for features, kind in ((head_dim, {"length": 80 * head_dim + 65}), (head_dim // 2, gated | {"length": 3650})):
            run(cuda, *case(dtype, features, **{"degree": 2, "batch": 1, "heads": 2, "key_heads": 1} | kind), False)
            torch.cuda.synchronize()
            print("gradients by states", features, kind, flush=True)
    if dtype == torch.bfloat16 and head_dim == 64:
        for kind in IN_ONE_PASS:
            inputs, upstream = case(dtype, 16, **{"degree": 2, "batch": 1, "value_dim": 64} | kind)
            found = cuda.plans(*inputs[:3], degree=2, log_decay=inputs[4], segments=inputs[5])
            assert torch.cuda.get_device_capability()[0] != 9 or all(plan.chunk == 128 for plan in found), found
            run(cuda, inputs, upstream, False)
            torch.cuda.synchronize()
            print("in one pass", kind, flush=True)
        whole = {"length": 520, "batch": 4, "heads": torch.cuda.get_device_properties(0).multi_processor_count // 4, "decay": "key_head"}
        cuda.forward(Call(*next(case(dtype, head_dim, **whole | {"key_heads": whole["heads"]}))), False)  # of a block each
        torch.cuda.synchronize()
        print(whole, flush=True)
    if dtype == torch.bfloat16 and head_dim in (64, 128):
        for features in (16, 24):
            narrow = {"degree": 2, "length": 150, "batch": 1, "decay": "key_head", "value_dim": head_dim}
            run(cuda, *case(dtype, features, **narrow), False)
            torch.cuda.synchronize()
            print(narrow, flush=True)
    second = {"degree": 2, "padded": True, "heads": 9, "key_heads": 3, "state_heads": 9, "decay": "token"}
    shared = {"heads": 8, "key_heads": 1, "batch": 1, "length": 16}
    for kind in ({"decay": "head"}, second, {"decay": "head", "length": 11}, {**second, "length": 6}, shared, {**shared, "degree": 2}):
        call, state = step_case(dtype, head_dim=head_dim, value_dim=head_dim, **kind)
        cuda.step(Call(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in call)), state.cuda())
        torch.cuda.synchronize()
        print("a few tokens", kind, flush=True)
    for kind in ({}, {"degree": 2, "decay": "key_head", "features": 16}, {"decay": "token", "input_gate": True, "output": "norm gate"},
                 {"is_map": True}):  # fmt: skip
        if kind.get("is_map") and head_dim > 128 or kind.get("features", 0) >= head_dim:
            continue
        on_host = window_case(dtype, head_dim=head_dim, value_dim=head_dim, beside=kind or None, padded=True)
        window_cuda.step(*on("cuda", *on_host))
        torch.cuda.synchronize()
        print("one token of a window", kind, flush=True)
    print("every call ran")
