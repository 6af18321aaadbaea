"""What the package gives where nothing is said: the defaults of every public function and of every form's options."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

import hf_linattn
from hf_linattn import ops
from hf_linattn.forms import FORMS

CALL = {"a": 1.0, "b": 1.0, "c": 0.0}
DEFAULTS: dict[Any, dict[str, Any]] = {
    hf_linattn.linear_attention: CALL | {
        "causal": True, "normalize_qk": True, "temperature": 1.0, "log_decay": None, "lag": 0, "segment_ids": None, "initial_state": None,
        "return_state": False, "dropout_p": 0.0, "dropout_kind": "paper", "seed": None,
    },
    hf_linattn.linear_attention_step: CALL | {"normalize_qk": True, "temperature": 1.0, "log_decay": None, "segment_ids": None},
    ops.reference: CALL | {"causal": True, "normalize_qk": True, "temperature": 1.0, "log_decay": None, "lag": 0, "segment_ids": None},
    ops.window_attention: {"sinks": 0, "scaling": None, "segment_ids": None},
    ops.window_reference: {"sinks": 0, "scaling": None, "segment_ids": None},
    hf_linattn.parameter_groups: {"head_learning_rate": 0.1, "weight_decay": 0.0, "matrix_learning_rate": None},
    hf_linattn.save_cache: {"overwrite": False},
    hf_linattn.load_cache: {"copies": 1, "max_cache_len": None},
    hf_linattn.DropoutSchedule: {"steps": 0},
    hf_linattn.DropoutCallback: {"p": 0.0},
    hf_linattn.LinAttnConfig: {"form": "polynomial", "softmax_layers": (), "dropout": None, "dropout_kind": "paper", "learnable": False},
}  # fmt: skip
POLYNOMIAL = {
    "kernel": "linear", "a": 1.0, "b": 1.0, "c": None, "temperature": 1.0, "normalize_qk": True, "decay": "none", "features": None,
    "input_gate": "none", "feature_map": "none", "output_map": "none",
}  # fmt: skip
OPTIONS = {"polynomial": POLYNOMIAL, "window": POLYNOMIAL | {"window": 64, "sinks": 4, "beside": "polynomial", "gate": "head"}}


@pytest.mark.parametrize("function", DEFAULTS, ids=lambda function: function.__name__)
def test_the_defaults_of_a_function(function: Any) -> None:
    given = inspect.signature(function).parameters.values()
    assert {one.name: one.default for one in given if one.default is not one.empty} == DEFAULTS[function]


def test_an_empty_state_is_of_the_first_degree_in_float32() -> None:
    defaults = {name: one.default for name, one in inspect.signature(hf_linattn.empty_state).parameters.items()}
    assert defaults["degree"] == 1 and defaults["device"] is None and str(defaults["dtype"]) == "torch.float32"


def test_the_options_of_every_form() -> None:
    assert {name: {one.name: one.default for one in fields(form.Options)} for name, form in FORMS.items()} == OPTIONS
    assert {name: hf_linattn.LinAttnConfig(form=name).c for name in FORMS} == dict.fromkeys(FORMS, 0.0)
