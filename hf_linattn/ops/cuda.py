"""The compiled form of linear attention: finds the library `_kernels.so`, hands it pointers, sizes, strides and the current stream.

`forward` and `backward` have the operators' signatures. Where the library cannot run, the PyTorch form runs in its place, after one warning
that names the cause and the cure; HF_LINATTN_BACKEND=cuda makes that an error, HF_LINATTN_BACKEND=torch asks for the PyTorch form.
Nothing here waits for the device or allocates outside PyTorch, so calls can be captured in a CUDA graph.
"""

import ctypes
import os
import warnings
from contextlib import nullcontext
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import chunked, one_token
from .features import feature_count

LIBRARY = Path(__file__).resolve().parent.parent / "_kernels.so"
OLDEST_CARD = (8, 0)
MAX_DIM = 256
BACKENDS = ("auto", "cuda", "torch")
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_CURE = "build it with `pip install .` or `python setup.py build_kernels` where nvcc is installed"


# ---- kernels/linattn.h


class _Tensor(Structure):
    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("head_stride", c_int64), ("token_stride", c_int64)]


class _Problem(Structure):
    _fields_ = [
        *[(name, c_int32) for name in ("batch", "query_heads", "key_heads", "state_heads", "head_dim", "value_dim")],
        ("length", c_int64),
        *[(name, c_int32) for name in ("dtype", "degree", "causal", "normalize_qk")],
        *[(name, _Tensor) for name in ("query", "key", "value")],
        ("coefficients", c_void_p),
        ("log_decay", c_void_p),
        ("log_decay_per_token", c_int32),
        ("query_segments", c_void_p),
        ("key_segments", c_void_p),
        ("query_segments_stride", c_int64),
        ("key_segments_stride", c_int64),
        *[(name, c_void_p) for name in ("initial_state", "dropout_p", "seed", "workspace", "stream")],
    ]


class _ForwardResult(Structure):
    _fields_ = [("out", _Tensor), ("mass", c_void_p), ("state", c_void_p)]


class _BackwardData(Structure):
    _fields_ = [
        ("out", _Tensor),
        ("grad_out", _Tensor),
        *[(name, c_void_p) for name in ("mass", "grad_mass", "grad_state")],
        *[(name, _Tensor) for name in ("grad_query", "grad_key", "grad_value")],
        *[(name, c_void_p) for name in ("grad_coefficients", "grad_log_decay", "grad_initial_state")],
    ]


class _Plan(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("workspace_bytes", "chunk", "segment_length")],
        *[(name, c_int32) for name in ("segments", "row_tiles", "shared_bytes", "engine", "states", "gated", "warpgroups")],
    ]


_STRUCTS = (_Problem, _ForwardResult, _BackwardData, _Plan)


