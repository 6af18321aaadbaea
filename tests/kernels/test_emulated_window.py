"""The kernels of one new token of a window on the CPU, by the emulator in `tests/emulation`, at the accuracy bar."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulation import build
from window_step_cases import SECOND, WINDOW_KINDS, changed, check_window_step, on, window_case

from hf_linattn.ops import window_cuda
from hf_linattn.ops.window_step import by_operators

pytestmark = [
    pytest.mark.skipif(build.compiler() is None or build.headers() is None, reason="needs g++ or clang++, and CUDA's headers"),
    pytest.mark.timeout(1200),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", WINDOW_KINDS, ids=str)
def test_one_token_of_a_window(kernels, dtype: torch.dtype, kind: dict[str, Any]) -> None:
    check_window_step(dtype, **kind)


@pytest.mark.parametrize(
    "kind", [{"window": 300, "seen": (310, 20)}, {"beside": SECOND, "padded": True, "heads": 9, "key_heads": 3}], ids=str
)
def test_the_order_of_warps_does_not_matter(kernels, kind: dict[str, Any]) -> None:
    case, found = window_case(torch.bfloat16, **kind), []
    for _ in range(4):
        token, ring, beside = on(None, *case)
        out = window_cuda.step(token, ring, beside)
        found.append({"out": out, **changed(ring, beside)})
    for other in found[1:]:
        assert [name for name, x in found[0].items() if not torch.equal(x, other[name])] == []


def test_what_padding_holds_reaches_nothing(kernels) -> None:
    case = window_case(torch.bfloat16, beside={"decay": "token", "input_gate": True, "gate": "token"}, padded=True)
    found = []
    for filler in (0.0, float("nan")):
        token, ring, beside = on(None, *case)
        assert token.real is not None
        padding = ~token.real[:, :, None, None]
        token = token._replace(**{name: getattr(token, name).masked_fill(padding, filler) for name in ("query", "key", "value")})
        own = {name: getattr(beside, name).masked_fill(padding[..., 0], filler) for name in ("gate", "log_decay", "log_input_gate")}
        beside = beside._replace(**own)
        found.append({"out": window_cuda.step(token, ring, beside), **changed(ring, beside)})
    assert [name for name, x in found[0].items() if not torch.equal(x, found[1][name])] == []


def test_a_text_token_by_token(kernels) -> None:
    """Thirty tokens after one another: what the kernels keep is what the next token is to see."""
    kind: dict[str, Any] = {"seen": (0, 4), "window": 5, "sinks": 2, "head_dim": 16, "value_dim": 16, "beside": {**SECOND, "features": 8}}
    ours, plain = (window_case(torch.float32, **kind) for _ in range(2))
    for t in range(30):
        token = window_case(torch.float32, **kind, seed=t)[0]
        expected = by_operators(token, *plain[1:])
        torch.testing.assert_close(window_cuda.step(token, *ours[1:]), expected, rtol=0, atol=1e-4)


def test_what_does_not_fit_is_refused(kernels) -> None:
    token, ring, beside = window_case(torch.float32, beside=SECOND)
    with pytest.raises(ValueError, match="a tensor of a window's token must be of shape"):
        window_cuda.step(token, ring, beside._replace(gate=torch.ones(3)))
    with pytest.raises(ValueError, match="a tensor of a window's token must be of shape"):
        window_cuda.step(token._replace(key=token.key[:2]), ring, beside)
    window_cuda.step(token, ring, beside)
    with pytest.raises(ValueError, match="a tensor of a window's token must be on the device of query, cpu, but is on meta"):
        window_cuda.step(token, ring, beside._replace(state=beside.state.to("meta")))
    with pytest.raises(ValueError, match="on the device of query"):
        window_cuda.step(token._replace(value=token.value.to("meta")), ring, beside)
