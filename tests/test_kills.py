"""Killed at random moments, conversion and training lose nothing of the user's and leave nothing of ours: see kills.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_lose_nothing_and_leave_nothing(kills: int) -> None:
    """A few here; `make kills` makes a hundred of each."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE / "kills.py", str(kills)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["command"] for each in told] == ["convert.linearize", "recipes.tinystories.train"]
    assert all(each["kills"] == kills for each in told)
