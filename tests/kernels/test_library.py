"""The compiled library from the CPU's side: it loads, says what it holds, agrees with Python about its structures, and is missed loudly."""

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from hf_linattn import env
from hf_linattn.ops import chunked, cuda
from hf_linattn.ops.call import Call

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = [
    "linattn_forward", "linattn_backward", "linattn_step", "linattn_plan_forward", "linattn_plan_backward", "linattn_plan_step",
    "linattn_window_step", "linattn_plan_window_step", "linattn_engine_name", "linattn_error_string", "linattn_architectures",
    "linattn_struct_bytes", "linattn_interface", "linattn_runs", "linattn_decay_at_tokens", "linattn_sum_at_tokens",
]  # fmt: skip
INTERFACE = 2, "c9a85dfb877f0d77"
"""Its number, and a hash of its headers' code."""

needs_library = pytest.mark.skipif(not cuda.LIBRARY.exists(), reason="the compiled library is not built here (make kernels)")


def call(dtype=torch.float32, dim=8):
    x = torch.randn(1, 2, 5, dim, dtype=dtype)
    return Call(x, x, x, torch.ones(4, 2))


@needs_library
def test_exports_the_interface_and_nothing_is_undefined():
    library = ctypes.CDLL(str(cuda.LIBRARY), mode=os.RTLD_NOW)
    for name in FUNCTIONS:
        assert hasattr(library, name), name


@needs_library
def test_structures_are_those_of_the_header():
    library, cause = cuda.load_library()
    assert library is not None, cause
    for which, struct in enumerate(cuda._STRUCTS):
        assert library.linattn_struct_bytes(which) == ctypes.sizeof(struct)


@needs_library
def test_a_library_of_the_same_number_with_other_structures_is_refused(monkeypatch):
    """Built while its headers were being changed, and before they were counted."""
    longer = type("longer", (ctypes.Structure,), {"_fields_": [*cuda._Plan._fields_, ("more", ctypes.c_int64)]})
    monkeypatch.setattr(cuda, "_STRUCTS", tuple(longer if struct is cuda._Plan else struct for struct in cuda._STRUCTS))
    library, cause = cuda.load_library.__wrapped__()
    assert library is None and "is of another version than this Python code" in cause


def test_the_interface_has_another_number_where_it_is_another():
    """A function that takes something else than before would be called all the same, by Python of another day than the library."""
    headers = "".join((ROOT / "kernels" / name).read_text() for name in ("linattn.h", "runs.h"))
    code = "".join(re.sub(r"//.*", "", headers).split())
    hashed = hashlib.sha256(code.encode()).hexdigest()[:16]
    told = "linattn.h or runs.h has changed: count INTERFACE up here, in kernels/interface.h and in hf_linattn/ops/cuda.py"
    assert (cuda.INTERFACE, hashed) == INTERFACE, told
    assert f"#define LINATTN_INTERFACE {cuda.INTERFACE}\n" in (ROOT / "kernels" / "interface.h").read_text()


@pytest.mark.parametrize("card, built, runs", [
    ((7, 5), "sm_80 compute_80 sm_90a", False), ((8, 0), "sm_80", True), ((8, 9), "sm_80", True), ((9, 0), "sm_80", False),
    ((9, 0), "sm_90a", True), ((8, 0), "sm_90a", False), ((10, 0), "sm_90a", False), ((10, 0), "sm_80 sm_90", False),
    ((12, 0), "sm_80 compute_80", True), ((8, 0), "sm_86 compute_86", False),
])  # fmt: skip
def test_a_library_without_code_for_the_card_is_not_run(monkeypatch, card, built, runs):
    monkeypatch.setattr(cuda, "load_library", lambda: (None, ""))
    monkeypatch.setattr(cuda, "architectures", lambda: built)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in (("is_available", True), ("get_device_capability", card), ("get_device_name", "A card")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    said = cuda.cannot_run.__wrapped__()
    assert said == "" if runs else said.startswith(f"A card has compute capability {card[0]}.{card[1]}, and the ")


@needs_library
def test_architectures():
    assert "sm_90a" in cuda.architectures().split()  # `make test` compiles no more where there is no GPU


@needs_library
def test_without_a_device_no_engine_takes_a_call():
    library, _ = cuda.load_library()
    problem = cuda._Problem(batch=2, query_heads=4, key_heads=2, state_heads=2, head_dim=64, value_dim=64, length=100)
    problem.dtype, problem.degree, problem.causal, problem.normalize_qk = 2, 1, 1, 1
    for name, results in (("forward", cuda._ForwardResult()), ("backward", cuda._BackwardData()), ("step", cuda._ForwardResult())):
        plan = cuda._Plan(engine=9, workspace_bytes=9)
        getattr(library, f"linattn_plan_{name}")(ctypes.byref(problem), ctypes.byref(results), ctypes.byref(plan))
        if not torch.cuda.is_available():
            assert (plan.engine, plan.workspace_bytes) == (0, 0)
        run = getattr(library, f"linattn_{name}")
        assert run(ctypes.byref(problem), ctypes.byref(results), ctypes.byref(cuda._Plan())) != 0  # a plan of no engine is refused


def test_a_missing_library_is_one_sentence_with_a_cure(tmp_path):
    library, cause = cuda.load_library(tmp_path / "_kernels.so")
    assert library is None and "_kernels.so" in cause and "pip install" in cause


def test_a_broken_library_is_one_sentence_with_a_cure(tmp_path):
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"not a library")
    library, cause = cuda.load_library(broken)
    assert library is None and "does not load" in cause and "pip install" in cause


