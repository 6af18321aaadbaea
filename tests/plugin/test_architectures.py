"""A cross-section of `make sweep`: one architecture of each kind, held against the quadratic form as docs/architectures.md says how."""

from __future__ import annotations

import pytest
from sweep.models import BASE, CAUSAL, MASKED, Case
from sweep.trials import REFUSED, RIGHT, SOFTMAX, try_case

CROSS_SECTION = [
    ("gpt2", CAUSAL, RIGHT),  # positions that are learned
    ("llama", CAUSAL, RIGHT),
    ("mistral", CAUSAL, RIGHT),  # grouped queries and a window
    ("gemma2", CAUSAL, RIGHT),  # a softcap, windows in every other layer
    ("gpt_oss", CAUSAL, RIGHT),  # sinks, and experts
    ("phimoe", CAUSAL, RIGHT),
    ("opt", CAUSAL, RIGHT),
    ("qwen3_next", CAUSAL, SOFTMAX),  # linear attention of its own in some layers, which runs through packed texts
    ("lfm2", CAUSAL, RIGHT),  # convolutions between attention layers
    ("bloom", CAUSAL, REFUSED),  # no attention interface
    ("inkling_text", CAUSAL, REFUSED),  # a position bias
    ("bert", MASKED, RIGHT),
    ("modernbert", MASKED, SOFTMAX),
    ("vit", BASE, RIGHT),
    ("audio-spectrogram-transformer", BASE, RIGHT),
    ("wav2vec2", BASE, RIGHT),
    ("qwen2_5_vl_vision", BASE, RIGHT),  # pictures of several sizes in one row
    ("t5", BASE, REFUSED),
]


@pytest.mark.parametrize(("model_type", "kind", "verdict"), CROSS_SECTION, ids=[f"{kind}-{name}" for name, kind, _ in CROSS_SECTION])
def test_an_architecture_is_right_or_refused(model_type, kind, verdict):
    row = try_case(Case(model_type, kind))
    assert row.verdict == verdict, row
