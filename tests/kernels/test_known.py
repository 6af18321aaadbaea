"""Launches that are kept: each call, however like the one before, gives the library its own tensors and the plan that is its own.

A library that computes nothing stands in for the kernels, on the CPU, and looks at what it is given."""

from __future__ import annotations

import ctypes
import gc
import itertools
import threading
import time
import weakref
from contextlib import nullcontext
from ctypes import Structure
from typing import Any

import pytest
import torch

from hf_linattn import linear_attention
from hf_linattn.ops import checks, cuda, device, known, operators
from hf_linattn.ops.call import Call

RESULTS = {"forward": cuda._ForwardResult, "backward": cuda._BackwardData, "step": cuda._ForwardResult}


class StandIn:
    """The library's functions. Its plan tells of all that a real one may go by, so that another call's plan is noticed."""

    def __init__(self):
        self.calls, self.planned, self.code = [], 0, 0

    def linattn_error_string(self, code):
        return b"out of luck"

    def __getattr__(self, name):
        _, *words = name.split("_")
        if words[0] == "plan":
            return lambda problem, results, plan: self.plan(problem._obj, results._obj, plan._obj)
        return lambda problem, results, plan: self.run(words[0], problem, results, plan)

    def plan(self, problem, results, plan):
        self.planned += 1
        plan.engine, plan.workspace_bytes, plan.segment_length = 2, 64, 7
        plan.kept_bytes = hash(self.goes_by(problem, results)) % 2**60 + 1

    @staticmethod
    def goes_by(problem, results):
        """Sizes and strides, where rows begin, which results are asked for."""
        return tuple(told(x) for x in (problem, results))

    def run(self, name, problem, results, plan):
        kinds = cuda._Problem, RESULTS[name], cuda._Plan
        problem, results, plan = (whole(x, kind) for x, kind in zip((problem, results, plan), kinds, strict=True))
        right = cuda._Plan()
        self.plan(problem, results, right)
        self.planned -= 1
        assert bytes(plan) == bytes(right), "the plan is another call's"
        time.sleep(0)  # another thread's turn
        self.calls.append((threading.get_ident(), name, problem, results))
        return self.code


def whole(given, kind):
    return kind.from_buffer_copy(given) if isinstance(given, bytes) else kind.from_buffer_copy(bytes(given._obj))


def told(structure: Structure) -> tuple[Any, ...]:
    """A structure with what its addresses tell a plan in their place."""
    found: list[Any] = []
    for name, kind in structure._fields_:
        value = getattr(structure, name)
        if isinstance(value, Structure):
            found.append(((value.data or 0) % 16, told(value)[1:]))
        elif kind is not cuda.c_void_p:
            found.append(value)
        elif name not in ("workspace", "stream"):  # which are not there yet
            found.append(value is None)
    return tuple(found)


@pytest.fixture
def library(monkeypatch):
    made = StandIn()
    monkeypatch.setattr(cuda, "load_library", lambda: (made, ""))
    monkeypatch.setattr(cuda, "cannot_run", lambda index: "")
    for name in ("_forwards", "_backwards", "_steps"):
        monkeypatch.setattr(cuda, name, known.Launches())
    monkeypatch.setattr(device, "stream", lambda on: 0)
    monkeypatch.setattr(device, "current", lambda on: nullcontext())
    monkeypatch.delenv("HF_LINATTN_BACKEND", raising=False)
    for kernels, run in ((operators._KEEPING, cuda.forward_keeping), (operators._BACKWARD, cuda.backward), (operators._STEP, cuda.step)):
        monkeypatch.setitem(kernels, "cpu", run)
    return made


def rows(heads=2, *, length=5, dim=8, dtype=torch.bfloat16, batch=2):
    return torch.randn(batch, heads, length, dim).to(dtype)


