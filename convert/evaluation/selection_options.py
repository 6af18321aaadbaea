"""How layers are chosen that stay softmax: what the command line and a caller from Python both give. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from convert.commands import argument, option
from convert.errors import ConversionError
from convert.evaluation.options import known_dtype, whole_numbers
from recipes.common.reading import refuse_missing_folder, user_path


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """How to choose; README.md says what each does."""

    teacher: str = argument("TEACHER", "The softmax model: a folder, a GGUF file or a hub id.")
    data: tuple[Path, ...] = option(MISSING, "File of text to measure on; may be repeated.", kind=list[Path])
    count: int = option(4, "How many layers stay softmax.", min=1)
    candidates: int = option(12, "So many layers, those whose loss is greatest alone, are tried together.", min=1)
    rows: int = option(6, "Rows of text from each file.", min=1)
    length: int = option(1024, "Tokens a row, and of a prompt where the distance does not need more.", min=64)
    distances: tuple[int, ...] = option(
        (400, 900), "Tokens between a key and where it is asked for, with commas between.", kind=str, told="400,900", parse=whole_numbers
    )
    needles: int = option(32, "Prompts with a key to find, for each distance.", min=1)
    window: int = option(64, "Tokens that a layer sees when it does not stay softmax, the newest among them.", min=1)
    sinks: int = option(4, "First tokens that such a layer sees besides.", min=0)
    recall_weight: float = option(1.0, "Weight of the loss at keys beside the loss on text.", min=0)
    attention_only: bool = option(
        False, "Rank layers by how much attention they pay to keys, in one pass; no loss is measured.", flag="--attention-only"
    )
    batch_tokens: int = option(0, "Tokens of each forward pass; 0: 32,768 on a GPU, 4,096 on a CPU.", min=0)
    device: str = option("", "Device to run on, cpu or cuda; by default a GPU if there is one.")
    dtype: str = option("", "Type to compute in: float32, bfloat16 or float16; by default bfloat16 on a GPU, float32 on a CPU.")
    seed: int = option(0, "Seed of the prompts.", min=0)

    def __post_init__(self) -> None:
        """Refuses what needs no model to be seen wrong.

        Raises:
            ConversionError: an unknown dtype, a file that is not there.
        """
        known_dtype(self.dtype, "--dtype")
        if not self.distances:
            raise ConversionError("--distances is empty; give at least one, beyond the window")
        if near := next((distance for distance in self.distances if distance <= self.window), None):
            raise ConversionError(f"--distances names {near}, which the window of {self.window} reaches; give larger ones")
        for path in self.data:
            if not user_path(path).is_file():
                raise ConversionError(f"{path}: no such file; give text, or rows of JSON with a key text, as it is or packed by xz")
        refuse_missing_folder(self.teacher)
