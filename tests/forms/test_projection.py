"""Learned projections of queries and keys to fewer features: a smaller state, the same attention by the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learned import check_pieces_give_the_whole, check_tokens_are_taken_back, learned_model
from tiny_models import tiny_model, tiny_tokens
from tiny_softmax import softmax_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from convert.linearize import LinearizeOptions, linearize
from hf_linattn import LinAttnConfig, cache_bytes
from hf_linattn.forms import Sizes
from hf_linattn.forms.polynomial import PolynomialParameters
from hf_linattn.ops import reference

QUADRATIC: dict[str, Any] = {"kernel": "quadratic", "decay": "key_head", "features": 4}


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_projected_attention_is_what_its_formula_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = learned_model(name, **QUADRATIC), tiny_tokens()
    with torch.no_grad():
        found = model(ids, use_cache=False).logits

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        learned = module.linattn
        query = torch.einsum("bhnd,hdr->bhnr", query, learned.query_projection)
        key = torch.einsum("bhnd,hdr->bhnr", key - learned.key_center[None, :, None], learned.key_projection)
        numbers = {name: learned()[name] for name in ("a", "b", "c", "temperature", "log_decay")}
        return reference(query, key, value, **numbers).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "linattn", attend)
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=2e-5, rtol=0)


def test_pieces_through_a_cache_give_the_whole_from_a_smaller_state() -> None:
    state = check_pieces_give_the_whole(learned_model(**QUADRATIC))
    assert state["sums"].shape == (2, 2, 4 + 1 + 10, 17)


def test_tokens_are_taken_back() -> None:
    check_tokens_are_taken_back(learned_model(**QUADRATIC))


def test_every_matrix_learns() -> None:
    model, ids = learned_model(**QUADRATIC).train(), tiny_tokens()
    model(ids, labels=ids).loss.backward()
    for module in model.modules():
        if isinstance(module, PolynomialParameters):
            assert all((parameter.grad != 0).any() for parameter in module.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_converted_checked_and_costs_what_it_says(dtype: str, tmp_path: Path) -> None:
    softmax_model("llama").save_pretrained(tmp_path / "in")
    report = linearize(tmp_path / "in", tmp_path / "out", LinearizeOptions(**QUADRATIC, dtype=dtype))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    layer = model.model.layers[0].self_attn.linattn
    torch.testing.assert_close(layer.query_projection[0], layer.key_projection[1])
    torch.testing.assert_close((layer.query_projection[0].mT @ layer.query_projection[0]).float(), torch.eye(4), atol=0.02, rtol=0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tiny_tokens(1), past_key_values=cache)
    assert cache_bytes(cache) == report["costs"]["state"] == 3 * 2 * (4 + 1 + 10) * 9 * 4


@pytest.mark.parametrize(
    ("options", "learnable", "sentence"),
    [
        ({"features": 8}, True, "features=8 must be below the 8 numbers of a head"),
        ({"features": 4}, False, "features is of learned projections, so it needs learnable=true"),
    ],
)
def test_projections_that_cannot_be_are_refused(options: dict[str, Any], learnable: bool, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PolynomialParameters(Sizes(4, 2, 8, 8), LinAttnConfig(**options).options, learnable)


@pytest.mark.parametrize("features", [0, -1])
def test_features_are_at_least_one(features: int) -> None:
    with pytest.raises(ValueError, match="features must be 1 or more"):
        LinAttnConfig(features=features)


def test_features_are_whole() -> None:
    with pytest.raises(TypeError, match="features must be a whole number"):
        LinAttnConfig(features=4.0)


def test_a_model_without_parameters_has_no_projection() -> None:
    with pytest.raises(ValueError, match="which only converted checkpoints have"):
        tiny_model("llama", features=4)(tiny_tokens())