def elsewhere(x):
    """The same numbers two bytes, or one number, further into their memory, in the same layout."""
    memory = torch.empty(x.untyped_storage().nbytes() // x.element_size() + 1, dtype=x.dtype)
    return memory[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


def turned(x):
    """The same numbers with heads and tokens in the other order in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def plain(**changes):
    return Call(rows(4), rows(), rows(), torch.ones(4, 4))._replace(**changes)


def stateful(**changes):
    ids = torch.ones(2, 5, dtype=torch.int32)
    state, rate, numbers = torch.randn(2, 2, 9, 9), torch.full((2,), -0.1), (torch.full((), 0.1), torch.ones((), dtype=torch.int64))
    call = plain(log_decay=rate, query_segments=ids, key_segments=ids, initial_state=state, dropout_p=numbers[0], seed=numbers[1])
    return call._replace(**changes)


def ids_apart(length=5):
    return dict.fromkeys(("query_segments", "key_segments"), torch.ones(2, 10, dtype=torch.int32)[:, :length])


def all_of(**kind):
    return {"query": rows(4, **kind), "key": rows(**kind), "value": rows(**kind)}


VARIANTS = {
    "as it was": dict,
    "query in another order": lambda: {"query": turned(rows(4))}, "key in another order": lambda: {"key": turned(rows())},
    "value in another order": lambda: {"value": turned(rows())}, "query elsewhere": lambda: {"query": elsewhere(rows(4))},
    "key elsewhere": lambda: {"key": elsewhere(rows())}, "value elsewhere": lambda: {"value": elsewhere(rows())},
    "float32": lambda: all_of(dtype=torch.float32), "float16": lambda: all_of(dtype=torch.float16),
    "longer": lambda: {**all_of(length=6), "query_segments": None, "key_segments": None},
    "narrower values": lambda: {"value": rows(dim=16)}, "more key heads": lambda: {"key": rows(4), "value": rows(4)},
    "rows that are no rows": lambda: {"key": rows().mT.contiguous().mT},
    "coefficients of 64 bits": lambda: {"coefficients": torch.full((4, 4), 2.0).double()},
    "coefficients by columns": lambda: {"coefficients": torch.rand(4, 4).T},
    "a decay": lambda: {"log_decay": torch.full((2,), -0.5)}, "a decay of query heads": lambda: {"log_decay": torch.full((4,), -0.5)},
    "a decay a token": lambda: {"log_decay": torch.full((2, 2, 5), -0.5)},
    "a decay of 64 bits": lambda: {"log_decay": torch.full((2,), -0.5, dtype=torch.float64)},
    "ids apart": ids_apart, "no ids": lambda: {"query_segments": None, "key_segments": None},
    "no state": lambda: {"initial_state": None}, "a state by columns": lambda: {"initial_state": torch.randn(2, 2, 9, 9).mT},
    "no noise": lambda: {"dropout_p": None, "seed": None}, "second degree": lambda: {"degree": 2, "initial_state": None},
    "both ways": lambda: {"causal": False}, "as long as they are": lambda: {"normalize_qk": False},
}  # fmt: skip


def address(x):
    return None if x is None else x.data_ptr()


def assert_its_own(given: Call, problem):
    """That the library was given these tensors, or copies where it must be."""
    anew = cuda._Launch(given)
    expected = cuda._Problem.from_buffer_copy(bytes(anew.problem))
    copied = [ours is not theirs for ours, theirs in zip(anew.given, given.tensors, strict=True)]
    names = ("query", "key", "value", "coefficients", "log_decay", "query_segments", "key_segments", "initial_state", "dropout_p", "seed")
    for name, is_copy, tensor in zip(names, copied, given.tensors, strict=True):
        at = getattr(problem, name)
        at = at.data if isinstance(at, Structure) else at
        assert (at != address(tensor)) if is_copy else (at == address(tensor)), name
    assert told(problem) == told(expected)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("base", [plain, stateful])
def test_each_call_is_launched_as_its_own(library, base, variant):
    for changes in 2 * ({}, variant()):
        call = base(**changes)
        for return_state in (False, True):
            (out, mass, state), kept = cuda.forward_keeping(call, return_state)
            *_, problem, results = library.calls[-1]
            assert_its_own(call, problem)
            assert (results.out.data, results.mass, results.state) == (out.data_ptr(), mass.data_ptr(), address(state))
            assert out.dtype == call.query.dtype and out.stride() == call.empty_out().stride() and kept.segment_length == 7
            assert (state is not None) == return_state
        for grad_out in (torch.randn_like(out), torch.randn_like(out, dtype=torch.float32), elsewhere(torch.randn_like(out)), turned(out)):
            for beside in ((None, None, None), (mass.clone(), None, kept), (None, state.clone(), kept._replace(segment_length=14))):
                gradients = cuda.backward(call, out, mass, grad_out, *beside)
                *_, problem, data = library.calls[-1]
                assert_its_own(call, problem)
                found = [data.grad_query.data, data.grad_key.data, data.grad_value.data, data.grad_coefficients, data.grad_log_decay]
                expected = [address(x) for x in gradients[:5]]
                if call.coefficients.dtype != torch.float32:  # whose gradient is brought to their dtype
                    found[3] = expected[3] = None
                assert found == expected and data.grad_initial_state == address(gradients[5])
                for gradient, tensor in zip(gradients, (*call[:5], call.initial_state), strict=True):
                    assert (None if gradient is None else gradient.shape) == (None if tensor is None else tensor.shape)
                assert (data.mass, data.grad_mass, data.grad_state) == (mass.data_ptr(), address(beside[0]), address(beside[1]))
                left = beside[2]
                assert (data.segment_states, data.kept_segment_length) == (
                    (left.states.data_ptr(), left.segment_length) if left else (None, 0)
                )
                assert data.out.data == out.data_ptr()
                is_taken = grad_out.dtype == out.dtype and cuda._aligned_rows(grad_out) is grad_out
                assert (data.grad_out.data == grad_out.data_ptr()) == is_taken


def test_what_is_planned_once(library):
    """The first of each layout, with and without what its backward pass is given beside."""
    for _ in range(3):
        call = plain()
        (out, mass, _), kept = cuda.forward_keeping(call, False)
        cuda.backward(call, out, mass, torch.randn_like(out), None, None, kept)
        cuda.step(plain(query=rows(4, length=1), key=rows(length=1), value=rows(length=1)), torch.zeros(2, 2, 9, 9))
    assert library.planned == 3
    assert len(cuda._forwards) == len(cuda._backwards) == len(cuda._steps) == 1


FACTS = {
    "shape": rows(length=6), "strides": turned(rows()), "dtype": rows(dtype=torch.float16), "device": rows().to("meta"),
    "where rows begin": elsewhere(rows()), "none": None,
}  # fmt: skip


@pytest.mark.parametrize("other", FACTS.values(), ids=FACTS)
def test_a_layout_is_of_every_tensor(other):
    tensors = [rows() for _ in range(3)]
    first = known.layout(tensors, 1)
    assert first == known.layout([rows() for _ in range(3)], 1) != known.layout(tensors, 2)
    for place in range(3):
        assert known.layout([*tensors[:place], other, *tensors[place + 1 :]], 1) != first


@pytest.mark.parametrize("place", range(3))
def test_a_dtype_beside_others_is_refused_in_a_known_shape(library, place):
    tensors = [rows(4), rows(4), rows(4)]
    linear_attention(*tensors)
    tensors[place] = tensors[place].half()
    with pytest.raises(TypeError, match="must have one dtype"):
        linear_attention(*tensors)


def step_of(**changes):
    return plain(query=rows(4, length=1), key=rows(length=1), value=rows(length=1))._replace(**changes)


STEPS = {
    "as it was": dict, "query in another order": lambda: {"query": rows(4, length=1).mT.contiguous().mT},
    "key elsewhere": lambda: {"key": elsewhere(rows(length=1))},
    "a decay": lambda: {"log_decay": torch.full((2,), -0.5)}, "a decay a token": lambda: {"log_decay": torch.full((2, 2, 1), -0.5)},
    "padding": lambda: ids_apart(1),
    "coefficients by columns": lambda: {"coefficients": torch.rand(4, 4).T}, "as long as they are": lambda: {"normalize_qk": False},
}  # fmt: skip


@pytest.mark.parametrize("variant", STEPS.values(), ids=STEPS)
def test_each_step_is_launched_as_its_own(library, variant):
    for changes in 2 * ({}, variant()):
        call = step_of(**changes)
        for state in (torch.zeros(2, 2, 9, 9), torch.zeros(2, 2, 9, 9).mT):
            out = cuda.step(call, state)
            *_, problem, results = library.calls[-1]
            assert_its_own(call, problem)
            assert results.out.data == out.data_ptr() and results.mass is None
            assert (results.state == state.data_ptr()) == state.is_contiguous()


def test_no_tensor_lives_on(library):
    call = stateful()
    for _ in range(2):
        (out, mass, state), kept = cuda.forward_keeping(call, True)
        gradients = cuda.backward(call, out, mass, torch.randn_like(out), mass.clone(), state.clone(), kept)
    gone = [weakref.ref(x) for x in (*call.tensors, out, mass, state, *gradients, kept.states)]
    library.calls.clear()
    del call, out, mass, state, gradients, kept
    gc.collect()
    assert not any(x() is not None for x in gone)


def test_so_many_layouts_are_kept(library, monkeypatch):
    monkeypatch.setattr(known, "MOST", 4)
    for length in range(1, 12):
        call = plain(query=rows(4, length=length), key=rows(length=length), value=rows(length=length))
        (out, mass, _), kept = cuda.forward_keeping(call, False)
        cuda.backward(call, out, mass, out, None, None, kept)
        assert len(cuda._forwards) <= 4 and len(cuda._backwards) <= 4


def test_sizes_of_a_trace_are_not_kept(library):
    torch.jit.trace(lambda *x: linear_attention(*x), (rows(4, length=3), rows(length=3), rows(length=3)), check_trace=False)
    found = [*itertools.chain(*cuda._forwards), *checks._known]
    while found:
        part = found.pop()
        assert not isinstance(part, torch.Tensor)
        found += part if isinstance(part, tuple) else ()


def test_threads_share_what_is_kept_and_nothing_else(library):
    failed = []

    def work():
        try:
            for _ in range(200):
                call = plain()
                (out, mass, _), kept = cuda.forward_keeping(call, False)
                gradients = cuda.backward(call, out, mass, torch.randn_like(out), None, None, kept)
                mine = [x for x in library.calls if x[0] == threading.get_ident()]
                (*_, problem, results), (*_, again, data) = mine[-2:]
                assert_its_own(call, problem)
                assert_its_own(call, again)
                assert results.out.data == data.out.data == out.data_ptr() and data.grad_query.data == gradients[0].data_ptr()
                assert data.segment_states == kept.states.data_ptr() == problem.workspace != again.workspace
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_known_launch_is_asked_for_no_more_where_the_pytorch_form_is_wished_for(library, monkeypatch):
    tensors = [rows(4), rows(), rows()]
    for _ in range(2):
        linear_attention(*tensors)
    launched = len(library.calls)
    monkeypatch.setenv("HF_LINATTN_BACKEND", "torch")
    assert linear_attention(*tensors).isfinite().all() and len(library.calls) == launched == 2


def test_a_known_launch_that_fails_says_so(library):
    call = plain()
    cuda.forward_keeping(call, False)
    library.code = 1
    with pytest.raises(RuntimeError, match="forward kernels of linear attention failed: out of luck"):
        cuda.forward_keeping(call, False)


def test_gradients_by_a_known_launch(library):
    """Under autograd, twice: the second time nothing is planned."""
    for _ in range(2):
        planned = library.planned
        query, key, value = (x.requires_grad_() for x in (rows(4), rows(), rows()))
        linear_attention(query, key, value).backward(torch.randn(2, 4, 5, 8).bfloat16())
        (*_, problem, _), (*_, again, data) = library.calls[-2:]
        assert [problem.query.data, again.query.data] == [query.data_ptr()] * 2
        assert [data.grad_query.data, data.grad_key.data, data.grad_value.data] == [x.grad.data_ptr() for x in (query, key, value)]
    assert library.planned == planned


def test_under_autocast(library):
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            linear_attention(*(rows(4, dtype=torch.float32) for _ in range(3)))
        assert library.calls[-1][2].dtype == cuda._DTYPES[torch.bfloat16]


def test_bytes_are_those_of_the_structures():
    """Every byte of a structure counted upward comes back in its place, addresses and all else."""
    for form, kind in ((known.PROBLEM, cuda._Problem), (known.FORWARD, cuda._ForwardResult), (known.BACKWARD, cuda._BackwardData)):
        raw = bytes(range(1, 1 + ctypes.sizeof(kind) % 256)).ljust(ctypes.sizeof(kind), b"x")
        assert form.size == ctypes.sizeof(kind) and form.pack(*form.unpack(raw)) == raw
        addresses = [x for x in form.unpack(raw) if not isinstance(x, bytes)]
        structure = kind.from_buffer_copy(raw)
        fields = [
            getattr(structure, name) for name, of in kind._fields_ if of in (cuda.c_void_p, cuda._Tensor) or name == "kept_segment_length"
        ]
        assert addresses == [x.data if isinstance(x, Structure) else x for x in fields]
