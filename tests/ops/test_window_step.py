"""One new token of a window as PyTorch sees it: opcheck, compile, autocast, the way past the dispatcher, and what is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from window_step_cases import Case, changed, on, window_case

from hf_linattn.ops import window_step
from hf_linattn.ops.ring import Ring
from hf_linattn.ops.window_token import Beside, Token

OF_TOKENS = {"decay": "token", "input_gate": True, "output": "norm gate", "gate": "token", "features": 5}
KINDS: list[dict[str, Any]] = [
    {}, {"beside": {"degree": 2, "decay": "key_head"}, "padded": True}, {"beside": OF_TOKENS, "padded": True}, {"beside": {"is_map": True}},
]  # fmt: skip


def small_case(**kind: Any) -> Case:
    return window_case(torch.float32, head_dim=8, value_dim=6, **kind)


def flat(case: Case) -> tuple[Any, ...]:
    token, ring, beside = case
    return *token, ring.key, ring.value, ring.seen, ring.per_token, ring.window, ring.sinks, *beside


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_opcheck(kind: dict[str, Any]) -> None:
    opcheck(torch.ops.linattn.window_step.default, flat(small_case(**kind)))


@pytest.mark.parametrize("kind", KINDS[1:3], ids=str)
def test_compiled(kind: dict[str, Any]) -> None:
    """One operator of a graph, that writes into the tensors it is given."""
    torch._dynamo.reset()
    cases = small_case(**kind), small_case(**kind)
    compiled = torch.compile(window_step.step, fullgraph=True, backend="aot_eager")
    before = [x.data_ptr() for x in changed(*cases[0][1:]).values()]
    for _ in range(3):
        assert torch.equal(compiled(*cases[0]), window_step.step(*cases[1]))
    found, expected = (changed(*case[1:]) for case in cases)
    assert [name for name, x in found.items() if not torch.equal(x, expected[name])] == []
    assert [x.data_ptr() for x in found.values()] == before


class Watched(TorchDispatchMode):
    """Counts the operators of a window's token that pass torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "linattn::window_step" in function.name()
        return function(*args, **(kwargs or {}))


def test_the_dispatcher_is_passed_where_something_watches_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    case, passed = small_case(**KINDS[1]), []
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.linattn, "window_step", lambda *flat: passed.append(flat))
        window_step.step(*case)
    assert not passed
    with Watched() as watched:
        window_step.step(*case)
    assert watched.count == 1


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_both_ways_give_the_same_and_count_what_is_written(kind: dict[str, Any]) -> None:
    straight, past = small_case(**kind), small_case(**kind)
    out, other = window_step.step(*straight), torch.ops.linattn.window_step(*flat(past))
    assert torch.equal(out, other)
    for name, x in changed(*straight[1:]).items():
        y = changed(*past[1:])[name]
        assert torch.equal(x, y) and x._version > 0 and y._version > 0, name


def test_a_state_of_inference_mode_is_not_written_outside() -> None:
    with torch.inference_mode():
        case = on(None, *small_case(**KINDS[1]))
    with pytest.raises(RuntimeError, match="[Ii]nference"):
        window_step.step(*case)


def test_sums_stay_in_full_precision_under_autocast() -> None:
    cases = small_case(**KINDS[1]), small_case(**KINDS[1])
    with torch.autocast("cpu", torch.bfloat16):
        found = window_step.step(*cases[0])
    assert torch.equal(found, window_step.step(*cases[1]))


def test_no_sequences() -> None:
    query, key, value = torch.randn(0, 4, 1, 8), torch.randn(0, 2, 1, 8), torch.randn(0, 2, 1, 6)
    ring = Ring(torch.zeros(0, 2, 5, 8), torch.zeros(0, 2, 5, 6), torch.zeros(0, dtype=torch.int64), None, 4, 1)
    beside = Beside(torch.zeros(0, 2, 9, 7), torch.full((4,), 0.5), torch.ones(4, 4))
    for given in (beside, Beside()):
        assert window_step.step(Token(query, key, value), ring, given).shape == (0, 4, 1, 6)
