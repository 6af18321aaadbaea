"""A cross-section of `make sweep`: one architecture of each kind, held against the quadratic form as docs/architectures.md says how."""

from __future__ import annotations

import pytest
from sweep.models import BASE, CAUSAL, MASKED, Case, all_cases
from sweep.trials import REFUSED, RIGHT, SOFTMAX, WRONG, try_case
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_linattn.attention import linattn_attention
from hf_linattn.mask import linattn_mask

CROSS_SECTION = [
    ("llama", CAUSAL, RIGHT),
    ("gpt2", CAUSAL, RIGHT),  # positions that are learned
    ("gemma2", CAUSAL, RIGHT),  # a softcap, and windows in every other layer
    ("gpt_oss", CAUSAL, RIGHT),  # sinks, experts, windows
    ("persimmon", CAUSAL, RIGHT),  # positions do not reach the attention call
    ("deepseek_v3", CAUSAL, RIGHT),  # latent attention, experts
    ("diffllama", CAUSAL, RIGHT),  # two readers of one cache
    ("gemma3n_text", CAUSAL, RIGHT),  # layers that share keys and values
    ("lfm2", CAUSAL, RIGHT),  # convolutions between attention layers
    ("falcon_h1", CAUSAL, SOFTMAX),  # Mamba beside attention in every layer
    ("qwen3_5_text", CAUSAL, SOFTMAX),  # linear attention of its own in some layers
    ("llama4_text", CAUSAL, RIGHT),  # chunks
    ("doge", CAUSAL, REFUSED),  # a mask of other numbers
    ("inkling_text", CAUSAL, REFUSED),  # a position bias
    ("deepseek_v32", CAUSAL, REFUSED),  # keys chosen by an indexer
    ("git", CAUSAL, REFUSED),  # no attention interface, and it does not know
    ("bart", CAUSAL, RIGHT),
    ("t5", BASE, REFUSED),  # cross-attention
    ("bert", MASKED, RIGHT),
    ("layoutlm", MASKED, SOFTMAX),  # says nothing of causality
    ("vit", BASE, RIGHT),
    ("swin", BASE, REFUSED),
    ("paligemma", BASE, RIGHT),  # a prompt seen both ways
    ("siglip2_vision_model", BASE, RIGHT),  # a softmax of its own in the pooling head
    ("qwen2_5_vl_vision", BASE, RIGHT),  # pictures of several sizes in one row
    ("audio-spectrogram-transformer", BASE, RIGHT),
    ("wav2vec2", BASE, RIGHT),
]


@pytest.mark.parametrize(("model_type", "kind", "verdict"), CROSS_SECTION, ids=[f"{kind}-{name}" for name, kind, _ in CROSS_SECTION])
def test_an_architecture_is_right_or_refused(model_type, kind, verdict):
    case = Case(model_type, kind)
    if case not in all_cases():
        pytest.skip("not in this Transformers")
    row = try_case(case)
    assert row.verdict == verdict, row


def softmax(module, query, key, value, attention_mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


def late(module, query, key, value, *args, **kwargs):
    return linattn_attention(module, query, key, value.roll(1, 2), *args, **kwargs)


def unpadded(*, attention_mask, **kwargs):
    return linattn_mask(attention_mask=None, **kwargs)


@pytest.mark.parametrize(
    ("interface", "slip", "wrong"),
    [
        (AttentionInterface, softmax, {"forward"}),
        (AttentionInterface, late, {"forward"}),
        (AttentionMaskInterface, unpadded, {"left padding", "right padding"}),
    ],
    ids=["softmax", "values one token late", "padding forgotten"],
)
def test_a_slip_of_the_plugin_is_seen(monkeypatch, interface, slip, wrong):
    monkeypatch.setitem(interface._global_mapping, "linattn", slip)
    row = try_case(Case("bert", MASKED))
    assert {name for name, outcome in row.trials.items() if outcome.status == WRONG} == wrong, row
