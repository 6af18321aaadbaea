"""What to evaluate and how: what the command line and a caller from Python both give. Nothing here imports torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from convert.errors import ConversionError
from convert.stages.options import student_folder
from recipes.common.reading import refuse_missing_folder, user_path

RECALL = ("needle", "one-of-four", "key-value", "associative")
TASKS = ("lambada_openai", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "boolq", "sciq")
DTYPES = ("float32", "bfloat16", "float16")
MOST = 2**24


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured, with the command line's names.

    Attributes:
        models: folders, runs of stages, GGUF files or hub ids, or NAME=MODEL.
        teacher: what they are held against.
        data: files of held-out text.
        rows: how many rows of the first of ``lengths`` each file gives; as many tokens in longer rows.
        lengths: tokens a row.
        windows: of the controls: the teacher under a sliding window and ``sinks``, untrained.
        sinks: first tokens that every token sees there.
        recall: kinds of recall, of RECALL.
        distances: tokens between a key and where it is asked for.
        needles: prompts of each kind and distance.
        recall_length: least tokens of such a prompt.
        filler: text that keys are hidden in; None: the first of ``data``.
        ranking: what ``convert.select_layers`` wrote.
        runs: further folders of training runs, or NAME=FOLDER, whose curves are shown.
        tasks: lm-eval tasks, of TASKS.
        task_rows: folder of local rows for them; None: the hub.
        limit: examples a task; None: all.
        decode: lengths at which the cache and the time of a token are measured.
        batch_tokens: tokens a batch; 0: 32,768 on a GPU and 4,096 on a CPU.
        device, dtype: empty: a GPU if there is one, and bfloat16 on it.
        seed: of the prompts.
        card: whether the README.md of every student gets its tables.
    """

    models: tuple[str, ...]
    teacher: str
    data: tuple[Path, ...]
    rows: int = 24
    lengths: tuple[int, ...] = (1024,)
    windows: tuple[int, ...] = ()
    sinks: int = 4
    recall: tuple[str, ...] = RECALL
    distances: tuple[int, ...] = (40, 150, 400, 900, 1900)
    needles: int = 100
    recall_length: int = 1024
    filler: Path | None = None
    ranking: Path | None = None
    runs: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    task_rows: Path | None = None
    limit: int | None = None
    decode: tuple[int, ...] = (512, 2048)
    batch_tokens: int = 0
    device: str = ""
    dtype: str = ""
    seed: int = 0
    card: bool = False

    def __post_init__(self) -> None:
        """Refuses what needs no model to be seen wrong.

        Raises:
            ConversionError: an unknown dtype, a file or folder that is not there, two models of one name.
        """
        if self.dtype not in ("", *DTYPES):
            raise ConversionError(f"--dtype {self.dtype}: expected one of {', '.join(DTYPES)}")
        for path in filter(None, (*self.data, self.filler)):
            if not user_path(path).is_file():
                raise ConversionError(f"{path}: no such file; give text, or rows of JSON with a key text, as it is or packed by xz")
        if self.ranking and not user_path(self.ranking).is_file():
            raise ConversionError(f"--ranking {self.ranking}: no such file; give what convert.select_layers wrote")
        for _, run in map(named_model, self.runs):
            if not (user_path(run) / "metrics.jsonl").is_file():
                raise ConversionError(f"--run {run} holds no metrics.jsonl, so it is no folder of a training run; give one that is")
        if self.task_rows and not user_path(self.task_rows).is_dir():
            raise ConversionError(f"--task-rows {self.task_rows}: no such folder; leave it out to have the rows from the hub")
        for model in (self.teacher, *(path for _, path in map(named_model, self.models))):
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
        for option, values in (("--data", self.data), ("--run", self.runs)):
            words += [word for value in values for word in (option, str(value))]
        names = {"lengths": "length", "windows": "window-control"}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("models", "teacher", "data", "runs") or value == field.default:
                continue
            text = ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
            words += [f"--{names.get(field.name, field.name).replace('_', '-')}", *([] if value is True else [text])]
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
    """NAME and MODEL of NAME=MODEL; the name is empty where there is none."""
    name, _, path = named.rpartition("=") if not user_path(named).exists() else ("", "", named)
    return name, path


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


def _short(path: str) -> str:
    """The last part of a path that says something: of a training run's OUT/model, OUT."""
    place = user_path(path)
    return place.parent.name if place.name == "model" and place.parent.name else place.name or path
