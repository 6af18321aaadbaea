"""Small calls of every kind, forward and backward, for compute-sanitizer to watch: `test_gpu_sanitizer.py` runs this file under it, with a
dtype, a head dim and the library to look at."""

import sys
from pathlib import Path

import torch
from accuracy_bar import operator_case, run

from hf_linattn.ops import cuda

KINDS = [
    {},
    {"decay": "key_head", "stateful": True},
    {"decay": "query_token", "segments": "packed"},
    {"segments": "mask", "causal": False},
    {"causal": False, "stateful": True},
    {"degree": 2},
    {"degree": 2, "decay": "key_head", "segments": "left", "stateful": True},
    {"noisy": True},
    {"length": 2500, "batch": 1, "heads": 1, "key_heads": 1},  # few heads and many tokens: a sequence is cut into segments
]


def from_the_host(x):
    """The same tensor, written by a copy that the sanitizer has seen: it does not watch PyTorch's kernels."""
    return x.cpu().cuda() if isinstance(x, torch.Tensor) else x


if __name__ == "__main__":
    dtype, head_dim, library = getattr(torch, sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    load = cuda.load_library
    cuda.load_library = lambda: load(library)
    for kind in KINDS:
        inputs, upstream = operator_case(dtype, head_dim=head_dim, value_dim=head_dim, **{"length": 130, **kind})
        inputs, upstream = ([from_the_host(x) for x in given] for given in (inputs, upstream))
        run(cuda, inputs, upstream, kind.get("stateful", False))
    torch.cuda.synchronize()
    print("every call ran")
