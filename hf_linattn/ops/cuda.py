"""The compiled form of linear attention: finds the library `_kernels.so`, hands it pointers, sizes, strides and the current stream.

`forward` and `backward` have the operators' signatures. Where the library cannot run, the PyTorch form runs in its place, after one warning
that names the cause and the cure; HF_LINATTN_BACKEND=cuda makes that an error, HF_LINATTN_BACKEND=torch asks for the PyTorch form.
Nothing here waits for the device or allocates outside PyTorch, so calls can be captured in a CUDA graph.
"""

import ctypes
import operator
import os
import warnings
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import chunked, device, one_token
from .call import TENSORS, Call, Forward, Gradients
from .known import BACKWARD, FORWARD, Known, Launches, Layout, at, layout
from .padding import copy_rows, padded_call, padded_rows, padded_state, state_without_padding
from .precision import in_full_precision

LIBRARY = Path(__file__).resolve().parent.parent / "_kernels.so"
OLDEST_CARD = (8, 0)
MAX_DIM = 256
BACKENDS = ("auto", "cuda", "torch")
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CURE = "build it with `pip install .` or `python setup.py build_kernels` where nvcc is installed"


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
        *[(name, c_void_p) for name in ("grad_coefficients", "grad_log_decay", "grad_initial_state", "segment_states")],
        ("kept_segment_length", c_int64),
    ]


class _Plan(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("workspace_bytes", "chunk", "segment_length", "kept_bytes")],
        *[(name, c_int32) for name in ("segments", "row_tiles", "shared_bytes", "engine", "states", "gated", "warpgroups", "padded_dim")],
    ]


class _Window(Structure):
    _fields_ = [
        *[(name, c_int32) for name in ("batch", "query_heads", "key_heads", "head_dim", "value_dim", "window", "sinks", "dtype")],
        ("scaling", c_float),
        *[(name, _Tensor) for name in ("query", "key", "value", "out", "ring_key", "ring_value")],
        ("seen", c_void_p),
        ("real", c_void_p),
        ("real_stride", c_int64),
        ("workspace", c_void_p),
        ("stream", c_void_p),
    ]


class _Beside(Structure):
    _fields_ = [
        *[(name, c_int32) for name in ("state_heads", "features", "degree", "normalize_qk")],
        *[(name, c_void_p) for name in ("state", "coefficients", "log_decay")],
        ("log_decay_per_token", c_int32),
        *[(name, c_void_p) for name in ("log_input_gate", "kept", "query_matrix", "key_matrix", "key_center")],
        ("is_map", c_int32),
        ("gate", c_void_p),
        ("gate_stride", c_int64),
        *[(name, c_void_p) for name in ("output_power", "output_log_scale", "output_gate")],
    ]


# ---- kernels/runs.h


class _Segments(Structure):
    _fields_ = [
        ("ids", c_void_p),
        *[(name, c_int64) for name in ("row_stride", "token_stride", "length")],
        *[(name, c_int32) for name in ("batch", "dtype")],
    ]


class _Decay(Structure):
    _fields_ = [
        ("log_decay", c_void_p),
        *[(name, c_int64) for name in ("batch_stride", "head_stride", "token_stride", "length")],
        *[(name, c_int32) for name in ("batch", "heads")],
    ]


INTERFACE = 2
"""Of `kernels/interface.h`: counts up with every change of its headers."""
_STRUCTS = (_Problem, _ForwardResult, _BackwardData, _Plan, _Window, _Beside, _Segments, _Decay)


