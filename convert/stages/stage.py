"""What the training stages share: opening student, teacher and text, the optimizer, and the run's end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup

import hf_linattn
from convert.errors import ConversionError, OptionError, stage
from convert.gguf import unpacked
from convert.stages.options import StageOptions
from convert.stages.result import Trained, write_result
from hf_linattn.config import PREFIX
from recipes.common.accelerating import new_accelerator
from recipes.common.checkpoint import locate
from recipes.common.config import to_dict
from recipes.common.documents import read_all
from recipes.common.loading import load_causal_lm
from recipes.common.loop import Loop, Pace
from recipes.common.plots import plot_curves
from recipes.common.run import Run
from recipes.common.state import check_written
from recipes.common.tokenizing import load_tokenizer
from recipes.common.tokens import Tokens, chat_template, tokenized
from recipes.common.windows import Windows, on_device, own_batches, training_order

_DROPPING = 0.7
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stage(Loop):
    """A stage's run: everything is made in __init__, so that bad input is refused before anything is written but the run's folder.

    A subclass gives `trained` and `objective`, and says what is logged.

    Attributes:
        student: float32, the part that learns on.
        teacher: in the precision that is computed in; it learns nothing.
        train_rows, valid_rows: the text.
    """

    remedy = "lower {learning_rate} or {head_learning_rate} and start anew"
    _dropped = -1.0

    def __init__(self, options: StageOptions, command: str, resume: bool, overwrite: bool) -> None:
        self.options = o = options
        self.accelerator = new_accelerator(
            gradient_accumulation_steps=o.gradient_accumulation,
            mixed_precision=o.mixed_precision or None,
            step_scheduler_with_optimizer=False,  # stepped once an optimizer step, however many processes share the batch
        )
        self.run = Run(o.output, command, self.accelerator, inputs=o.reads(), resume=resume, overwrite=overwrite)
        self.run.check()
        set_seed(o.seed)
        transformers.utils.logging.disable_progress_bar()
        self.folder, _ = locate(o.student)
        self.student: Any = load_causal_lm(o.student)
        self._check_student()
        with unpacked(o.teacher, str(self.low_precision).removeprefix("torch.")) as teacher:
            self.teacher = self._open_teacher(teacher)
        self.tokenizer = load_tokenizer(o.student)
        tokens, valid = self._tokens()
        self._cut(tokens, valid)
        processes = self.accelerator.num_processes
        self.rows_per_step = o.batch_size * o.gradient_accumulation * processes
        if len(self.train_rows) < self.rows_per_step:
            raise OptionError(
                f"the text is {len(self.train_rows)} rows of {o.length} tokens to train on and one step takes {self.rows_per_step}; "
                "give more text, or lower {batch_size}, {gradient_accumulation} or {length}"
            )
        self.tokens_per_step = self.rows_per_step * o.length
        steps = max(1, round(o.tokens / self.tokens_per_step))
        self.pace = Pace(steps, o.log_every, o.validate_every, o.save_every, o.gradient_accumulation)
        model = self.trained()
        groups = hf_linattn.parameter_groups(model, o.learning_rate, o.head_learning_rate)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=self.accelerator.device.type == "cuda")
        schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, round(o.warmup * steps), steps, min_lr_rate=o.final_rate)
        self.prepare(model, optimizer, schedule, o.batch_size, self.compiled)
        learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.accelerator.print(self.ahead(learning))
        self.run.open(to_dict(o), {"rows": len(self.train_rows), "text": tokens.digest, "learning": learning})

    # -- what a subclass says --------------------------------------------------------------------------------------------

    def trained(self) -> nn.Module:
        """What is handed to accelerate: a module around the student, of which what shall learn requires gradients."""
        raise NotImplementedError

    def measured(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a validation batch gives, a row each: (B, ...)."""
        raise NotImplementedError

    def told(self, means: dict[str, Any]) -> dict[str, Any]:
        """A validation's means as the log has them."""
        return {f"valid_{name}": value for name, value in means.items()}

    def ahead(self, learning: int) -> str:
        """A line before it begins, of a run in which so many numbers learn."""
        steps, tokens, rows = self.pace.steps, self.tokens_per_step, len(self.train_rows)
        return f"{steps:,} steps of {tokens:,} tokens, {rows:,} rows, {learning:,} numbers learn"

    def draw(self, records: Sequence[dict[str, Any]]) -> None:
        """Draw the run's pictures."""

    def finished_student(self) -> tuple[Any, dict[str, Tensor]]:
        """The student and its weights, as they are saved."""
        return self.student, self.accelerator.get_state_dict(self.model)

    @property
    def compiled(self) -> bool:
        """Whether compiling is asked for."""
        return False

    @property
    def is_control(self) -> bool:
        """Whether what learns is the teacher itself, not converted."""
        return False

    # -- the run ---------------------------------------------------------------------------------------------------------

    def run_all(self) -> None:
        """Train from where the run stands to its end and write model/; then let go of the folder."""
        with closing(self.run):
            if (model := self.run.folder / "model").exists():
                check_written(model, "remove that folder to have it written again with --resume", compare=False)
                self.accelerator.print(f"{self.run.folder} is finished; its model is in {model}")
                return
            self.train()
            self._write(model)
            self.accelerator.print(f"written to {model}")

    def start(self) -> None:
        """Measure what training starts from."""
        self.validate()

    def batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """This process's rows of each batch."""
        yield from self.share(self.train_rows, self.options.batch_size, step)

    def share(self, windows: Windows, batch_size: int, step: int, begin: int = 0) -> Iterator[dict[str, Tensor]]:
        """This process's rows of each batch of `batch_size` rows a process, from step `step` on; the order begins at step `begin`."""
        accelerator = self.accelerator
        parts = self.options.gradient_accumulation * accelerator.num_processes
        for number, rows in enumerate(training_order(len(windows), batch_size * parts, self.options.seed, step - begin), step):
            for part in range(accelerator.process_index, parts, accelerator.num_processes):
                own = windows.rows(rows[part * batch_size : (part + 1) * batch_size])
                own = self.changed(own, number * parts + part)
                yield on_device(own, accelerator.device, windows.tokens.start if windows.separate else None)

    def changed(self, rows: np.ndarray, number: int) -> np.ndarray:
        """Rows (B, N) of batch `number` of the run as they are trained on."""
        return rows

    def before_step(self) -> None:
        """Lower the probability with which windows are dropped."""
        chance = self.window_drop(self.step)
        if self.options.window_drop and chance != self._dropped:
            hf_linattn.set_window_drop(self.student, chance)
            self._dropped = chance

    def window_drop(self, step: int) -> float:
        """From the option's value at the first step in a line to 0, after which windows are whole for the last three tenths of the run."""
        return self.options.window_drop * max(0.0, 1 - step / (_DROPPING * self.pace.steps))

    def figures(self, means: dict[str, Any]) -> dict[str, Any]:
        """How often windows were dropped in the step that is reported."""
        return {"window_drop": self.window_drop(self.step - 1)} if self.options.window_drop else {}

    def clip(self) -> Tensor | None:
        """Bound the gradient's norm."""
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return self.accelerator.clip_grad_norm_(learning, self.options.clip)

    def validate(self) -> None:
        """Log how near the student is on rows that it does not learn from; draw the pictures."""
        accelerator, count = self.accelerator, len(self.valid_rows)
        sums: dict[str, Tensor] = {}
        self.model.eval()
        with torch.no_grad():
            batches = own_batches(count, self.options.batch_size, accelerator.process_index, accelerator.num_processes)
            for rows, counted in batches:
                for name, value in self.measured(self.valid_rows.batch(rows, accelerator.device)).items():
                    part = value[:counted].float().sum(0)
                    sums[name] = sums[name] + part if name in sums else part
        means = {name: (accelerator.reduce(value, "sum") / count).tolist() for name, value in sums.items()}
        self.run.log(self.step, **self.told(means), seconds=round(self.seconds, 3))
        if accelerator.is_main_process:
            self.draw(self.run.records())
        accelerator.wait_for_everyone()

    @property
    def low_precision(self) -> torch.dtype:
        """What is computed in where it may be less than float32."""
        return _DTYPES.get(self.accelerator.mixed_precision, torch.float32)

    def _check_student(self) -> None:
        o, model_type = self.options, self.student.config.model_type
        is_converted = model_type.startswith(PREFIX)
        if self.is_control and is_converted:
            raise ConversionError(f"{o.student} is converted, and a control is not: give the teacher itself, or leave out --control")
        if not is_converted and not self.is_control:
            raise ConversionError(f"{o.student} is not converted (model_type {model_type}): give what linattn convert wrote")
        _check_length(o.student, self.student, o.length)
        if o.window_drop:
            try:
                hf_linattn.set_window_drop(self.student, 0.0)
            except ValueError as error:
                raise ConversionError(f"--window-drop: {error}") from None
        # A cache would be built in every step, and documents packed together would then see one another.
        self.student.config.use_cache = False
        if o.gradient_checkpointing:
            self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _open_teacher(self, folder: str) -> Any:
        o = self.options
        teacher: Any = load_causal_lm(folder, dtype=self.low_precision)
        sizes = [model.get_output_embeddings().weight.shape[0] for model in (self.student, teacher)]
        if sizes[0] != sizes[1]:
            raise ConversionError(
                f"{o.student} has {sizes[0]:,} tokens and the teacher {sizes[1]:,}: give the teacher it was converted from"
            )
        if load_tokenizer(folder).get_vocab() != load_tokenizer(o.student).get_vocab():
            raise ConversionError(f"the tokenizer of {o.student} is not the teacher's: give the teacher it was converted from")
        _check_length(o.teacher, teacher, o.length)
        teacher.config.use_cache = False
        with stage(f"moving the teacher to {self.accelerator.device}", "give a smaller teacher, or a device with more memory"):
            return teacher.to(self.accelerator.device).eval().requires_grad_(False)

    def _tokens(self) -> tuple[Tokens, Tokens | None]:
        """The text to train on, and that to validate on if it is another."""
        with self.accelerator.main_process_first():
            valid = self.options.valid_data
            return self._read(self.options.data, "text"), self._read(valid, "validation text") if valid else None

    def _read(self, names: list[str], what: str) -> Tokens:
        sources, render = self.options.sources(names), chat_template(self.tokenizer)
        key = ["documents", [source.stamp() for source in sources], self.tokenizer.chat_template]
        return tokenized(lambda: read_all(sources, render), key, self.tokenizer, what)

    def _cut(self, tokens: Tokens, valid: Tokens | None) -> None:
        o = self.options
        whole = Windows(tokens, o.length, o.separate)
        if valid is not None:
            self.valid_rows = Windows(valid, o.length, o.separate)
            self.valid_rows.chosen = self.valid_rows.chosen[: o.valid_rows]
            self.train_rows = whole
            return
        if len(whole) < 2:
            raise ConversionError(f"the text is one row of {o.length} tokens, and one is kept out; give more text, or --valid-data")
        kept = spread(len(whole), min(o.valid_rows, max(1, len(whole) // 10)))
        self.valid_rows = Windows(tokens, o.length, o.separate, kept)
        self.train_rows = Windows(tokens, o.length, o.separate, np.setdiff1d(whole.chosen, kept))

    def _write(self, folder: Path) -> None:
        student, weights = self.finished_student()
        records = self.run.records()
        validations = [record for record in records if any(key.startswith("valid_") for key in record)]
        seconds = round(self.seconds)
        trained = Trained(self.run.command, to_dict(self.options), self.pace.steps, self.pace.steps * self.tokens_per_step, seconds)
        if self.accelerator.is_main_process:
            dtype = getattr(torch, self.options.dtype)
            write_result(folder, self.run.command, self.folder, student, weights, dtype, trained, validations)
        self.accelerator.wait_for_everyone()


def spread(count: int, chosen: int) -> np.ndarray:
    """`chosen` of the numbers below `count`, evenly spread, in order."""
    return (np.arange(chosen) * count + count // 2) // chosen


def draw_curves(run: Run, name: str, curves: dict[str, str], what: str) -> None:
    """Draw keys of the run's records, by their titles, against steps into a picture of the run."""
    records = run.records()
    points = {title: [(record["step"], record[key]) for record in records if record.get(key) is not None] for key, title in curves.items()}
    plot_curves(run.folder / name, points, x="step", y=what, title=run.folder.name)


def _check_length(name: str, model: Any, length: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConversionError(f"length {length} is more than the {positions} positions of {name}; give --length {positions} or less")
