"""The benchmarks of generation run, and leave what they say they leave."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch


def test_generation_is_measured_beside_softmax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    generate, threads = importlib.import_module("generate"), torch.get_num_threads()
    cases = ("softmax, static", "window 64 + second degree, static")
    monkeypatch.setattr(generate, "CASES", {name: generate.CASES[name] for name in cases})
    try:
        generate.main(shape="tiny", contexts="8,12", batches="1,2", most=16, tokens=6, rounds=1, out=tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generate-cpu.json", "generate-cpu.md", "generate-cpu.png"]
    rows = json.loads((tmp_path / "generate-cpu.json").read_text())["rows"]
    assert [(row["batch"], row["context"]) for row in rows[::2]] == [(1, 8), (1, 12), (2, 8)]
    assert all(row["token_ms"] > 0 and row["tokens_a_second"] == pytest.approx(1e3 * row["batch"] / row["token_ms"]) for row in rows)
    sizes = {row["case"]: [] for row in rows}
    for row in rows:
        sizes[row["case"]].append(row["cache_bytes"] / row["batch"])
    softmax, ours = (sizes[name] for name in cases)
    assert len(set(ours)) == 1 and softmax[1] > softmax[0]
