"""What a recipe of `convert.run` says. Nothing here imports torch."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from convert import evaluate, linearize
from convert.commands import read_keys, without_opposite
from convert.errors import ConversionError
from convert.evaluation.options import EvaluationOptions, require_lm_eval
from convert.options import LinearizeOptions, layer_numbers
from convert.stages.options import CalibrateOptions, DistillOptions, StageOptions, TransferOptions
from recipes.common.config import build
from recipes.common.documents import Source
from recipes.common.reading import read_json, refuse_missing_folder, user_path

RECIPES = Path(__file__).parent / "recipes"
_SHARED = ("student", "output", "teacher", "data", "valid_data")
_TRAINING: dict[str, type[StageOptions]] = {"calibrate": CalibrateOptions, "transfer": TransferOptions, "distill": DistillOptions}
_CONTROLS: dict[str, dict[str, Any]] = {
    "window_only": {"window_drop": 0.0, "train": "attention"},
    "finetuned_teacher": {"window_drop": 0.0, "control": True, "kl_weight": 0.0, "text_weight": 1.0},
}
"""What a recipe may train beside its student, and which options of the stages are then others."""
_TEXT = "text, or rows of JSON with a key text"
_READ_BY_EVALUATE = {"data": _TEXT, "filler": _TEXT, "ranking": "what linattn select-layers wrote"}
_COMMANDS: dict[str, Callable[..., Any]] = {"linearize": linearize.main, "evaluate": evaluate.main}
_GIVEN_OR_NOT = without_opposite(LinearizeOptions) | without_opposite(EvaluationOptions)


@dataclass(frozen=True)
class Student:
    """One of the models that a recipe makes.

    Attributes:
        control: its name among the controls; empty for the student that the recipe is for.
        linearize: options of its conversion; None: it stays softmax.
        stages: those that train it, in their order.
    """

    control: str
    linearize: dict[str, Any] | None
    stages: tuple[str, ...]

    @property
    def is_window_only(self) -> bool:
        """Whether it sees a window alone, and so has no numbers of its own."""
        return self.linearize is not None and self.linearize.get("form") == "window" and self.linearize.get("beside") == "none"


@dataclass
class Recipe:
    """What a recipe says. The options of each stage are those of its command, by the same names with _ for -."""

    source: str
    """The softmax checkpoint: a folder, a GGUF file or a hub id."""
    output: str
    """Folder that gets swapped/, calibrate/, transfer/, distill/ and evaluation/."""
    data: list[str]
    """Text to train on: files, folders of them, or hub ids."""
    valid_data: list[str] = field(default_factory=list)
    """Text to validate on; none: rows of `data` are kept out."""
    linearize: dict[str, Any] = field(default_factory=dict)
    """Options of `linattn convert`, `_` for `-`."""
    training: dict[str, Any] = field(default_factory=dict)
    """Options that `calibrate`, `transfer` and `distill` share, each as far as it has them."""
    calibrate: dict[str, Any] | None = None
    """Options of the stage of this name, over those of `training`; null leaves it out."""
    transfer: dict[str, Any] | None = field(default_factory=dict)
    """Options of the stage of this name, over those of `training`; null leaves it out."""
    distill: dict[str, Any] | None = field(default_factory=dict)
    """Options of the stage of this name, over those of `training`; null leaves it out."""
    evaluate: dict[str, Any] | None = None
    """Options of `linattn evaluate`, among them `data`: files of text that nothing was trained on; null leaves it out."""
    controls: list[str] = field(default_factory=list)
    """Models trained on the same tokens to hold the student against: window_only, a student that sees its window alone; finetuned_teacher,
    the teacher, fine-tuned on the text."""
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    """Measured speed of `transfer` and of `distill`, from which minutes are foretold; 0: not measured, whatever the base file says."""
    measured_on: str = ""
    """Device that `tokens_per_second` was measured on."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data names no text")
        for command, given in (("linearize", self.linearize), ("evaluate", self.evaluate or {})):
            _check_keys(command, given, _parameters(_COMMANDS[command]))
        self._check_linearize()
        read_keys(EvaluationOptions, self.evaluate or {}, "evaluate.{}".format)
        for student in self.students():
            for name in student.stages:
                self.stage(name, "student", student.control)
        if self.evaluate is not None and not self.evaluate.get("data"):
            raise ValueError("evaluate: data must name files of text that nothing was trained on")

    def _check_linearize(self) -> None:
        chosen = str(self.linearize.get("keep_softmax", ""))
        given = {key: value for key, value in self.linearize.items() if key != "keep_softmax" or not chosen.startswith("@")}
        read = read_keys(LinearizeOptions, given, "linearize.{}".format)
        build(LinearizeOptions, read, "linearize", "linearize.{}".format)

    def students(self) -> list[Student]:
        """The student and its controls.

        Raises:
            ValueError: a control that is unknown, or not to be had of this recipe.
        """
        return [self._student("", self.linearize), *map(self._control, dict.fromkeys(self.controls))]

    def _student(self, control: str, linearize: dict[str, Any] | None) -> Student:
        asked = tuple(name for name in _TRAINING if getattr(self, name) is not None)
        student = Student(control, linearize, asked if linearize is not None else ("distill",))
        without = tuple(name for name in student.stages if name != "calibrate")  # a window alone has nothing to calibrate
        return replace(student, stages=without) if student.is_window_only else student

    def _control(self, name: str) -> Student:
        if name not in _CONTROLS:
            raise ValueError(f"controls: {name!r} is unknown; give some of {', '.join(_CONTROLS)}")
        if name == "window_only":
            if self.linearize.get("form") != "window":
                raise ValueError("controls: window_only is of a student with a window; give linearize.form=window, or leave it out")
            names = ("kernel", "decay", "temperature", "features", "input_gate", "feature_map", "output_map")
            of_the_polynomial = dict.fromkeys(names)
            return self._student(name, {**self.linearize, **of_the_polynomial, "beside": "none"})
        if self.distill is None:
            raise ValueError("controls: finetuned_teacher is trained as distill trains, and distill is left out")
        if self.source.endswith(".gguf"):
            raise ValueError("controls: finetuned_teacher trains the source, which cannot be a GGUF file; give a folder or a hub id")
        return self._student(name, None)

    def check_inputs(self) -> None:
        """Refuses, before anything is made, what a stage or the evaluation would refuse when its turn comes.

        Raises:
            RecipeError: a text or the source is nowhere, a package is missing, or rows are longer than the source has positions.
        """
        refuse_missing_folder(self.source)
        for name in (*self.data, *self.valid_data):
            Source(name).check()
        config = user_path(self.source) / "config.json"
        described = read_json(config) if config.is_file() else {}
        self._check_kept(described.get("num_hidden_layers"))
        evaluate = self.evaluate or {}
        for key, wanted in _READ_BY_EVALUATE.items():
            for name in _listed(evaluate.get(key)):
                if not user_path(name).is_file():
                    raise ConversionError(f"evaluate.{key}: {name}: no such file; give {wanted}")
        if (rows := evaluate.get("task_rows")) and not user_path(rows).is_dir():
            raise ConversionError(f"evaluate.task_rows: {rows}: no such folder; leave it out to have the rows from the hub")
        if evaluate.get("tasks") not in (None, "", "none"):
            require_lm_eval("evaluate.tasks", "")
        for package in ("accelerate", "matplotlib"):
            if find_spec(package) is None:
                raise ConversionError(f"the stages need the package {package}: `pip install 'hf_linattn[convert]'`")
        positions = described.get("max_position_embeddings")
        for student in self.students():
            for name in student.stages:
                length = self.stage(name, "student", student.control).length
                if isinstance(positions, int) and length > positions:
                    raise ConversionError(
                        f"{name}: length {length} is more than the {positions} positions of {self.source}; "
                        f"give --set training.length={positions} or less"
                    )

    def _check_kept(self, layers: Any) -> None:
        kept = layer_numbers(str(self.linearize.get("keep_softmax") or ""), "linearize.keep_softmax")
        if isinstance(layers, int) and kept and kept[-1] >= layers:
            raise ConversionError(f"linearize.keep_softmax names layer {kept[-1]}, but {self.source} has layers 0 to {layers - 1}")

    def stage(self, name: str, student: str, control: str = "") -> StageOptions:
        """The options of a stage that trains.

        Raises:
            RecipeError: one is unknown or out of its bounds.
        """
        options = _TRAINING[name]
        known = {one.name for one in fields(options)}
        given = {**{key: value for key, value in self.training.items() if key in known}, **(getattr(self, name) or {})}
        _check_keys("training", self.training, [one.name for one in fields(DistillOptions)])
        for key in _SHARED:
            if key in given:
                raise ConversionError(f"{name}: {key} is set by the recipe itself; take it out")
        given |= {key: value for key, value in _CONTROLS.get(control, {}).items() if key in known}
        shared = {"student": student, "output": str(Path(self.output, control, name)), "teacher": self.source}
        own = getattr(self, name) or {}

        def written(key: str) -> str:
            return f"{'training' if key in self.training and key not in own else name}.{key}"

        return build(options, {**shared, "data": self.data, "valid_data": self.valid_data, **given}, name, written)


def recipe_file(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with this package.

    Raises:
        ConversionError: there is none.
    """
    if user_path(name).is_file():
        return user_path(name)
    own = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if name not in own:
        raise ConversionError(f"{name}: no such file; give a recipe's, or the name of one of ours: {', '.join(own)}")
    return RECIPES / f"{name}.yaml"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def flags(options: dict[str, Any]) -> list[str]:
    """Options as a command line has them."""
    words: list[str] = []
    for key, value in options.items():
        name = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words += [name] if value else [] if name in _GIVEN_OR_NOT else [f"--no-{key.replace('_', '-')}"]
        elif value is not None and value != "":
            words += [f"{name}={item}" for item in _listed(value)]
    return words


def _parameters(command: Callable[..., Any]) -> list[str]:
    left_out = ("source", "output", "models", "teacher", "out", "resume", "overwrite", "debug")
    return [name for name in inspect.signature(command).parameters if name not in left_out]


def _check_keys(where: str, given: dict[str, Any], known: list[str]) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(
                f"{where}: unknown key {key!r}; " + (f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}")
            )
