"""`hf_linattn.ops.cuda` on the emulated kernels: tensors lie on the CPU, and everything else is as on a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from hf_linattn.ops import cuda, device
from hf_linattn.ops.known import Launches


def use(path: Path, monkeypatch) -> None:
    """Have `cuda.forward`, `cuda.backward`, `cuda.paths` and `window_cuda.step` call the library at `path`."""
    library, cause = cuda.load_library.__wrapped__(path)
    assert library is not None, cause

    def memory(count: int, on: torch.device) -> Tensor:
        made = torch.full((count + 1024,), 0xFF, dtype=torch.uint8)  # NaN wherever it is read before it is written
        begin = -made.data_ptr() % 1024
        return made[begin : begin + count]

    monkeypatch.setattr(cuda, "load_library", lambda: (library, ""))
    monkeypatch.setattr(cuda, "falls_back", lambda *call: False)
    monkeypatch.setattr(cuda, "cannot_run", lambda device: "")
    for name in ("_forwards", "_backwards", "_steps"):  # those of another library are not for this one
        monkeypatch.setattr(cuda, name, Launches())
    monkeypatch.setattr(device, "memory", memory)
    monkeypatch.setattr(device, "stream", lambda on: 0)
    monkeypatch.setattr(device, "current", lambda on: nullcontext())