@lru_cache
def load_library(path: Path = LIBRARY) -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and one sentence that says why not."""
    if not path.exists():
        return None, f"the compiled library {path.name} is not part of this installation: {_CURE}"
    try:
        library = ctypes.CDLL(str(path))
        library.linattn_struct_bytes.restype = c_int64
        theirs = [library.linattn_struct_bytes(which) for which in range(len(_STRUCTS))]
        for name, results in (("forward", _ForwardResult), ("backward", _BackwardData), ("step", _ForwardResult)):
            plan, run = getattr(library, f"linattn_plan_{name}"), getattr(library, f"linattn_{name}")
            plan.argtypes = run.argtypes = [POINTER(_Problem), POINTER(results), POINTER(_Plan)]
            plan.restype = None
        library.linattn_engine_name.argtypes, library.linattn_engine_name.restype = [c_int], c_char_p
        library.linattn_error_string.argtypes, library.linattn_error_string.restype = [c_int], c_char_p
        library.linattn_architectures.restype = c_char_p
    except (OSError, AttributeError) as error:
        return None, f"the compiled library {path.name} does not load ({error}): {_CURE}"
    if theirs != [ctypes.sizeof(struct) for struct in _STRUCTS]:
        return None, f"the compiled library {path.name} is of another version than this Python code: {_CURE}"
    return library, ""


def architectures() -> str:
    """The architectures compiled in, as "sm_80 compute_80 sm_90a", or "" without the library."""
    library, _ = load_library()
    return "" if library is None else library.linattn_architectures().decode()


def backend() -> str:
    """HF_LINATTN_BACKEND: auto, cuda or torch.

    Raises:
        ValueError: it is set to something else.
    """
    name = os.environ.get("HF_LINATTN_BACKEND", "") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"HF_LINATTN_BACKEND must be one of {', '.join(BACKENDS)}, not {name!r}.")
    return name


@lru_cache
def cannot_run(device: int = 0) -> str:
    """Why the compiled form cannot run on this device, as one sentence, or "" where it can."""
    _, cause = load_library()
    if cause:
        return cause
    if not torch.version.cuda:
        return "this PyTorch is not built for CUDA: install a CUDA build of it"
    if not torch.cuda.is_available():
        return "PyTorch finds no usable CUDA device: check the NVIDIA driver with `nvidia-smi`"
    card = torch.cuda.get_device_capability(device)
    if card < OLDEST_CARD:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {card[0]}.{card[1]}, and the kernels need 8.0 (Ampere) or later"
    return ""


def _cannot_take(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Why the kernels cannot take this problem, or ""."""
    if query.dtype not in _DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > MAX_DIM:
        return f"the kernels take head dimensions up to {MAX_DIM}, not {max(query.shape[-1], value.shape[-1])}"
    if key.shape[2] != query.shape[2]:
        return f"the kernels need as many keys as queries, not {key.shape[2]} and {query.shape[2]}"
    return ""


_warned: set[str] = set()


def _falls_back(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the PyTorch form is to run; warns once for each cause."""
    wish = backend()
    if wish == "torch" or query.numel() == 0 or value.numel() == 0:
        return True
    cause = cannot_run(query.device.index or 0) or _cannot_take(query, key, value)
    if not cause:
        return False
    if wish == "cuda":
        raise RuntimeError(f"HF_LINATTN_BACKEND=cuda asks for the compiled kernels, but {cause}.")
    if cause not in _warned:
        _warned.add(cause)
        silence = "HF_LINATTN_BACKEND=torch silences this"
        warnings.warn(f"hf_linattn runs the slower PyTorch form on the GPU: {cause}. ({silence}.)", stacklevel=3)
    return True


# ---- a call


def _rows(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.is_contiguous() else x.contiguous()


def _aligned_rows(x: Tensor) -> Tensor:
    """As `_rows`, and a copy too where 16-byte reads of the rows would be possible but for where they begin."""
    x = _rows(x)
    begins = (x.data_ptr() // x.element_size(), *x.stride()[:-1])
    return x.contiguous() if x.shape[-1] % 8 == 0 and any(start % 8 for start in begins) else x


def _plain(x: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if x is None or (x.dtype == dtype and x.device == device and x.is_contiguous()):
        return x
    return x.to(device=device, dtype=dtype).contiguous()


def _describe(x: Tensor) -> _Tensor:
    batch, head, token, _ = x.stride()
    return _Tensor(x.data_ptr(), batch, head, token)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _Call:
    """One problem as the library sees it, and every tensor behind its pointers, kept alive until the launch."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, coefficients: Tensor, log_decay: Tensor | None,
                 query_segments: Tensor | None, key_segments: Tensor | None, initial_state: Tensor | None, dropout_p: Tensor | None,
                 seed: Tensor | None, degree: int, causal: bool, normalize_qk: bool) -> None:  # fmt: skip
        device = query.device
        self.query, self.key, self.value = _rows(query), _rows(key), _rows(value)
        noisy = dropout_p is not None and seed is not None
        floats = [_plain(x, torch.float32, device) for x in (coefficients, log_decay, initial_state, dropout_p if noisy else None)]
        segments = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (query_segments, key_segments)]
        seed = _plain(seed, torch.int64, device) if noisy else None
        self.kept = (*floats, *segments, seed)
        problem = _Problem()
        problem.batch, problem.query_heads, problem.length, problem.head_dim = query.shape
        problem.key_heads, problem.value_dim = key.shape[1], value.shape[-1]
        problem.state_heads = chunked.state_heads(query, key, log_decay)
        problem.dtype, problem.degree, problem.causal, problem.normalize_qk = _DTYPES[query.dtype], degree, causal, normalize_qk
        problem.query, problem.key, problem.value = _describe(self.query), _describe(self.key), _describe(self.value)
        problem.coefficients, problem.log_decay, problem.initial_state, problem.dropout_p = map(_pointer, floats)
        problem.log_decay_per_token = log_decay is not None and log_decay.dim() == 3
        problem.query_segments, problem.key_segments = map(_pointer, segments)
        problem.query_segments_stride, problem.key_segments_stride = (0 if x is None else x.stride(0) for x in segments)
        problem.seed = _pointer(seed)
        self.problem = problem

    def plan(self, library: ctypes.CDLL, name: str, results: Structure) -> _Plan:
        """How the library will do this call on the current device."""
        plan = _Plan()
        getattr(library, f"linattn_plan_{name}")(byref(self.problem), byref(results), byref(plan))
        return plan

    def launch(self, name: str, results: Structure) -> None:
        library, _ = load_library()
        assert library is not None
        device = self.query.device
        index = device.index
        with nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index):
            plan = self.plan(library, name, results)
            workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
            self.problem.workspace = workspace.data_ptr()
            self.problem.stream = torch.cuda.current_stream(index).cuda_stream
            code = getattr(library, f"linattn_{name}")(byref(self.problem), byref(results), byref(plan))
        if code:
            raise RuntimeError(f"the {name} kernels of linear attention failed: {library.linattn_error_string(code).decode()}.")


