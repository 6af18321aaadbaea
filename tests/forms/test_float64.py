"""Every form in float64 is exact to its last digits: nothing on the way is cast to a narrower dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learned import learned_model
from tiny_models import tiny_model, tiny_tokens
from torch import Tensor
from transformers import DynamicCache
from window_cases import make_tensors

from hf_linattn import LinAttnConfig
from hf_linattn.forms import Call, Sizes
from hf_linattn.ops import reference, window_reference

KINDS: list[dict[str, Any]] = [
    {}, {"decay": "head", "kernel": "quadratic"}, {"decay": "token", "input_gate": "token"},
    {"kernel": "quadratic", "features": 3, "decay": "key_head"}, {"form": "window", "beside": "none"}, {"form": "window", "decay": "head"},
    {"form": "window", "kernel": "quadratic", "decay": "token", "gate": "token", "features": 3, "input_gate": "token"},
    {"feature_map": "hedgehog", "decay": "head"}, {"form": "window", "feature_map": "hedgehog"},
    {"output_map": "norm_gate", "decay": "head"}, {"output_map": "gate", "input_gate": "token"}, {"form": "window", "output_map": "norm"},
    {"form": "window", "output_map": "norm_gate", "gate": "token"},
]  # fmt: skip
PER_TOKEN = ("log_decay", "log_input_gate", "gate", "output_gate")
LENGTH, W, S = 20, 5, 2


def by_pairs(call: Call, numbers: dict[str, Any], form: str) -> Tensor:
    """The formula of a form over all pairs, put together anew from the references of its parts."""
    query, key, value, given = call.query, call.key, call.value, dict(numbers)
    near = window_reference(query, key, value, window=W, sinks=S) if form == "window" else None
    gate = given.pop("gate", None)
    power, log_scale, factor = (given.pop(name, None) for name in ("output_power", "output_log_scale", "output_gate"))
    if not given:
        return near
    if "query_projection" in given:
        center = given.pop("key_center")[:, None]
        query, key = query @ given.pop("query_projection"), (key - center) @ given.pop("key_projection")
    if "query_map" in given:
        maps = given.pop("query_map"), given.pop("key_map")
        query, key = (torch.cat([x @ w, -x @ w], -1).softmax(-1) for x, w in zip((query, key), maps, strict=True))
        given |= {"a": 0.0, "normalize_qk": False}
    lag = {} if near is None else {"lag": W}
    if "log_input_gate" in given:
        weight = given.pop("log_input_gate").exp()[..., None]
        above, below = (reference(query, key, x, **given, **lag) for x in (value * weight, weight))
        far = above / below.masked_fill(below == 0, 1)
    else:
        far = reference(query, key, value, **given, **lag)
    if power is not None:
        rms = (far.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        far = far * log_scale.exp()[:, None, None] / rms ** power[:, None, None]
    far = far if factor is None else far * factor[..., None]
    if near is None:
        return far
    share = gate[:, None, None] if gate.dim() == 1 else gate[..., None]
    mixed = share * near + (1 - share) * far
    return torch.cat([near[:, :, :W], mixed[:, :, W:]], 2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_whole_in_pieces_and_token_by_token(kind: dict[str, Any]) -> None:
    form = LinAttnConfig(**({"window": W, "sinks": S} if "form" in kind else {}), **kind).attention
    generator = torch.Generator().manual_seed(1)
    parameters = form.parameters(Sizes(4, 2, 8, 6, 12), True)
    for parameter in [] if parameters is None else parameters.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    hidden = torch.randn(2, LENGTH, 12, generator=generator)
    call = Call(*make_tensors(LENGTH, grad=False), hidden=hidden)
    numbers = {name: x.detach().double() if isinstance(x, Tensor) else x for name, x in form.numbers(call, parameters).items()}
    expected = by_pairs(call, numbers, form.name)

    def part(start: int, stop: int) -> tuple[Call, dict[str, Any]]:
        tensors = (x[:, :, start:stop] for x in (call.query, call.key, call.value))
        return Call(*tensors), {
            name: x[..., start:stop] if name in PER_TOKEN and isinstance(x, Tensor) and x.dim() == 3 else x for name, x in numbers.items()
        }

    first, state = form.attend_from(*part(0, 9), None)
    outs = [first, form.attend_from(*part(9, 14), state)]
    outs, state = [first, outs[1][0]], outs[1][1]
    outs += [form.step(*part(at, at + 1), state) for at in range(14, LENGTH)]
    for found in (form.attend(call, numbers), form.reference(call, numbers), torch.cat(outs, 2)):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_numbers_of_a_float64_model_are_made_in_float64() -> None:
    """They were made in float32, and a decay, a gate or a factor of the output was 1e-8 to 1e-7 of itself off."""
    options = {"decay": "token", "input_gate": "token", "output_map": "norm_gate", "gate": "token", "kernel": "quadratic"}
    form = LinAttnConfig(form="window", window=W, sinks=S, **options).attention
    parameters: Any = form.parameters(Sizes(4, 2, 8, 6, 12), True).double()
    for parameter in parameters.parameters():
        parameter.data += torch.randn_like(parameter)
    hidden = torch.randn(2, LENGTH, 12, dtype=torch.float64)
    numbers = form.numbers(Call(*make_tensors(LENGTH, grad=False), hidden=hidden), parameters)

    def learned(name: str) -> Tensor:
        return getattr(parameters, name).double() + getattr(parameters, name + "_offset")

    def read(name: str) -> Tensor:
        return (hidden @ getattr(parameters, name).mT).mT

    expected = {
        "log_decay": -F.softplus(learned("rate_logit")[:, None] + read("rate_weight")),
        "log_input_gate": 5 * torch.tanh(read("input_weight") / 5), "output_gate": 2 * torch.sigmoid(read("output_weight")),
        "gate": torch.sigmoid(learned("gate_logit")[:, None] + read("gate_weight")),
        "output_power": torch.tanh(learned("output_power_logit")), "output_log_scale": learned("output_log_scale"),
        "temperature": learned("log_temperature").exp(), "b": 0.999 * 2 * 0.5**0.5 * torch.sigmoid(learned("b_logit")),
    }  # fmt: skip
    for name, number in expected.items():
        torch.testing.assert_close(numbers[name], number, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.get("beside") != "none"], ids=str)
def test_a_float64_model_gives_the_same_in_pieces(kind: dict[str, Any]) -> None:
    window = {"window": W, "sinks": S} if "form" in kind else {}
    model, ids = learned_model(**window, **kind).double(), tiny_tokens()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split([9, 1, 1, 12], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=0, atol=1e-12)
    held = {name: x.dtype for name, x in cache.layers[0].state.items() if name != "seen"}
    assert set(held.values()) == {torch.float64}


def test_fixed_rates_of_a_float64_model() -> None:
    model, found = tiny_model("llama", layers=1, decay="head"), dict[torch.dtype, Tensor]()
    form = LinAttnConfig.of(model.config).attention
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        query = torch.zeros(1, 4, 3, 8, dtype=dtype)
        found[dtype] = form.numbers(Call(query, query, query), None)["log_decay"]
    torch.testing.assert_close(
        found[torch.float64], -1 / (1.5 * (512 / 1.5) ** torch.linspace(0, 1, 4, dtype=torch.float64)), rtol=1e-14, atol=0
    )
    assert torch.equal(found[torch.float32], found[torch.bfloat16]) and found[torch.bfloat16].dtype == torch.float32
