"""The kernels of one new token of a window on a GPU, at the accuracy bar; in graphs, compiled, repeated, and by a whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_tokens
from transformers import AutoModelForCausalLM, DynamicCache
from window_step_cases import SECOND, WINDOW_KINDS, changed, check_window_step, on, window_case

from hf_linattn.models import config_class_for
from hf_linattn.ops import window_cuda, window_step

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_only")]
OF_TOKENS = {"decay": "token", "input_gate": True, "output": "norm gate", "gate": "token"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", WINDOW_KINDS, ids=str)
def test_at_the_bar(dtype: torch.dtype, kind: dict[str, Any]) -> None:
    check_window_step(dtype, device="cuda", **kind)


@pytest.mark.parametrize("batch", [1, 3, 300])
@pytest.mark.parametrize("heads, key_heads", [(32, 4), (9, 3), (71, 1), (1, 1)])
def test_batches_and_heads(batch: int, heads: int, key_heads: int) -> None:
    seen = tuple(range(0, 5 * batch, 5))
    check_window_step(
        torch.bfloat16, device="cuda", window=64, seen=seen, heads=heads, key_heads=key_heads, beside=SECOND, padded=batch > 1
    )


@pytest.mark.parametrize("beside", [None, SECOND, OF_TOKENS, {"is_map": True, "decay": "key_head"}], ids=str)
def test_same_inputs_same_bits(beside: dict[str, Any] | None) -> None:
    case, first = window_case(torch.bfloat16, device="cuda", beside=beside, padded=True), {}
    for _ in range(250):
        token, ring, far = on(None, *case)
        found = {"out": window_cuda.step(token, ring, far), **changed(ring, far)}
        first = first or found
        assert [name for name, x in found.items() if not torch.equal(x, first[name])] == []


@pytest.mark.parametrize("beside", [None, SECOND, OF_TOKENS], ids=str)
def test_a_text_by_a_graph(beside: dict[str, Any] | None) -> None:
    """A captured step, replayed for every token, gives what steps in PyTorch give; nothing is read back to the host."""
    kind: dict[str, Any] = {"window": 5, "sinks": 2, "seen": (0, 4), "beside": beside, "device": "cuda"}
    token, ring, far = window_case(torch.float32, **kind)
    plain = on(None, token, ring, far)
    window_step.step(*on(None, token, ring, far))
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), changed(*on(None, token, ring, far)[1:])
    with torch.cuda.graph(graph):
        out = window_step.step(token, ring, far)
    for name, x in changed(ring, far).items():
        assert torch.equal(x, kept[name])  # a capture runs nothing
    for t in range(40):
        new = window_case(torch.float32, **kind, seed=t)[0]
        for static, x in zip(token[:3], new[:3], strict=True):
            static.copy_(x)
        graph.replay()
        torch.testing.assert_close(out, window_step.by_operators(new, *plain[1:]), rtol=0, atol=1e-4)


def test_a_step_does_not_wait_for_the_device() -> None:
    case = window_case(torch.bfloat16, device="cuda", beside=SECOND, padded=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        window_step.step(*case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled() -> None:
    cases = [window_case(torch.bfloat16, device="cuda", beside=SECOND, padded=True) for _ in range(2)]
    compiled = torch.compile(window_step.step, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(*cases[0]), window_step.step(*cases[1]))
    for name, x in changed(*cases[0][1:]).items():
        assert torch.equal(x, changed(*cases[1][1:])[name]), name


OPTIONS: list[dict[str, Any]] = [
    {"beside": "none"}, {"kernel": "quadratic", "decay": "key_head", "features": 8, "gate": "token"},
    {"decay": "token", "input_gate": "token", "output_map": "norm_gate", "gate": "token"}, {"feature_map": "hedgehog", "decay": "head"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_model_decodes_what_it_gives_at_once(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    options = {"form": "window", "window": 6, "sinks": 2, "learnable": True, **options}
    config = config_class_for("llama")(**tiny_config("llama", 2).to_diff_dict(), linattn=options)
    model = AutoModelForCausalLM.from_config(config).eval().cuda()
    tokens, cache = tiny_tokens(3, 30).cuda(), DynamicCache(config=model.config)
    mask = torch.ones_like(tokens)
    mask[1, :4] = mask[2, 8:10] = 0
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
        pieces = [model(tokens[:, :5], attention_mask=mask[:, :5], past_key_values=cache).logits]
        pieces += [model(tokens[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits for t in range(5, 30)]
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], rtol=0, atol=2e-3)
