"""`hf_linattn.ops.cuda` on the emulated kernels: tensors lie on the CPU, and everything else is as on a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from ctypes import Structure, byref
from pathlib import Path

import torch
from torch import Tensor

from hf_linattn.ops import cuda, window_cuda


def use(path: Path, monkeypatch) -> None:
    """Have `cuda.forward`, `cuda.backward`, `cuda.paths` and `window_cuda.step` call the library at `path`."""
    library, cause = cuda.load_library.__wrapped__(path)
    assert library is not None, cause

    def run(self, name: str, results: Structure, plan: cuda._Plan) -> Tensor:
        workspace = torch.full((plan.workspace_bytes + 1024,), 0xFF, dtype=torch.uint8)  # NaN wherever it is read before it is written
        begin = -workspace.data_ptr() % 1024
        workspace = workspace[begin : begin + plan.workspace_bytes]
        self.problem.workspace = workspace.data_ptr()
        self.problem.stream = None
        assert getattr(library, f"linattn_{name}")(byref(self.problem), byref(results), byref(plan)) == 0
        return workspace

    monkeypatch.setattr(cuda, "load_library", lambda: (library, ""))
    monkeypatch.setattr(cuda, "falls_back", lambda *call: False)
    monkeypatch.setattr(cuda, "cannot_run", lambda device: "")
    monkeypatch.setattr(cuda._Launch, "run", run)
    monkeypatch.setattr(window_cuda, "_memory", lambda count, like: torch.full((count,), 0xFF, dtype=torch.uint8))
    monkeypatch.setattr(window_cuda, "_stream", lambda device: None)
    monkeypatch.setattr(cuda, "_current", lambda device: nullcontext())
