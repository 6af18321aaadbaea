"""What to evaluate and how: what the command line and a caller from Python both give. Nothing here imports torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from convert.commands import argument, option
from convert.errors import ConversionError
from convert.stages.options import student_folder
from recipes.common.reading import refuse_missing_folder, user_path

RECALL = ("needle", "one-of-four", "key-value", "associative")
TASKS = ("lambada_openai", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "boolq", "sciq")
DTYPES = ("float32", "bfloat16", "float16")
MOST = 2**24


def whole_numbers(text: str, option: str, low: int = 1) -> tuple[int, ...]:
    """The numbers of a list such as ``128,512``, in order and each once; of ``none``, none.

    Raises:
        ConversionError: it is no such list.
    """
    try:
        found = [] if text == "none" else sorted({int(word) for word in text.split(",") if word.strip()})
    except ValueError:
        found = [low - 1]
    if not all(low <= number <= MOST for number in found):
        raise ConversionError(f"{option} {text!r}: expected whole numbers from {low} to {MOST:,} with commas between, such as 128,512")
    return tuple(found)


def chosen(text: str, option: str, known: Sequence[str]) -> tuple[str, ...]:
    """The words of a list such as ``piqa,sciq``, where ``all`` stands for all and ``none`` for none of those known.

    Raises:
        ConversionError: a word that is not known.
    """
    if text in ("all", "none"):
        return tuple(known) if text == "all" else ()
    words = [word.strip() for word in text.split(",") if word.strip()]
    if strange := next((word for word in words if word not in known), None):
        raise ConversionError(f"{option} {strange}: unknown; give all, none, or some of {', '.join(known)} with commas between")
    return tuple(word for word in known if word in words)


def known_dtype(text: str, option: str) -> str:
    """The name of a type to compute in, or "".

    Raises:
        ConversionError: another.
    """
    if text not in ("", *DTYPES):
        raise ConversionError(f"{option} {text}: expected one of {', '.join(DTYPES)}")
    return text


def _many(values: Sequence[str] | None, option: str) -> tuple[str, ...]:
    return tuple(values or ())


def _lengths(text: str, option: str) -> tuple[int, ...]:
    return whole_numbers(text, option, 2)


def require_lm_eval(option: str = "--tasks", again: str = " with --resume") -> None:
    """Raises ConversionError where the package that `option` needs is missing."""
    if find_spec("lm_eval") is None:
        raise ConversionError(f"{option} needs the package lm-eval: `pip install lm-eval==0.4.13`, then run the command again{again}")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is measured and how. Each field is an option of the command, under its own or a shorter name; README.md says more."""

    models: tuple[str, ...] = argument(
        "[MODEL]...",
        "Models to measure: folders, GGUF files or hub ids; NAME=MODEL names one in the tables.",
        (),
        kind=list[str] | None,
        parse=_many,
    )
    teacher: str = option(MISSING, "The softmax model that they are held against: a folder, a GGUF file or a hub id.")
    data: tuple[Path, ...] = option(MISSING, "File of text that nothing was trained on; may be repeated.", kind=list[Path])
    rows: int = option(24, "Rows of the shortest --length from each file; of longer ones as many as have as many tokens.", min=1)
    lengths: tuple[int, ...] = option(
        (1024,), "Tokens a row; several with commas between, such as 1024,4096.", name="length", kind=str, told="1024", parse=_lengths
    )
    windows: tuple[int, ...] = option(
        (),
        "Measure the teacher, untrained, under a window of so many tokens too; several with commas between, such as 64,128.",
        name="window_control",
        kind=str,
        told="",
        parse=whole_numbers,
    )
    sinks: int = option(4, "First tokens that the teacher under a window sees besides.", min=0)
    recall: tuple[str, ...] = option(
        RECALL,
        f"Kinds of recall to measure: some of {', '.join(RECALL)}, with commas between; all; or none.",
        kind=str,
        told="all",
        parse=partial(chosen, known=RECALL),
    )
    distances: tuple[int, ...] = option(
        (40, 150, 400, 900, 1900),
        "Tokens between a key and where it is asked for, with commas between.",
        kind=str,
        told="40,150,400,900,1900",
        parse=whole_numbers,
    )
    needles: int = option(100, "Prompts for each kind of recall and each distance.", min=1)
    recall_length: int = option(1024, "Tokens of a prompt of recall, where the distance does not need more.", min=64)
    filler: Path | None = option(None, "File of text to hide keys in (default: the first --data).", show_default=False)
    ranking: Path | None = option(None, "File that linattn select-layers wrote, for the report to show.", show_default=False)
    runs: tuple[str, ...] = option(
        (),
        "Folder of a training run, or NAME=FOLDER, whose curves the report shows; may be repeated.",
        name="run",
        kind=list[str] | None,
        parse=_many,
    )
    tasks: tuple[str, ...] = option(
        (),
        f"Tasks of lm-eval to measure: some of {', '.join(TASKS)}, with commas between; all; or none.",
        kind=str,
        told="none",
        parse=partial(chosen, known=TASKS),
    )
    task_rows: Path | None = option(None, "Folder with the rows of those tasks (default: from the hub).", show_default=False)
    limit: int | None = option(None, "Examples of each task (default: all).", min=1, show_default=False)
    decode: tuple[int, ...] = option(
        (512, 2048),
        "Tokens after which the cache and the time of one more are measured, with commas between.",
        kind=str,
        told="512,2048",
        parse=whole_numbers,
    )
    batch_tokens: int = option(0, "Tokens of each forward pass; 0: 32,768 on a GPU, 4,096 on a CPU.", min=0)
    device: str = option("", "Device to run on, cpu or cuda; by default a GPU if there is one.")
    dtype: str = option(
        "", "Type to compute in: float32, bfloat16 or float16; by default bfloat16 on a GPU, float32 on a CPU.", parse=known_dtype
    )
    seed: int = option(0, "Seed of the prompts of recall.", min=0)
    card: bool = option(False, "Put each student's tables into its README.md.", flag="--card")

    def __post_init__(self) -> None:
        """Refuses what needs no model to be seen wrong.

        Raises:
            ConversionError: an unknown dtype, a file or folder that is not there, two models of one name.
        """
        known_dtype(self.dtype, "--dtype")
        for path in filter(None, (*self.data, self.filler)):
            if not user_path(path).is_file():
                raise ConversionError(f"{path}: no such file; give text, or rows of JSON with a key text, as it is or packed by xz")
        if self.ranking and not user_path(self.ranking).is_file():
            raise ConversionError(f"--ranking {self.ranking}: no such file; give what linattn select-layers wrote")
        for _, run in map(named_model, self.runs):
            if not (user_path(run) / "metrics.jsonl").is_file():
                raise ConversionError(f"--run {run} holds no metrics.jsonl, so it is no folder of a training run; give one that is")
        if self.task_rows and not user_path(self.task_rows).is_dir():
            raise ConversionError(f"--task-rows {self.task_rows}: no such folder; leave it out to have the rows from the hub")
        for _, model in map(named_model, (self.teacher, *self.models)):
            refuse_missing_folder(model)
        names = [row.name for row in self.subjects()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConversionError(f"two models are called {twice}; give them names, as in first={twice}")
        if self.card and not self.students():
            raise ConversionError("--card: no model is a folder that convert or one of its stages wrote; name one, or leave out --card")

    @property
    def hidden_in(self) -> Path:
        """The text that keys are hidden in."""
        return self.filler or self.data[0]

    def inputs(self) -> list[str]:
        """Everything that is read."""
        files = [str(path) for path in (*self.data, self.filler, self.task_rows, self.ranking) if path]
        return [*files, *(path for _, path in map(named_model, (self.teacher, *self.models)))]

    def commands(self, out: str | Path) -> list[str]:
        """The command line that asks for this."""
        words: list[str] = [*self.models, "--teacher", self.teacher]
        for name, values in (("--data", self.data), ("--run", self.runs)):
            words += [word for value in values for word in (name, str(value))]
        for field in fields(self):
            value, name = getattr(self, field.name), field.metadata.get("name") or field.name
            if field.name in ("models", "teacher", "data", "runs") or value == field.default:
                continue
            text = ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [text])]
        return [f"python -m convert.evaluate {shlex.join(words)} --out {shlex.quote(str(out))}"]

    def subjects(self) -> list[Subject]:
        """The rows of every table: the teacher, the controls, the models."""
        name, teacher = named_model(self.teacher)
        teacher = student_folder(teacher)
        controls = [Subject(f"teacher, window {window} + {self.sinks}", teacher, window) for window in self.windows]
        models = [Subject(name or _short(path), student_folder(path)) for name, path in map(named_model, self.models)]
        return [Subject(name or "teacher", teacher), *controls, *models]

    def students(self) -> list[Subject]:
        """The models whose folder the converter or a stage wrote."""
        models = self.subjects()[1 + len(self.windows) :]
        return [subject for subject in models if (user_path(subject.path) / "conversion.json").is_file()]


@dataclass(frozen=True)
class Subject:
    """One row of the tables: what it is called, where its weights are, and the window of a control."""

    name: str
    path: str
    window: int | None = None


def named_model(named: str) -> tuple[str, str]:
    """NAME and MODEL of NAME=MODEL; the name is empty where there is none. Either may hold a = where MODEL is there."""
    if user_path(named).exists():
        return "", named
    name, *rest = named.split("=")
    for cut in range(len(rest)):
        if user_path(path := "=".join(rest[cut:])).exists():
            return "=".join([name, *rest[:cut]]), path
    name, _, path = named.rpartition("=")
    return name, path


def _short(path: str) -> str:
    """The last part of a path that says something: of a training run's OUT/model, OUT."""
    place = user_path(path)
    return place.parent.name if place.name == "model" and place.parent.name else place.name or path
