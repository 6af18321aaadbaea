"""The compiled kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race, nothing read before it is written.

`make test-gpu` installs the sanitizer of 2026 from its wheel: older ones report races across Hopper's warpgroup barriers that are none.
"""

import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OLDEST = 2026


@lru_cache
def sanitizer() -> str | None:
    """compute-sanitizer of the wheel nvidia-cuda-sanitizer-api or of the CUDA toolkit; None where both are too old."""
    wheel = find_spec("nvidia")
    folders = [Path(place) for place in wheel.submodule_search_locations or []] if wheel else []
    found = [str(tool) for folder in folders for tool in folder.glob("cu*/compute-sanitizer/compute-sanitizer")]
    for tool in filter(None, (*found, shutil.which("compute-sanitizer"), shutil.which("/usr/local/cuda/bin/compute-sanitizer"))):
        version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
        if int((re.search(r"Version (\d+)", version) or [0, 0])[1]) >= OLDEST:
            return tool
    return None


SHAPES = [*product(("bfloat16", "float16", "float32"), (24, 32, 64, 96, 128)), ("bfloat16", 192), ("float16", 136)]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("dtype, head_dim", SHAPES)
def test_sanitizer(tool, dtype, head_dim):
    if sanitizer() is None:
        pytest.skip(f"needs compute-sanitizer {OLDEST} or later: pip install nvidia-cuda-sanitizer-api")
    # without the caching allocator every tensor is an allocation of its own, so that bounds and first writes are those of the tensor
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "HF_LINATTN_BACKEND": "cuda",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    options = ["--kernel-name", "kernel_substring=linattn", "--error-exitcode", "7", "--print-limit", "20"]
    done = subprocess.run(
        [sanitizer(), "--tool", tool, *options, sys.executable, HERE / "sanitized_calls.py", dtype, str(head_dim)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "every call ran" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