@pytest.mark.parametrize("functions", [FUNCTIONS, [name for name in FUNCTIONS if name != "linattn_interface"]], ids=["number", "no number"])
def test_an_older_library_is_refused(functions, tmp_path):
    source, target = tmp_path / "old.c", tmp_path / "_kernels.so"
    source.write_text("".join(f"long {name}(void) {{ return 8; }}\n" for name in functions))
    try:
        subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(target)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no C compiler here")
    library, cause = cuda.load_library(target)
    assert library is None and "another version" in cause


@pytest.fixture
def cannot(monkeypatch):
    monkeypatch.setattr(cuda, "cannot_run", lambda device=0: "the card is too old")
    monkeypatch.setattr(cuda, "_warned", set())
    monkeypatch.delenv("HF_LINATTN_BACKEND", raising=False)


def test_falls_back_with_one_loud_warning(cannot):
    given = call()
    with pytest.warns(UserWarning, match="the card is too old"):
        results = cuda.forward(given, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda.forward(given, False)
    for ours, expected in zip(results, chunked.forward(given, False), strict=True):
        assert ours is expected is None or torch.equal(ours, expected)


def test_backend_cuda_makes_it_an_error(cannot, monkeypatch):
    monkeypatch.setenv("HF_LINATTN_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="HF_LINATTN_BACKEND=cuda asks for the compiled kernels, but the card is too old"):
        cuda.forward(call(), False)


def test_backend_torch_is_silent(cannot, monkeypatch):
    monkeypatch.setenv("HF_LINATTN_BACKEND", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda.forward(call(), False)


def test_an_unknown_backend_names_the_known_ones(monkeypatch):
    monkeypatch.setenv("HF_LINATTN_BACKEND", "gpu")
    with pytest.raises(ValueError, match="auto, cuda, torch"):
        cuda.backend()


def test_what_the_kernels_cannot_take(monkeypatch):
    monkeypatch.setattr(cuda, "cannot_run", lambda device=0: "")
    monkeypatch.setenv("HF_LINATTN_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="float64"):
        cuda.forward(call(torch.float64), False)
    with pytest.raises(RuntimeError, match="up to 256"):
        cuda.forward(call(dim=257), False)


def test_env_says_what_runs_and_why():
    done = subprocess.run([sys.executable, "-m", "hf_linattn.env"], capture_output=True, text=True, cwd=ROOT, check=True)
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert {"PyTorch", "CUDA of PyTorch", "library", "architectures", "runs"} <= {name.strip() for name in lines}
    assert done.stdout.count("\n") == len(env.report())


@pytest.mark.parametrize("wish, expected", [("torch", "HF_LINATTN_BACKEND=torch"), ("cuda", "but no card"), ("auto", "because no card"),
                                            ("gpu", "must be one of")])  # fmt: skip
def test_env_verdict(monkeypatch, wish, expected):
    monkeypatch.setenv("HF_LINATTN_BACKEND", wish)
    assert expected in env._verdict("no card")


@pytest.mark.parametrize(
    "cuda_version, devices, library, expected",
    [
        (None, 0, False, "not built for CUDA; if there is a GPU here"),
        ("13.0", 0, False, "no usable GPU; if there is one here"),
        ("13.0", 1, False, "the library is missing, as told above"),
        ("13.0", 1, True, "the card is too old"),
    ],
)
def test_env_tells_a_cause_once(monkeypatch, cuda_version, devices, library, expected):
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "A card")
    monkeypatch.setattr(cuda, "load_library", lambda: (None, f"the library is lost: {cuda.CURE}"))
    monkeypatch.setattr(cuda, "architectures", lambda: "")
    monkeypatch.setattr(cuda, "cannot_run", lambda device=0: "the card is too old")
    rows = dict(env.report())
    assert expected in env._verdict(env._why_not(devices, library)) and str(rows).count("is lost") == 1
    assert (cuda.CURE in rows["library"]) == bool(devices) and cuda.CURE not in rows["runs"]
