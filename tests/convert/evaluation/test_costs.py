"""Bytes of caches that are known, and the length from which on a student's is the smaller."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from byte_models import byte_model
from transformers import AutoModelForCausalLM

from convert.evaluation.costs import STEPS, break_even, measure_costs
from convert.evaluation.tables import _cost
from convert.evaluation.tables import costs as of_costs


def test_bytes_of_a_softmax_cache_and_of_a_state(evaluated: Path) -> None:
    teacher = measure_costs(byte_model(), (16, 64))["by_length"]
    assert [(x["length"], x["cache_bytes"]) for x in teacher] == [(n, n * 3 * 2 * 2 * 8 * 4) for n in (16, 64)]  # layers, kv, heads, dim
    student = measure_costs(AutoModelForCausalLM.from_pretrained(evaluated / "student").eval(), (16, 64))["by_length"]
    assert [x["cache_bytes"] for x in student] == [3 * 4 * 9 * 9 * 4] * 2  # layers, heads, features, values and a sum
    assert all(0 < x["ms_spread"][0] <= x["ms"] <= x["ms_spread"][1] for x in (*teacher, *student))


def test_the_head_is_asked_for_one_token_alone() -> None:
    model, asked = byte_model(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: asked.append(args[0].shape[1]))
    measure_costs(model, (16,))
    assert asked == [1] * (1 + STEPS)


def test_times_taken_beside_other_work_are_told_with_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([tick for step in range(STEPS) for tick in (step, step + (0.0012 if step % 4 == 0 else 0.116))])
    monkeypatch.setattr("convert.evaluation.costs.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    at = measure_costs(byte_model(), (16,))["by_length"][0]
    assert (at["ms"], at["ms_spread"]) == (116.0, [1.2, 116.0])
    busy = of_costs({"busy": {"costs": {"by_length": [at], "device": "a device"}}})
    assert busy.cells[1][-1] == "116.00 (1.20 to 116.00)"
    assert "Other work was under way as tokens of busy were timed: the fastest tell more." in busy.note
    quiet = of_costs({"quiet": {"costs": {"by_length": [at | {"ms": 1.3, "ms_spread": [1.2, 1.5]}], "device": "a device"}}})
    assert quiet.cells[1][-1] == "1.30 (1.20 to 1.50)" and "Other work" not in quiet.note


def test_models_of_one_form_that_differ_severalfold_tell_of_other_work() -> None:
    def found(ms: float, attention: str = "linear", size: int = 9) -> dict[str, Any]:
        at = {"length": 16, "cache_bytes": size, "ms": ms, "ms_spread": [ms, ms]}
        return {"model": {"attention": attention, "parameters": 5}, "costs": {"by_length": [at], "device": "a device"}}

    others = {"softmax": found(5, "softmax", 12), "longer": found(900, "linear", 10)}
    assert "as tokens of slow were timed" in of_costs({"fast": found(53), "slow": found(305), **others}).note
    assert "Other work" not in of_costs({"one": found(53), "another": found(80), **others}).note


def costs(*sizes: tuple[int, int]) -> dict[str, Any]:
    return {"by_length": [{"length": length, "cache_bytes": size} for length, size in sizes]}


@pytest.mark.parametrize(
    ("student", "even"),
    [
        (costs((10, 1000), (20, 1000)), 100),
        (costs((10, 1005), (20, 1005)), 101),
        (costs((10, 1050), (20, 1100)), 200),  # 1,000 and 5 a token
        (costs((10, 1100), (20, 1200)), None),
        (costs((10, 100), (20, 200)), 0),
        (costs((10, 1000)), None),
        (costs((10, 100), (20, 200), (30, 210)), 20),  # by the two longest alone: from 180, 1 a token
        (costs((10, 105), (20, 205)), None),  # as steep, from higher up
        (costs((10, 90), (20, 200)), None),  # from lower down, and steeper
    ],
)
def test_break_even(student: dict[str, Any], even: int | None) -> None:
    assert break_even(student, costs((5, 7), (10, 100), (20, 200))) == even


def test_break_even_with_a_teacher_that_holds_something_of_any_length() -> None:
    assert break_even(costs((10, 1000), (20, 1000)), costs((10, 150), (20, 250))) == 95


def test_one_length_tells_of_no_break_even() -> None:
    one = {"costs": {"by_length": [{"length": 10, "cache_bytes": 1000, "ms": 1.0}]}}
    other = {"costs": {"by_length": [{"length": 10, "cache_bytes": 9000, "ms": 1.0}]}}
    assert _cost(one, other) == ["1,000 at 10", "1.00", ""]
    two = {"costs": {"by_length": [{"length": n, "cache_bytes": 100 * n, "ms": 1.0} for n in (10, 20)]}}
    assert _cost(two, {"costs": {"by_length": [{"length": n, "cache_bytes": 10 * n, "ms": 1.0} for n in (10, 20)]}})[2] == "never"
