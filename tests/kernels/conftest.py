"""The kernels on the CPU, built once for all tests that run them there."""

from pathlib import Path

import accuracy_bar
import pytest
from emulation import build, library
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]


def built(hopper: bool) -> Path:
    if build.compiler() is None or build.headers() is None:
        pytest.skip("needs g++ or clang++, and CUDA's headers")
    folder = ROOT / "build" / f"emulated-{build.digest()}"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):  # the other workers wait for the first
        return build.build(folder, hopper)


@pytest.fixture(scope="session")
def emulated():
    return built(hopper=False)


@pytest.fixture(scope="session")
def emulated_hopper():
    return built(hopper=True)


@pytest.fixture
def kernels(emulated, monkeypatch):
    """`cuda` runs the emulated kernels, and the accuracy bar takes one seed."""
    library.use(emulated, monkeypatch)
    monkeypatch.setattr(accuracy_bar, "SEEDS", range(1))


@pytest.fixture
def hopper_kernels(emulated_hopper, monkeypatch):
    """The same with the kernels for Hopper alone, on a card that is one; the other engines' code is that of sm_80."""
    library.use(emulated_hopper, monkeypatch)
    monkeypatch.setattr(accuracy_bar, "SEEDS", range(1))


@pytest.fixture
def compiled_only(monkeypatch):
    """No test may pass by falling back."""
    monkeypatch.setenv("HF_LINATTN_BACKEND", "cuda")