@lru_cache
def load_library(path: Path = LIBRARY) -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and one sentence that says why not."""
    if not path.exists():
        return None, f"the compiled library {path.name} is not part of this installation: {CURE}"
    try:
        library = ctypes.CDLL(str(path))
        is_ours = hasattr(library, "linattn_interface") and library.linattn_interface() == INTERFACE
        if not is_ours or any(library.linattn_struct_bytes(which) != ctypes.sizeof(struct) for which, struct in enumerate(_STRUCTS)):
            return None, f"the compiled library {path.name} is of another version than this Python code: {CURE}"
        for name, problem, results in (("forward", _Problem, _ForwardResult), ("backward", _Problem, _BackwardData),
                                       ("step", _Problem, _ForwardResult), ("window_step", _Window, _Beside)):  # fmt: skip
            plan, run = getattr(library, f"linattn_plan_{name}"), getattr(library, f"linattn_{name}")
            plan.argtypes, plan.restype = [POINTER(problem), POINTER(results), POINTER(_Plan)], None
            run.argtypes = [c_void_p] * 3  # the same, or the same as bytes
        library.linattn_runs.argtypes = [POINTER(_Segments), POINTER(_Decay), c_void_p, c_void_p, c_void_p]
        for name in ("decay_at_tokens", "sum_at_tokens"):
            getattr(library, f"linattn_{name}").argtypes = [POINTER(_Decay), c_void_p, c_void_p, c_void_p]
        library.linattn_engine_name.argtypes, library.linattn_engine_name.restype = [c_int], c_char_p
        library.linattn_error_string.argtypes, library.linattn_error_string.restype = [c_int], c_char_p
        library.linattn_architectures.restype = c_char_p
    except (OSError, AttributeError) as error:
        return None, f"the compiled library {path.name} does not load ({error}): {CURE}"
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
    told = f"{torch.cuda.get_device_name(device)} has compute capability {card[0]}.{card[1]}"
    if card < OLDEST_CARD:
        return f"{told}, and the kernels need 8.0 (Ampere) or later"
    if not any(_serves(name, card) for name in architectures().split()):
        return f"{told}, and the library was built for {architectures()} alone: {CURE}"
    return ""


def _serves(architecture: str, card: tuple[int, int]) -> bool:
    """sm_80 runs on cards of its kind from 8.0 on, sm_90a on 9.0 alone, compute_80 is translated for every card from 8.0 on."""
    kind, digits = architecture.split("_")
    built = int(digits.rstrip("a")[:-1]), int(digits.rstrip("a")[-1])
    if kind == "compute":
        return built <= card
    return built == card if digits.endswith("a") else built[0] == card[0] and built <= card


def _cannot_take(call: Call) -> str:
    """Why the kernels cannot take this problem, or ""."""
    _, _, length, head_dim = call.query.shape
    _, _, keys, value_dim = call.value.shape
    if call.query.dtype not in _DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {call.query.dtype}"
    if head_dim > MAX_DIM or value_dim > MAX_DIM:
        return f"the kernels take head dimensions up to {MAX_DIM}, not {max(head_dim, value_dim)}"
    if keys != length:
        return f"the kernels need as many keys as queries, not {keys} and {length}"
    return ""


_warned: set[str] = set()


def falls_back(call: Any, cannot_take: Callable[[Any], str] = _cannot_take) -> bool:
    """Whether the PyTorch form is to run, of what has a query and a value; warns once for each cause."""
    wish = backend()
    if wish == "torch" or call.query.numel() == 0 or call.value.numel() == 0:
        return True
    cause = cannot_run(call.query.device.index or 0) or cannot_take(call)
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


def _rows_of_segments(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _describe(x: Tensor) -> _Tensor:
    return _Tensor(x.data_ptr(), *x.stride()[:3])


class _Launch:
    """A call as the library sees it, and every tensor behind its pointers, kept alive until it is launched."""

    def __init__(self, call: Call) -> None:
        query, key, value = _rows(call.query), _rows(call.key), _rows(call.value)
        self.device = on = query.device
        coefficients, log_decay = _plain(call.coefficients, torch.float32, on), _plain(call.log_decay, torch.float32, on)
        initial_state = _plain(call.initial_state, torch.float32, on)
        dropout_p = seed = None
        if call.dropout_p is not None and call.seed is not None:
            dropout_p, seed = _plain(call.dropout_p, torch.float32, on), _plain(call.seed, torch.int64, on)
        query_segments, key_segments = _rows_of_segments(call.query_segments), _rows_of_segments(call.key_segments)
        self.given = query, key, value, coefficients, log_decay, query_segments, key_segments, initial_state, dropout_p, seed
        batch, heads, length, head_dim = query.shape
        self.problem = _Problem(
            batch, heads, key.shape[1], call.state_heads, head_dim, value.shape[3], length,
            _DTYPES[query.dtype], call.degree, call.causal, call.normalize_qk, _describe(query), _describe(key), _describe(value),
            at(coefficients), at(log_decay), log_decay is not None and log_decay.dim() == 3,
            at(query_segments), at(key_segments),
            0 if query_segments is None else query_segments.stride(0), 0 if key_segments is None else key_segments.stride(0),
            at(initial_state), at(dropout_p), at(seed),
        )  # fmt: skip

    def reads(self, call: Call) -> bool:
        """Whether the library is given the call's own tensors, and no copies."""
        return all(map(operator.is_, self.given, call.tensors))

    def plan(self, name: str, results: Structure) -> _Plan:
        """How the library will do this call on its device."""
        library, _ = load_library()
        assert library is not None
        plan = _Plan()
        with device.current(self.device):
            getattr(library, f"linattn_plan_{name}")(byref(self.problem), byref(results), byref(plan))
        return plan

    def run(self, name: str, results: Structure, plan: _Plan) -> Tensor | None:
        """Returns the workspace, which the plan may have a use for."""
        library, _ = load_library()
        assert library is not None
        with device.current(self.device):
            workspace = device.memory(plan.workspace_bytes, self.device)
            self.problem.workspace, self.problem.stream = at(workspace), device.stream(self.device)
            code = getattr(library, f"linattn_{name}")(byref(self.problem), byref(results), byref(plan))
        _raise_if(code, name)
        return workspace

    def known(self, name: str, form: Struct, results: Structure, plan: _Plan, out: Tensor) -> Known:
        """What is kept of it for calls of the same layout, which make an output like this one."""
        return Known.of(getattr(load_library()[0], f"linattn_{name}"), self.problem, form, results, plan, out)


