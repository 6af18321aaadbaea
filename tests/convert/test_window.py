"""Conversion to a window with sinks beside linear attention: options, what is written, the check, the costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

import hf_linattn
from convert.linearize import LinearizeOptions, app, linearize
from hf_linattn.forms.window import Window
from recipes.common.errors import RecipeError

Softmax = Callable[..., Path]
SMALL = {"form": "window", "window": 6, "sinks": 2}


@pytest.mark.parametrize("options", [
    {}, {"gate": "head", "kernel": "quadratic", "decay": "key_head", "features": 3}, {"decay": "token", "dtype": "bfloat16"},
    {"beside": "none"}, {"gate": "head", "learnable": False}, {"keep_softmax": (1,)},
], ids=str)  # fmt: skip
def test_converts_and_holds_against_its_formula(options: dict[str, Any], softmax_checkpoint: Softmax, tmp_path: Path) -> None:
    report = linearize(softmax_checkpoint(), tmp_path / "out", LinearizeOptions(**SMALL, **options))
    assert report["check"]["tokens"] == 24 + 6 and report["check"]["bar"] < 1
    gates = report["starting_values"].get("gate")
    assert gates is None if options.get("beside") == "none" else gates == [pytest.approx(0.880797)] * len(gates)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(3, 90, (1, 30), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    told = report["costs"]["state"]
    linear = [layer for layer in cache.layers if isinstance(layer, hf_linattn.LinearStateLayer)]
    assert sum(layer.nbytes() for layer in linear) == told


@pytest.mark.parametrize("window", [300, 100_000])
def test_wide_windows_are_checked_as_narrower_ones_and_by_a_bar(window: int, softmax_checkpoint: Softmax, tmp_path: Path) -> None:
    """The probe does not grow with them, and behind a decay of 1.5 tokens the formula in float32 does not round to 0."""
    report = linearize(softmax_checkpoint(), tmp_path / "out", LinearizeOptions(form="window", window=window, sinks=2))
    assert report["check"]["tokens"] == 24 + min(window, 512) and report["check"]["plain_error"] < 1e-4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["linattn"]["window"] == window


def test_from_the_command_line(softmax_checkpoint: Softmax, tmp_path: Path) -> None:
    arguments = ["--form", "window", "--window", "5", "--sinks", "1", "--gate", "head", "--kernel", "quadratic", "--features", "3"]
    result = CliRunner().invoke(app, [str(softmax_checkpoint()), str(tmp_path / "out"), *arguments, "--no-check"])
    assert result.exit_code == 0, result.output
    linattn = json.loads((tmp_path / "out" / "config.json").read_text())["linattn"]
    found = {name: linattn[name] for name in ("form", "window", "sinks", "gate", "beside", "kernel", "features")}
    assert found == {
        "form": "window",
        "window": 5,
        "sinks": 1,
        "gate": "head",
        "beside": "polynomial",
        "kernel": "quadratic",
        "features": 3,
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "softmax over the last 5 tokens and the first 1, mixed by a learned gate per head" in card


def test_defaults() -> None:
    options = LinearizeOptions(form="window").linattn()
    assert (options.window, options.sinks, options.gate, options.beside, options.decay) == (64, 4, "token", "polynomial", "head")


@pytest.mark.parametrize("options, words", [
    ({"form": "window", "window": 0}, "window is 0; expected at least 1"),
    ({"form": "windows"}, "form is 'windows'; expected one of polynomial, window"),
    ({"window": 8}, "window goes with form window; the form polynomial has no such option"),
    ({"form": "window", "gate": "token", "learnable": False}, "needs learnable=true"),
])  # fmt: skip
def test_what_does_not_go_together(options: dict[str, Any], words: str, softmax_checkpoint: Softmax, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        linearize(softmax_checkpoint(), tmp_path / "out", LinearizeOptions(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("slip", ["window", "sinks", "gate", "ring"])
def test_the_check_finds_a_slip(slip: str, softmax_checkpoint: Softmax, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token fewer, the sinks forgotten, another gate than stored, a ring that is not moved on."""
    attend, step = Window._attend, Window.step
    if slip == "ring":
        monkeypatch.setattr(
            Window, "step", lambda self, call, numbers, state: step(self, call, numbers, {n: x.clone() for n, x in state.items()})
        )
    else:
        other = {"window": {"window": 5}, "sinks": {"sinks": 0}}.get(slip, {})

        def slipped(self: Window, call: Any, numbers: Any, before: Any, keep: bool) -> Any:
            numbers = numbers | {"gate": 0.8} if slip == "gate" else numbers
            if keep:
                return attend(self, call, numbers, before, keep)
            return attend(Window(type(self.options)(**{**vars(self.options), **other})), call, numbers, before, keep)

        monkeypatch.setattr(Window, "_attend", slipped)
    with pytest.raises(RecipeError, match="the converter or the plugin is at fault"):
        linearize(softmax_checkpoint(), tmp_path / "out", LinearizeOptions(**SMALL))
