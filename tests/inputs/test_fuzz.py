"""Files of every kind that commands read, spoiled at random: each ends in success or in one sentence, and nothing is left behind.

A few hundred inputs run with the tests; `HF_LINATTN_FUZZ=10000` gives as many in all. What was ever found stands in corpus/KIND/, and is
run again each time.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from convert.linearize import app
from recipes.common.config import load_config
from recipes.common.errors import RecipeError
from recipes.common.marks import seal
from recipes.common.state import read_progress
from recipes.lra.settings import Settings as LRASettings
from recipes.tinystories import compare
from recipes.tinystories.model import load_model
from recipes.tinystories.settings import Settings

CORPUS = Path(__file__).parent / "corpus"
ASKED = int(os.environ.get("HF_LINATTN_FUZZ", "0"))
SHARES = {"config": 0.15, "index": 0.15, "yaml": 0.25, "progress": 0.2, "metrics": 0.25}

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 10**9, 10**20, -(10**20), 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "x", "0",
    "../x", "/etc/hostname", "a/../../b", "C:\\x", "\0", "é", "\u2028", "\ud800", "x" * 5000, "-1", "1e999", "linattn", "someone/kernel",
    [], [0], [[]], ["x"] * 3, [None], [[1, 2], [3]], {}, {"": 0}, {"x": {"x": {"x": []}}}, [[[[[[[[[[[[]]]]]]]]]]]],
]  # fmt: skip
values = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(-3, 3), max_size=4))
SPLICES = [
    b"{",
    b"}",
    b"[",
    b'"',
    b",",
    b":",
    b"\xff",
    b"\x00",
    b"\xc3",
    b"[" * 3000,
    b"9" * 5000,
    b"NaN",
    b"-Infinity",
    b"\n",
    b"- &a [*a]\n",
]


@st.composite
def spoiled(draw: st.DrawFn, whole: Any, write: Callable[[Any], bytes]) -> bytes:
    """The text of `whole` with up to three of its values changed, lost or added, and with some of its bytes changed, cut or added."""
    document = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(0, 3))):
        place = document
        while isinstance(place, (dict, list)) and place:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            action = draw(st.sampled_from(["change", "change", "lose", "add"]))
            if action == "lose":
                del place[key]
            elif action == "add" and isinstance(place, dict):
                place[draw(st.sampled_from(ADDED))] = copy.deepcopy(draw(values))
            else:
                place[key] = copy.deepcopy(draw(values))
            break
    data = write(document)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.sampled_from([b"", *SPLICES])) + data[at + draw(st.integers(0, 3)) :]
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data


ADDED = [
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "quantization_config",
    "attn_implementation",
    "auto_map",
    "text_config",
    "head_dim",
]
ADDED += [
    "sliding_window",
    "dtype",
    "torch_dtype",
    "architectures",
    "is_encoder_decoder",
    "linattn",
    "use_cache",
    "tie_word_embeddings",
    "base",
]
ADDED += ["step", "seconds", "model", "steps", "valid_loss", "tokens", "pad_token_id", "num_labels", "id2label", "output_attentions", "\0"]


def as_json(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=True).encode()


def as_lines(document: Any) -> bytes:
    return b"".join(as_json(line) + b"\n" for line in document)


def as_yaml(document: Any) -> bytes:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=False).encode("utf-8", errors="surrogatepass")


class Place:
    """A folder in which each kind of file is put in its place and read by the command that reads it."""

    def __init__(self, folder: Path, whole: Path) -> None:
        self.folder = folder
        self.model = Path(shutil.copytree(whole / "model", folder / "model"))
        self.sharded = Path(shutil.copytree(whole / "model", folder / "sharded"))
        (self.sharded / "model.safetensors").rename(self.sharded / "a.safetensors")
        self.keys = sorted(load_file(self.sharded / "a.safetensors"))
        self.run = folder / "run"
        self.checkpoint = self.run / "checkpoints" / "step-00000004"
        self.checkpoint.mkdir(parents=True)
        (self.run / "config.yaml").write_text("attn_implementation: linattn\nnoise: 0.1\n")
        chosen = {"output": "out", "model": "m", "steps": 3, "learning_rate": 0.1, "linattn": {"kernel": "linear"}, "train_data": ["a"]}
        records = [{"step": 0, "valid_loss": 2.0, "seconds": 0.0}]
        records += [{"step": 1, "tokens": 8, "seconds": 1.0, "tokens_per_second": 8.0}]
        self.documents: dict[str, tuple[Any, Callable[[Any], bytes]]] = {
            "config": (json.loads((self.model / "config.json").read_text()), as_json),
            "index": ({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(self.keys, "a.safetensors")}, as_json),
            "yaml": (chosen, as_yaml),
            "progress": ({"step": 4, "seconds": 1.5, "run": "ab", "best": 0.5, "best_step": 2}, as_json),
            "metrics": (records, as_lines),
        }

    def read(self, kind: str, data: bytes) -> None:
        """Raises nothing but RecipeError."""
        getattr(self, kind)(data)

    def config(self, data: bytes) -> None:
        (self.model / "config.json").write_bytes(data)
        self.convert(self.model)
        load_model(str(self.model))

    def index(self, data: bytes) -> None:
        (self.sharded / "model.safetensors.index.json").write_bytes(data)
        self.convert(self.sharded)
        load_model(str(self.sharded))

    def convert(self, source: Path) -> None:
        out = self.folder / "out"
        before = sorted(self.folder.iterdir())
        done = CliRunner().invoke(app, [str(source), str(out), "--no-check"])
        if done.exit_code == 0:
            shutil.rmtree(out)
            return
        assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
        assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert sorted(self.folder.iterdir()) == before
        raise RecipeError(done.stderr.strip())

    def yaml(self, data: bytes) -> None:
        path = self.folder / "settings.yaml"
        path.write_bytes(data)
        for kind in (Settings, LRASettings):
            try:
                load_config(kind, path)
            except RecipeError as error:
                one_sentence(error)

    def progress(self, data: bytes) -> None:
        (self.checkpoint / "progress.json").write_bytes(data)
        seal(self.checkpoint, "recipes.tinystories.train")
        assert 0 <= read_progress(self.checkpoint, "ab", steps=4)["step"] <= 4

    def metrics(self, data: bytes) -> None:
        (self.run / "metrics.jsonl").write_bytes(data)
        found = compare.read_run(str(self.run))
        json.dumps(found, allow_nan=False)
        compare._figures(found)


def one_sentence(error: RecipeError) -> None:
    assert "\n" not in str(error) and 10 < len(str(error)) < 2000, str(error)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> Place:
    return Place(tmp_path_factory.mktemp("fuzz"), whole)


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.timeout(3600 if ASKED else 120)
def test_whatever_a_file_holds(kind: str, place: Place) -> None:
    document, write = place.documents[kind]

    @settings(
        max_examples=round((ASKED or 150) * SHARES[kind]), deadline=None, derandomize=not ASKED, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(spoiled(document, write))
    def run(data: bytes) -> None:
        try:
            place.read(kind, data)
        except RecipeError as error:
            one_sentence(error)

    run()


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found(path: Path, place: Place) -> None:
    try:
        place.read(path.parent.name, path.read_bytes())
    except RecipeError as error:
        one_sentence(error)


def test_whole_files_are_read(place: Place) -> None:
    """Or the others would prove nothing."""
    for kind, (document, write) in place.documents.items():
        place.read(kind, write(document))
