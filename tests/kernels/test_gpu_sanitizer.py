"""The compiled kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race, nothing read before it is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_linattn.ops import cuda

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOOL = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


@pytest.fixture(scope="session")
def library_for_racecheck():
    """racecheck does not follow bar.arrive; in this build the arriving warps wait too. Made here where nvcc is."""
    made = ROOT / "build" / "racecheck" / "_kernels.so"
    if shutil.which("nvcc"):
        done = subprocess.run([sys.executable, "setup.py", "build_kernels", "--racecheck"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert made.exists(), "build it where nvcc is: python setup.py build_kernels --racecheck"
    return made


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer, which comes with the CUDA toolkit, is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("head_dim", [24, 32, 64, 96, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sanitizer(tool, dtype, head_dim, request):
    library = request.getfixturevalue("library_for_racecheck") if tool == "racecheck" else cuda.LIBRARY
    # without the caching allocator every tensor is an allocation of its own, so that bounds and first writes are those of the tensor
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "HF_LINATTN_BACKEND": "cuda",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    options = ["--kernel-name", "kernel_substring=linattn", "--error-exitcode", "7", "--print-limit", "20"]
    done = subprocess.run(
        [TOOL, "--tool", tool, *options, sys.executable, HERE / "sanitized_calls.py", dtype, str(head_dim), library],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "every call ran" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
