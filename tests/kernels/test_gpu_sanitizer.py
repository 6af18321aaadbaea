"""The compiled kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race, nothing read before it is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
HERE = Path(__file__).resolve().parent
HEAD_DIMS = (24, 32, 64, 96, 128)
TOOL = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer, which comes with the CUDA toolkit, is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sanitizer(tool, dtype, head_dim):
    # without the caching allocator every tensor is an allocation of its own, so that bounds and first writes are those of the tensor
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "HF_LINATTN_BACKEND": "cuda",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
    }  # fmt: skip
    options = ["--kernel-name", "kernel_substring=linattn", "--error-exitcode", "7", "--print-limit", "20"]
    done = subprocess.run(
        [TOOL, "--tool", tool, *options, sys.executable, HERE / "sanitized_calls.py", dtype, str(head_dim)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "every call ran" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