def _raise_if(code: int, name: str) -> None:
    if code and (library := load_library()[0]) is not None:
        raise RuntimeError(f"the {name} kernels of linear attention failed: {library.linattn_error_string(code).decode()}.")


class Kept(NamedTuple):
    """What a forward call leaves to its backward pass, so that it need not be made again: states of segments of a length."""

    states: Tensor
    segment_length: int


class Plan(NamedTuple):
    """How a call is done: by which engine ("torch": the PyTorch form, "none": nothing here), in which pieces, with how much memory.

    chunk: tokens whose pairs are formed, or that are worked on together. segments: of each head's sequence. shared_bytes: of shared memory,
    by the block that takes most. workspace_bytes: of scratch memory. padded_dim: of the rows that queries, keys, values and results are
    copied to, zeros behind; 0: none.
    """

    engine: str
    chunk: int = 0
    segments: int = 0
    shared_bytes: int = 0
    workspace_bytes: int = 0
    padded_dim: int = 0

    @property
    def path(self) -> str:
        """The engine, and the head dim that it runs at where that is not the call's: "stream", "stream at 64"."""
        return f"{self.engine} at {self.padded_dim}" if self.padded_dim else self.engine

    def __str__(self) -> str:
        if not self.workspace_bytes and not self.chunk:
            return self.engine
        pieces = f"chunks of {self.chunk:,}" + (f", {self.segments:,} segments" if self.segments > 1 else "")
        return f"{self.path} ({pieces}, {self.shared_bytes / 1024:.0f} KB shared, {self.workspace_bytes / 1e6:.1f} MB of workspace)"


def plans(query: Tensor, key: Tensor, value: Tensor, *, degree: int = 1, causal: bool = True, normalize_qk: bool = True,
          log_decay: Tensor | None = None, segments: Tensor | None = None, dropout_p: Tensor | None = None,
          initial_state: Tensor | None = None, return_state: bool = False) -> tuple[Plan, Plan]:  # fmt: skip
    """The plans of such a call, forward and backward (beside the gradient of the state, where that is returned).

    The tensors are as the operators take them: log_decay (Hs,) or (B, Hs, N), segments (B, N) int32, dropout_p without dimensions.
    """
    library, _ = load_library()
    coefficients = query.new_ones(4, query.shape[1], dtype=torch.float32)
    seed = None if dropout_p is None else dropout_p.new_zeros((), dtype=torch.int64)
    call = Call(
        query, key, value, coefficients, log_decay, segments, segments, initial_state, dropout_p, seed, degree, causal, normalize_qk
    )
    if library is None or cannot_run(query.device.index or 0) or _cannot_take(call) or backend() == "torch":
        return Plan("torch"), Plan("torch")
    launch = _Launch(call)
    out = _describe(call.empty_out())
    asked = coefficients.data_ptr() if return_state else None  # of the state only whether it is asked for is read
    data = _BackwardData(out=out, grad_out=out, grad_query=_describe(query), grad_key=_describe(key), grad_value=_describe(value))
    data.grad_state = asked
    found = launch.plan("forward", _ForwardResult(out, None, asked)), launch.plan("backward", data)
    return tuple(
        Plan(library.linattn_engine_name(x.engine).decode(), x.chunk, x.segments, x.shared_bytes, x.workspace_bytes, x.padded_dim)
        for x in found
    )  # type: ignore[return-value]


