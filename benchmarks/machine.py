"""The machine that a benchmark runs on."""

from __future__ import annotations

import platform
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import torch


def machine() -> dict:
    """What a figure must stand beside."""
    commit = ""
    with suppress(FileNotFoundError):  # a machine without git
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit or None, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