class Plan(NamedTuple):
    """How a call is done: by which engine ("torch": the PyTorch form, "none": nothing here), in which pieces, with how much memory.

    chunk: tokens whose pairs are formed, or that are worked on together. segments: of each head's sequence. shared_bytes: of shared memory,
    by the block that takes most. workspace_bytes: of scratch memory.
    """

    engine: str
    chunk: int = 0
    segments: int = 0
    shared_bytes: int = 0
    workspace_bytes: int = 0

    def __str__(self) -> str:
        if not self.workspace_bytes and not self.chunk:
            return self.engine
        pieces = f"chunks of {self.chunk:,}" + (f", {self.segments:,} segments" if self.segments > 1 else "")
        return f"{self.engine} ({pieces}, {self.shared_bytes / 1024:.0f} KB shared, {self.workspace_bytes / 1e6:.1f} MB of workspace)"


def plans(query: Tensor, key: Tensor, value: Tensor, *, degree: int = 1, causal: bool = True, normalize_qk: bool = True,
          log_decay: Tensor | None = None, segments: Tensor | None = None, dropout_p: Tensor | None = None,
          initial_state: Tensor | None = None, return_state: bool = False) -> tuple[Plan, Plan]:  # fmt: skip
    """The plans of such a call, forward and backward (beside the gradient of the state, where that is returned).

    The tensors are as the operators take them: log_decay (Hs,) or (B, Hs, N), segments (B, N) int32, dropout_p without dimensions.
    """
    library, _ = load_library()
    if library is None or cannot_run(query.device.index or 0) or _cannot_take(query, key, value) or backend() == "torch":
        return Plan("torch"), Plan("torch")
    coefficients = query.new_ones(4, query.shape[1], dtype=torch.float32)
    seed = None if dropout_p is None else dropout_p.new_zeros((), dtype=torch.int64)
    call = _Call(
        query, key, value, coefficients, log_decay, segments, segments, initial_state, dropout_p, seed, degree, causal, normalize_qk
    )
    out = _describe(chunked.empty_like_query(query, value.shape[-1]))
    asked = coefficients.data_ptr() if return_state else None  # of the state only whether it is asked for is read
    data = _BackwardData(out=out, grad_out=out, grad_query=_describe(query), grad_key=_describe(key), grad_value=_describe(value))
    data.grad_state = asked
    with torch.cuda.device(query.device):
        found = call.plan(library, "forward", _ForwardResult(out, None, asked)), call.plan(library, "backward", data)
    return tuple(
        Plan(library.linattn_engine_name(x.engine).decode(), x.chunk, x.segments, x.shared_bytes, x.workspace_bytes) for x in found
    )  # type: ignore[return-value]