def paths(*tensors: Tensor, **options) -> tuple[str, str]:
    """The paths of `plans`."""
    forward, backward = plans(*tensors, **options)
    return forward.path, backward.path


_forwards, _backwards, _steps = Launches(), Launches(), Launches()


def forward(call: Call, return_state: bool) -> Forward:
    """As `chunked.forward`, on a CUDA device."""
    return forward_keeping(call, return_state)[0]


def forward_keeping(call: Call, return_state: bool) -> tuple[Forward, Kept | None]:
    """`forward`, and what `backward` takes over of it, if anything."""
    given = layout(call.tensors, call[TENSORS:], return_state)
    known = None if backend() == "torch" else _forwards.get(given)
    if known is None:
        return _forward_anew(call, return_state, given)
    query = call.query
    out = query.new_empty_strided(*known.out)
    mass = query.new_empty(query.shape[:3], dtype=torch.float32)
    state = query.new_empty(call.state_shape, dtype=torch.float32) if return_state else None
    code, workspace = known.launch(call, FORWARD.pack(out.data_ptr(), *known.results, mass.data_ptr(), at(state)))
    _raise_if(code, "forward")
    return (out, mass, state), Kept(workspace, known.segment_length) if workspace is not None and known.keeps else None


@in_full_precision  # a known launch has no operator that autocast would change
def _forward_anew(call: Call, return_state: bool, given: Layout) -> tuple[Forward, Kept | None]:
    if falls_back(call):
        return chunked.forward(call, return_state), None
    query, launch = call.query, _Launch(call)
    out = call.empty_out()
    mass = query.new_empty(query.shape[:3], dtype=torch.float32)
    state = query.new_empty(call.state_shape, dtype=torch.float32) if return_state else None
    results = _ForwardResult(_describe(out), mass.data_ptr(), at(state))
    plan = launch.plan("forward", results)
    if plan.padded_dim:
        (wide, mass, state), kept = forward_keeping(padded_call(call, plan.padded_dim), return_state)
        return (copy_rows(out, wide[..., : out.shape[-1]]), mass, state_without_padding(state, call.state_shape)), kept
    workspace = launch.run("forward", results, plan)
    if launch.reads(call):
        _forwards.keep(given, launch.known("forward", FORWARD, results, plan, out))
    return (out, mass, state), Kept(workspace, plan.segment_length) if workspace is not None and plan.kept_bytes else None


def backward(call: Call, out: Tensor, mass: Tensor, grad_out: Tensor, grad_mass: Tensor | None, grad_state: Tensor | None,
             kept: Kept | None = None) -> Gradients:  # fmt: skip
    """As `chunked.backward`, on a CUDA device; `kept` is what `forward_keeping` gave beside the same call."""
    states, segment_length = kept or (None, 0)
    given = layout((*call.tensors, out, mass, grad_out, grad_mass, grad_state, states), call[TENSORS:], segment_length)
    known = None if backend() == "torch" else _backwards.get(given)
    if known is None:
        return _backward_anew(call, out, mass, grad_out, grad_mass, grad_state, kept, given)
    grads = grad_query, grad_key, grad_value, grad_coefficients, grad_log_decay, grad_initial = _empty_gradients(call)
    of_out, of_grad_out, of_query, of_key, of_value = known.results
    code, _ = known.launch(call, BACKWARD.pack(
        out.data_ptr(), of_out, grad_out.data_ptr(), of_grad_out, mass.data_ptr(), at(grad_mass), at(grad_state),
        grad_query.data_ptr(), of_query, grad_key.data_ptr(), of_key, grad_value.data_ptr(), of_value,
        grad_coefficients.data_ptr(), at(grad_log_decay), at(grad_initial), at(states), segment_length,
    ))  # fmt: skip
    _raise_if(code, "backward")
    return grads


def _needs_float32(call: Call, plan: _Plan) -> bool:
    """Whether gradients are another call's, in float32. The generic kernels round unit vectors to 11 bits; where a weight of the second
    degree nearly vanishes, gradients then are those of another weight than the one that was divided by."""
    library, _ = load_library()
    assert library is not None
    return call.query.dtype == torch.float16 and call.degree == 2 and library.linattn_engine_name(plan.engine) == b"generic"


