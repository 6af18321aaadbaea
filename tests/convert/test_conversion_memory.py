"""Peak memory of converting, as convert/README.md states it: nothing to speak of while files are copied, twice a weight file where they are
cast, twice the checkpoint for the check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_softmax import softmax_model

MIB = 2**20

# Growth of the peak memory, in MiB, over a conversion of a tiny model: copied, cast, checked.
MEASURE = """
import resource, sys
from convert.linearize import LinearizeOptions, linearize
tiny, large, out = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
linearize(tiny, out + "/first", LinearizeOptions(dtype="bfloat16"))
before = peak()
for name, options in {"copied": {"check": False}, "cast": {"check": False, "dtype": "bfloat16"}, "checked": {}}.items():
    linearize(large, f"{out}/{name}", LinearizeOptions(**options))
    print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts in other units elsewhere")
def test_peak_memory_of_converting(tmp_path: Path) -> None:
    sizes = {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4}
    softmax_model("llama").save_pretrained(tmp_path / "tiny")
    softmax_model("llama", **sizes).save_pretrained(tmp_path / "large", max_shard_size="10MB")
    files = [path.stat().st_size / MIB for path in (tmp_path / "large").glob("*.safetensors")]
    assert len(files) > 5
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", MEASURE, tmp_path / "tiny", tmp_path / "large", tmp_path]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
    copied, cast, checked = map(float, done.stdout.split())
    assert copied < 8, done.stdout
    assert cast < 8 + 2 * max(files), done.stdout
    assert checked < 40 + 2 * sum(files), done.stdout