def paths(*tensors: Tensor, **options) -> tuple[str, str]:
    """The engines of `plans`, by name."""
    forward, backward = plans(*tensors, **options)
    return forward.engine, backward.engine


def forward(query: Tensor, key: Tensor, value: Tensor, coefficients: Tensor, log_decay: Tensor | None, query_segments: Tensor | None,
            key_segments: Tensor | None, initial_state: Tensor | None, dropout_p: Tensor | None, seed: Tensor | None, degree: int,
            causal: bool, normalize_qk: bool, return_state: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `chunked.forward`, on a CUDA device."""
    inputs = query, key, value, coefficients, log_decay, query_segments, key_segments, initial_state, dropout_p, seed
    if _falls_back(query, key, value):
        return chunked.forward(*inputs, degree, causal, normalize_qk, return_state)
    call = _Call(*inputs, degree, causal, normalize_qk)
    out = chunked.empty_like_query(query, value.shape[-1])
    mass = query.new_empty(query.shape[:3], dtype=torch.float32)
    shape = (query.shape[0], call.problem.state_heads, feature_count(query.shape[-1], degree), value.shape[-1] + 1)
    state = query.new_empty(shape if return_state else 0, dtype=torch.float32)
    call.launch("forward", _ForwardResult(_describe(out), mass.data_ptr(), state.data_ptr() if return_state else None))
    return out, mass, state


def backward(grad_out: Tensor, grad_mass: Tensor | None, grad_state: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
             coefficients: Tensor, log_decay: Tensor | None, query_segments: Tensor | None, key_segments: Tensor | None,
             initial_state: Tensor | None, dropout_p: Tensor | None, seed: Tensor | None, out: Tensor, mass: Tensor, degree: int,
             causal: bool, normalize_qk: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `chunked.backward`, on a CUDA device."""
    inputs = query, key, value, coefficients, log_decay, query_segments, key_segments, initial_state, dropout_p, seed
    if _falls_back(query, key, value):
        return chunked.backward(grad_out, grad_mass, grad_state, *inputs, out, mass, degree, causal, normalize_qk)
    call = _Call(*inputs, degree, causal, normalize_qk)
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    grad_coefficients = query.new_empty(coefficients.shape, dtype=torch.float32)
    grad_log_decay = query.new_empty(0 if log_decay is None else log_decay.shape, dtype=torch.float32)
    grad_initial = query.new_empty(0 if initial_state is None else initial_state.shape, dtype=torch.float32)
    device = query.device
    out, grad_out = _rows(out), _aligned_rows(grad_out.to(query.dtype))
    kept = [_plain(x, torch.float32, device) for x in (mass, grad_mass, grad_state)]
    data = _BackwardData()
    data.out, data.grad_out = _describe(out), _describe(grad_out)
    data.mass, data.grad_mass, data.grad_state = map(_pointer, kept)
    data.grad_query, data.grad_key, data.grad_value = _describe(grad_query), _describe(grad_key), _describe(grad_value)
    data.grad_coefficients = grad_coefficients.data_ptr()
    data.grad_log_decay = None if log_decay is None else grad_log_decay.data_ptr()
    data.grad_initial_state = None if initial_state is None else grad_initial.data_ptr()
    call.launch("backward", data)
    return grad_query, grad_key, grad_value, grad_coefficients.to(coefficients.dtype), grad_log_decay, grad_initial


def step(query: Tensor, key: Tensor, value: Tensor, state: Tensor, coefficients: Tensor, log_decay: Tensor | None, segments: Tensor | None,
         degree: int, normalize_qk: bool) -> Tensor:  # fmt: skip
    """As `one_token.step`, on a CUDA device."""
    if _falls_back(query, key, value):
        return one_token.step(query, key, value, state, coefficients, log_decay, segments, degree, normalize_qk)
    call = _Call(query, key, value, coefficients, log_decay, segments, segments, None, None, None, degree, True, normalize_qk)
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    dense = state.contiguous()
    call.launch("step", _ForwardResult(_describe(out), None, dense.data_ptr()))
    if dense is not state:
        state.copy_(dense)
    return out
