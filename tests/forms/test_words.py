"""What reports and model cards say of each form: its name in a table, its formula, and the forms beside it."""

from __future__ import annotations

from typing import Any

import pytest

from hf_linattn import LinAttnConfig

LINEAR = "f(s) = a + b s, normalised, of s = temperature times the "
QUADRATIC = "f(s) = a + b s + c s^2, normalised, of s = temperature times the "
COSINE, PROJECTED = "cosine of query and key", "cosine of query and key, each projected to 3 learned features"
MAPPED = "phi(q).phi(k), normalised, of phi(x) = softmax([W x, -W x]), W learned per query head and key head"
PER_HEAD = ", with a {} decay per query head"
PER_TOKEN = ", with a {} decay per token and key head"
GATED = ", times an exp(u) learned per token and key head"
NORMED = ", the output over a learned power of its RMS per query head"
NEAR = "those of softmax over the last 64 tokens and the first 4"

WORDS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "linear", LINEAR + COSINE),
    ({"kernel": "quadratic", "decay": "head"}, "quadratic with decay", QUADRATIC + COSINE + PER_HEAD),
    ({"decay": "key_head"}, "linear with decay per key head", LINEAR + COSINE + ", with a {} decay per key head"),
    ({"decay": "token", "input_gate": "token"}, "linear with decay per token, input gate per token", LINEAR + COSINE + PER_TOKEN + GATED),
    ({"output_map": "norm"}, "linear, output norm", LINEAR + COSINE + NORMED),
    (
        {"output_map": "norm_gate", "input_gate": "token"},
        "linear, input gate per token, output norm and gate",
        LINEAR + COSINE + GATED + NORMED + " and times a gate learned per token and query head",
    ),
    ({"output_map": "gate"}, "linear, output gate", LINEAR + COSINE + ", the output times a gate learned per token and query head"),
    ({"kernel": "quadratic", "features": 3}, "quadratic, features=3", QUADRATIC + PROJECTED),
    ({"feature_map": "hedgehog", "decay": "head"}, "linear with decay, feature_map=hedgehog", MAPPED + PER_HEAD),
    ({"normalize_qk": False}, "linear, normalize_qk=False", LINEAR + "scaled product of query and key"),
    (
        {"kernel": "quadratic", "a": 2.0, "b": 0.5, "c": 0.75, "temperature": 3.0},
        "quadratic, a=2.0, b=0.5, c=0.75, temperature=3.0",
        QUADRATIC + COSINE,
    ),
    ({"form": "window", "beside": "none"}, "window 64 + 4", f"{NEAR}, and nothing else is seen"),
    (
        {"form": "window", "window": 5, "sinks": 2, "gate": "token", "kernel": "quadratic", "decay": "head"},
        "window 5 + 2, gate per token, beside quadratic with decay",
        "those of softmax over the last 5 tokens and the first 2, mixed by a {} gate per token with those of a polynomial over all tokens "
        "at least 5 back: " + QUADRATIC + COSINE + PER_HEAD,
    ),
]


@pytest.mark.parametrize(("options", "name", "formula"), WORDS, ids=lambda x: x if isinstance(x, str) and len(x) < 60 else "")
def test_a_form_in_words(options: dict[str, Any], name: str, formula: str) -> None:
    form = LinAttnConfig(**options).attention
    assert form.describe() == name
    assert form.formula(True) == formula.replace("{}", "learned") and form.formula(False) == formula.replace("{}", "fixed")


def others(**options: Any) -> list[str]:
    return [form.describe() for form in LinAttnConfig(**options).attention.alternatives()]


def test_of_numbers_that_are_learned_is_told_where_they_start() -> None:
    for options, fixed, learned in (
        ({"kernel": "linear", "temperature": 0.5}, "linear, temperature=0.5", "linear, temperature from 0.5"),
        ({"form": "window", "kernel": "quadratic", "b": 0.5}, "quadratic, b=0.5", "quadratic, b from 0.5"),
    ):
        form = LinAttnConfig(**options).attention
        assert form.describe().endswith(fixed) and form.describe(learned=True).endswith(learned)


def test_the_forms_beside_one() -> None:
    decays = ("", " with decay", " with decay per key head")
    both = [kernel + decay for kernel in ("linear", "quadratic") for decay in decays]
    assert others(kernel="quadratic", decay="token") == both
    alike = "features=3, input gate per token, output norm"
    assert others(features=3, input_gate="token", output_map="norm") == [f"{name}, {alike}" for name in both]
    assert others(feature_map="hedgehog") == [f"linear{decay}, feature_map=hedgehog" for decay in decays]
    assert others(form="window", beside="none") == [f"window {size} + 4" for size in (64, 128, 256)]
    assert others(form="window", window=5, sinks=2, beside="none") == [f"window {size} + 2" for size in (5, 64, 128, 256)]


def test_what_a_form_reaches_and_learns() -> None:
    told = [(form.reach(), form.learns) for form in (LinAttnConfig(**options).attention for options, *_ in WORDS)]
    assert told == [(0, True)] * 11 + [(64, False), (5, True)]
