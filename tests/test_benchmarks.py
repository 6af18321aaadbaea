"""The benchmark of generation runs, and leaves what it says it leaves; tables of a GPU's times are made from rows as one gives them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def test_generation_is_measured_beside_softmax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    generate, threads = importlib.import_module("generate"), torch.get_num_threads()
    cases = ("softmax, static", "window 64 + second degree, static")
    asked = ["--shape", "tiny", "--contexts", "8,12", "--batches", "1,2", "--most", "16", "--tokens", "6", "--rounds", "1"]
    try:
        generate.main([*asked, "--cases", *cases, "--out", str(tmp_path)])
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


def test_rows_that_are_known_are_written_where_a_later_case_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    generate = importlib.import_module("generate")

    def some_rows(cases: list[str], **asked: object) -> Iterator[dict]:
        numbers = dict.fromkeys(("token_ms", "tokens_a_second", "cache_bytes", "peak_bytes", "prompt_s", "compile_s"), 1.0)
        yield {"case": cases[1], "batch": 1, "context": 8, **numbers}
        yield {"case": cases[0], "batch": 1, "context": 8, "out_of_memory": True}
        raise RuntimeError("a third case is not known")

    monkeypatch.setattr(generate, "all_rows", some_rows)
    with pytest.raises(RuntimeError, match="a third case"):
        generate.main(["--contexts", "8", "--batches", "1", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generate-cpu.json", "generate-cpu.md"]
    first, second = (tmp_path / "generate-cpu.md").read_text().split("---:|\n")[1].splitlines()[:2]
    assert first.startswith("| 1 | 8 | softmax, dynamic | x |") and second.startswith("| 1 | 8 | softmax, static | 1.00 |")


@pytest.mark.parametrize("wrong", ["--contexts 8,", "--batches 0", "--most 1", "--rounds 0", "--jobs 0"])
def test_generation_of_no_size_is_refused_in_a_sentence(wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    with pytest.raises(SystemExit):
        importlib.import_module("generate").main(["--shape", "tiny", "--contexts", "8", "--batches", "1", *wrong.split()])
    assert "rounds and jobs 1 or more" in capsys.readouterr().err


def test_a_gpus_rows_stand_beside_cudnns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    gpu, timing = importlib.import_module("gpu"), importlib.import_module("gpu_timing")
    times = {"forward_ms": 0.1, "forward_floors": 1.5, "forward_eager_ms": 0.2}
    times |= {"both_ms": 0.4, "both_floors": 2.0, "both_eager_ms": 0.5, "peak_tensors": 4.1}
    case = timing.Case((8, 32, 2048, 64), key_heads=4)
    rows = [
        gpu.row_of("linattn", case, times) | {"targets": (1.3, 2.0)},
        gpu.row_of(gpu.CUDNN, case, times | {"forward_ms": 0.4, "both_ms": 1.6}),
        gpu.row_of("FLA: chunk", case, times | {"both_not_captured": True}),
        gpu.row_of("Helion: chunk", case, {"forward_refused": "RuntimeError: no"}),
    ]
    page = gpu.page({"gpu": "a card"}, {"plain": rows}, {"FLA": "0.6.0", "Helion": "ImportError: no module"})
    assert (
        "| FLA | 0.6.0 |" in page and "| Helion | ImportError: no module |" in page and "- Helion: chunk, forward: RuntimeError: no" in page
    )
    ours = "| 8, 32:4, 2048, 64 | linattn | 0.1 | 1.50 (target 1.3) | 0.25 | 0.4 | 2.00 (target 2.0) | 0.25 | 0.2 · 0.5 | 4.1 |"
    assert ours in page and "| 0.4 (eager) | 2.00 |" in page and "| Helion: chunk | refused | - | - | refused |" not in page


def test_floors_count_what_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    timing = importlib.import_module("gpu_timing")
    forward, both = timing.Case((1, 4, 1000, 64), key_heads=2, features=16).floors_ms(1.0)
    assert forward == pytest.approx(2 * 1000 * (4 * 16 + 2 * 16 + 2 * 64 + 4 * 64) / 1e6) and both == pytest.approx(3 * forward)


def test_a_library_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    rows: list[dict] = []
    said = importlib.import_module("peer_rows").library_rows("Helion", [(1, 1, 64, 64)], 1000.0, 120.0, rows.append)
    assert rows == [] and said.startswith("0 rows, then") and ("PackageNotFoundError" in said or "HELION_EXAMPLES" in said)


def test_others_steps_stand_beside_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    decode = importlib.import_module("decode")
    rows = [
        {"layer": "32, D 64", "batch": 16, "kernel_ms": 0.02, "eager_ms": 0.03},
        {"layer": "32, D 64", "batch": 16, "library": "FLA", "ms": 0.04, "eager_ms": 0.09},
        {"library": "FlashInfer", "refused": "ImportError: none"},
    ]
    lines = decode.peer_table(rows)
    assert lines[-1] == "| 32, D 64 | 16 | 20.0 (30.0) | 40.0 (90.0) | - |" and "FlashInfer refused: ImportError: none\n" in lines
    assert decode.peer_table(rows[:1]) == []
