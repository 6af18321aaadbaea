"""What a training stage is told, by the command line or by a recipe. Nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from convert.commands import argument, check_size, option
from convert.errors import ConversionError, OptionError
from recipes.common.documents import Source
from recipes.common.reading import refuse_missing_folder, user_path


@dataclass(kw_only=True)
class StageOptions:
    """What every stage is told. Each field is an option of the command, with its help, and a key of a recipe."""

    student: str = argument("STUDENT", "Folder of a converted checkpoint, or of the run of an earlier stage.")
    output: str = argument("OUTPUT", "Folder of the run: metrics, pictures, checkpoints, and at the end model/.")
    teacher: str = option("", "Folder, GGUF file or hub id of the softmax checkpoint that the student was converted from.")
    data: list[str] = option([], "Text to train on: files, folders of them, or hub ids; may be repeated.")
    valid_data: list[str] = option([], "Text to validate on, given as --data is; without it rows of the training text are kept out.")
    split: str = option("train", "Split to read of a hub data set.")
    column: str = option("text", "Column of a table that holds the text, or a conversation.")
    separator: str = option("<|endoftext|>", "What stands between the documents of a text file.")
    separate: bool = option(False, "Hide documents that share a row from one another.")
    length: int = option(1024, "Tokens a row.", min=2)
    batch_size: int = option(16, "Rows of each forward pass, in each process.", min=1)
    gradient_accumulation: int = option(1, "Forward passes of each step.", min=1)
    tokens: int = option(1_000_000, "Tokens to train on.", min=1)
    learning_rate: float = option(5e-4, "Highest learning rate of the weights; new matrices, such as gates, learn at four times this.")
    head_learning_rate: float = option(0.03, "Highest learning rate of the new numbers that each head has one of, such as decays.")
    warmup: float = option(0.05, "Share of the steps over which the learning rates rise from 0.", min=0, max=0.5)
    final_rate: float = option(0.02, "Share of the learning rates that is left at the end; they fall to it along a cosine.", min=0, max=1)
    clip: float = option(1.0, "Largest norm of a gradient; a larger one is scaled down to it.")
    mixed_precision: str = option("", "Type of products: no (float32), bf16 or fp16; by default what accelerate is configured for.")
    window_drop: float = option(0.0, "Share of windows dropped at first, falling to 0: what is beside them learns.", min=0, max=1)
    gradient_checkpointing: bool = option(False, "Compute activations twice, for less memory.")
    seed: int = option(0, "Seed of the order of the rows.", min=0, max=2**32 - 1)
    log_every: int = option(10, "Steps between two lines of metrics.jsonl.", min=1)
    validate_every: int = option(100, "Steps between two validations.", min=1)
    save_every: int = option(100, "Steps between two checkpoints.", min=1)
    valid_rows: int = option(32, "Rows to validate on.", min=1)
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Type to store the trained weights in.")

    def __post_init__(self) -> None:
        """Refuses what no student could make right.

        Raises:
            OptionError: an option is missing or out of its bounds.
        """
        for one in fields(self):
            check_size(one, getattr(self, one.name))
        for name in ("learning_rate", "head_learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{{{name}}} is {getattr(self, name)}; expected a number above 0")
        if self.mixed_precision not in ("", "no", "bf16", "fp16"):
            raise OptionError(f"{{mixed_precision}} is {self.mixed_precision!r}; expected no, bf16 or fp16")
        if self.save_every % self.log_every:
            raise OptionError(f"{{save_every}} ({self.save_every}) must be a multiple of {{log_every}} ({self.log_every})")
        if not self.teacher:
            raise OptionError("no teacher is given; name the softmax checkpoint that the student was converted from, by {teacher}")
        if not self.data:
            raise OptionError("no text is given; name files, folders or hub ids, by {data}")

    def sources(self, names: list[str]) -> list[Source]:
        """Where the text comes from."""
        return [Source(name, self.split, self.column, self.separator, column_option="--column") for name in names]

    def reads(self) -> list[str]:
        """The files, folders and hub ids that the stage reads."""
        return [self.student, self.teacher, *self.data, *self.valid_data]

    def check_paths(self) -> None:
        """Refuses a student or a teacher that is nowhere: before torch is imported, and before the hub is asked.

        Raises:
            RecipeError: there is none.
        """
        self.student = student_folder(self.student)
        for name in (self.student, self.teacher):
            refuse_missing_folder(name)


def student_folder(name: str) -> str:
    """The checkpoint in `name`: of a stage's run it is model/."""
    folder = user_path(name)
    inside = folder / "model"
    if folder.is_dir() and not (folder / "config.json").exists() and (folder / "config.yaml").exists() and not inside.exists():
        raise ConversionError(f"{name} is the run of a stage that has not come to its end; start that stage again with --resume")
    return str(inside) if (inside / "config.json").exists() and not (folder / "config.json").exists() else name


@dataclass(kw_only=True)
class TransferOptions(StageOptions):
    """What `convert.transfer` is told."""

    train: Literal["attention", "new"] = option(
        "attention", "What learns: attention, all of the linear attention layers; new, only what conversion added to them."
    )


@dataclass(kw_only=True)
class CalibrateOptions(TransferOptions):
    """What `convert.calibrate` is told. Rates of learning mean nothing to it."""

    tokens: int = option(65_536, "Tokens of text over which the teacher's attention is looked at.", min=1)


@dataclass(kw_only=True)
class DistillOptions(StageOptions):
    """What `convert.distill` is told."""

    tokens: int = option(20_000_000, "Tokens to train on.", min=1)
    kl_weight: float = option(1.0, "Weight of the KL divergence to the teacher's predictions.", min=0)
    text_weight: float = option(0.0, "Weight of the text's own cross-entropy.", min=0)
    lora: int = option(0, "Rank of LoRA on the attention layers' matrices, merged at the end; 0: all parameters learn.", min=0)
    long_length: int = option(0, "Tokens a row in the last steps; 0: as in all others.", min=0)
    long_share: float = option(0.2, "Share of the steps, the last ones, with rows of long_length tokens.", min=0, max=1)
    compile: bool = option(False, "Compile the layers by torch.compile: a minute or more before the first step, then fewer kernels.")
    control: bool = option(False, "Train the teacher itself, given as STUDENT, on the text alone: what students are held against.")
    repeat: int = option(0, "Rows in 16 in which stretches of their own tokens come again later, which teaches recall.", min=0, max=16)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kl_weight + self.text_weight > 0:
            raise OptionError("{kl_weight} and {text_weight} are both 0, so nothing would be learned; give one of them a weight")
        if self.control and self.kl_weight:
            raise OptionError("{control}: the teacher has nothing to learn of itself; give {kl_weight} 0 and {text_weight} 1")
        if self.long_length and (self.long_length <= self.length or self.batch_size * self.length % self.long_length):
            raise OptionError(
                f"{{long_length}} {self.long_length} must be more than {{length}} ({self.length}) and divide the tokens of a batch "
                f"({self.batch_size * self.length}), so that every step has as many tokens"
            )