def _empty_gradients(call: Call) -> Gradients:
    query, coefficients, log_decay, initial = call.query, call.coefficients, call.log_decay, call.initial_state
    return (
        torch.empty_like(query), torch.empty_like(call.key), torch.empty_like(call.value),
        query.new_empty(coefficients.shape, dtype=torch.float32),
        None if log_decay is None else query.new_empty(log_decay.shape, dtype=torch.float32),
        None if initial is None else query.new_empty(initial.shape, dtype=torch.float32),
    )  # fmt: skip


@in_full_precision
def _backward_anew(call: Call, out: Tensor, mass: Tensor, grad_out: Tensor, grad_mass: Tensor | None, grad_state: Tensor | None,
                   kept: Kept | None, given: Layout) -> Gradients:  # fmt: skip
    if falls_back(call):
        return chunked.backward(call, out, mass, grad_out, grad_mass, grad_state)
    query, coefficients, launch = call.query, call.coefficients, _Launch(call)
    grad_query, grad_key, grad_value, grad_coefficients, grad_log_decay, grad_initial = _empty_gradients(call)
    asked = out, mass, grad_out, grad_mass, grad_state
    out, grad_out = _rows(out), _aligned_rows(grad_out.to(query.dtype))
    mass, grad_mass, grad_state = (_plain(x, torch.float32, query.device) for x in (mass, grad_mass, grad_state))  # type: ignore[assignment]
    data = _BackwardData(
        _describe(out), _describe(grad_out), mass.data_ptr(), at(grad_mass), at(grad_state),
        _describe(grad_query), _describe(grad_key), _describe(grad_value),
        grad_coefficients.data_ptr(), at(grad_log_decay), at(grad_initial),
        *((kept.states.data_ptr(), kept.segment_length) if kept else ()),
    )  # fmt: skip
    plan = launch.plan("backward", data)
    if _needs_float32(call, plan):
        of_float32 = call._replace(query=query.float(), key=call.key.float(), value=call.value.float())
        exact = backward(of_float32, out.float(), mass, grad_out.float(), grad_mass, grad_state)
        return grad_query.copy_(exact[0]), grad_key.copy_(exact[1]), grad_value.copy_(exact[2]), *exact[3:]
    if dim := plan.padded_dim:
        upstream = padded_rows(grad_out, dim), grad_mass, padded_state(grad_state, dim)
        wide = backward(padded_call(call, dim), padded_rows(out, dim), mass, *upstream, kept)
        for grad, padded in zip((grad_query, grad_key, grad_value), wide[:3], strict=True):
            copy_rows(grad, padded[..., : grad.shape[-1]])
        return grad_query, grad_key, grad_value, *wide[3:5], state_without_padding(wide[5], call.state_shape)
    launch.run("backward", data, plan)
    if launch.reads(call) and all(map(operator.is_, asked, (out, mass, grad_out, grad_mass, grad_state))):
        _backwards.keep(given, launch.known("backward", BACKWARD, data, plan, out))
    return grad_query, grad_key, grad_value, grad_coefficients.to(coefficients.dtype), grad_log_decay, grad_initial


def step(call: Call, state: Tensor) -> Tensor:
    """As `one_token.step`, on a CUDA device."""
    known = known_step((*call.tensors_of_a_step, state), call[TENSORS:])
    return _step_anew(call, state) if known is None else step_again(known, call, state)


def known_step(tensors: tuple[Tensor | None, ...], others: tuple[Any, ...]) -> Known | None:
    """How a step of this layout was launched: of a call's tensors and the state, and of what else a call is."""
    return None if backend() == "torch" else _steps.get(layout(tensors, others))


def step_again(known: Known, call: Call, state: Tensor) -> Tensor:
    """The step of a known layout."""
    out = call.query.new_empty_strided(*known.out)
    code, _ = known.launch(call, FORWARD.pack(out.data_ptr(), *known.results, 0, state.data_ptr()))
    _raise_if(code, "step")
    return out


@in_full_precision
def _step_anew(call: Call, state: Tensor) -> Tensor:
    if falls_back(call):
        return one_token.step(call, state)
    given = layout((*call.tensors_of_a_step, state), call[TENSORS:])
    out, dense = call.empty_out(), state.contiguous()
    launch, results = _Launch(call), _ForwardResult(_describe(out), None, dense.data_ptr())
    plan = launch.plan("step", results)
    launch.run("step", results, plan)
    if dense is not state:
        state.copy_(dense)
    elif launch.reads(call):
        _steps.keep(given, launch.known("step", FORWARD, results, plan, out))
    return out
