"""The steps of a training run, the same for every recipe and every stage of a conversion: what differs is a subclass's.

Nothing of a step waits for the device: numbers are summed there and read when they are logged. A run that is killed goes on from its last
checkpoint to the same bits, as far as the subclass's batches and its hidden numbers depend on the step alone.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from recipes.common.accelerating import own_part, whole
from recipes.common.compiling import compile_in_place, compile_options, layers
from recipes.common.errors import OptionError
from recipes.common.run import Run


@dataclass(frozen=True)
class Pace:
    """How many optimizer steps a run has, of how many batches each; and every how many of them it logs, validates and saves.

    All three are done after the last step too. `save` is a multiple of `log`, or a resumed run would log other means.
    """

    steps: int
    log: int
    validate: int
    save: int
    accumulate: int = 1


class Loop(ABC):
    """A run's steps. A subclass makes what they need in its __init__ and says what a batch, a loss and a validation are.

    Attributes:
        accelerator, run, pace: given to `begin_with`.
        model, optimizer: as `accelerator.prepare` returned them.
        schedule: of the learning rates, stepped after the optimizer; None where `before_step` sets them.
        step: optimizer steps done.
        seconds: of training so far, over all resumes.
        tokens_per_step: of all processes; 0 where tokens are not what is counted.
        remedy: what a user can do about a loss that is no number; options in braces, as of OptionError.
    """

    accelerator: Accelerator
    run: Run
    pace: Pace
    model: Any
    optimizer: Any
    schedule: Any = None
    step: int = 0
    seconds: float = 0.0
    tokens_per_step: int = 0
    remedy: str = "lower {learning_rate} and start anew"
    counts_validation: bool = False
    """Whether `seconds` holds the time of validations and checkpoints as well."""

    # -- what a subclass says --------------------------------------------------------------------------------------------

    @abstractmethod
    def batches(self, step: int) -> Iterator[Any]:
        """Batches without end from optimizer step `step` on, `pace.accumulate` of them a step."""

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """What a batch gives: "loss", a scalar that is differentiated, and what else is logged as a mean, of any shape."""

    @abstractmethod
    def validate(self) -> None:
        """Measure and log how good the model is after `step` steps."""

    def start(self) -> None:  # noqa: B027 (none of these has to be there)
        """Called before the first step of a run, and not after a resume."""

    def before_step(self) -> None:  # noqa: B027
        """Set what changes from step to step, such as noise."""

    def clip(self) -> Tensor | None:
        """Bound the gradients; the norm that they had, if it is known."""
        return None

    def figures(self, means: dict[str, Any]) -> dict[str, Any]:
        """What else is logged beside `means`."""
        return {}

    def blame(self, means: dict[str, Any]) -> str:
        """Where a loss that is no number comes from, as words that follow "the loss at step N", if that can be told."""
        return ""

    def progress(self) -> dict[str, float]:
        """Numbers that a checkpoint keeps for `restored`."""
        return {}

    def restored(self, progress: dict[str, Any]) -> None:  # noqa: B027
        """Take back what `progress` gave; called before the first step in any case."""

    def over(self) -> bool:
        """Whether the run ends before its last step."""
        return False

    def to_compile(self, model: Any) -> list[nn.Module]:
        """What is compiled of the model, where compiling is asked for."""
        return layers(model)

    def prepare(self, model: Any, optimizer: Any, schedule: Any, batch_size: int, compiled: bool = False) -> None:
        """Hand model, optimizer and schedule to accelerate; `batch_size` is a process's, and `compiled` asks for torch.compile."""
        if (told := compile_options(self.accelerator, compiled)) is not None:
            compile_in_place(self.to_compile(model), told)
        if plugin := getattr(self.accelerator.state, "deepspeed_plugin", None):
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size  # which it would else ask a DataLoader for
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)

    # -- the steps -------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """The steps that are left.

        Raises:
            RecipeError: a loss or a weight is no number; the last checkpoint is from before.
        """
        progress = self.run.restore(self.pace.steps)
        self.step, self.seconds = int(progress["step"]), float(progress.get("seconds", 0.0))
        self.restored(progress)
        if self.step:
            self.accelerator.print(f"going on after step {self.step} of {self.pace.steps}")
        main = self.accelerator.is_main_process
        bar = tqdm(total=self.pace.steps, initial=self.step, disable=not main, dynamic_ncols=True, unit="step", mininterval=0.5)
        with closing(bar):
            if self.step == 0:
                self.start()
            self._began = time.perf_counter()
            self._steps(bar)

    def _steps(self, bar: Any) -> None:
        pace, batches, sums = self.pace, self.batches(self.step), Sums(self.accelerator)
        self.model.train()
        last = self.step >= pace.steps or self.over()
        while not last:
            self.before_step()
            self._one_step(batches, sums)
            self.step += 1
            bar.update()
            last = self.step == pace.steps or self.over()
            if last or self.step % pace.log == 0:
                bar.set_postfix(loss=f"{self._report(sums):.4f}")
            if last or self.step % pace.validate == 0:
                self._aside(self.validate)
                self.model.train()
            if last or self.step % pace.save == 0:
                self._aside(self._save)

    def _one_step(self, batches: Iterator[Any], sums: Sums) -> None:
        accelerator, norm = self.accelerator, None
        for _ in range(self.pace.accumulate):
            batch = next(batches)
            with accelerator.accumulate(self.model):
                losses = self.losses(batch)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    norm = whole(self.clip())
                self.optimizer.step()
                if accelerator.sync_gradients and self.schedule is not None:
                    self.schedule.step()
                self.optimizer.zero_grad()
            sums.add(losses, 1 / self.pace.accumulate)
        # Half-precision gradients overflow now and then, and accelerate leaves such a step out.
        sums.step(self.step + 1, norm, watch_norm=accelerator.mixed_precision != "fp16")

    def _report(self, sums: Sums) -> float:
        """Log the means of the steps since the last report; the mean loss."""
        means, norm, bad = sums.read()
        self.read_clock()
        if bad:
            raise OptionError(self._no_number(f"the {'loss' if bad > 0 else 'gradient'} at step {abs(bad)}{self.blame(means)}"))
        rate = self.optimizer.param_groups[0]["lr"] if self.schedule is None else self.schedule.get_last_lr()[0]
        values = {**means, "learning_rate": rate, **({} if norm is None else {"gradient_norm": norm})}
        if self.tokens_per_step:
            tokens = self.step * self.tokens_per_step
            values |= {"tokens": tokens, "tokens_per_second": round(tokens / max(self.seconds, 1e-9), 1)}
        values |= {"seconds": round(self.seconds, 3), **self.figures(means)}
        if self.accelerator.device.type == "cuda":
            values["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.run.log(self.step, **values)
        self.accelerator.log({key: value for key, value in values.items() if not isinstance(value, list)}, step=self.step)
        return float(means["loss"])

    def _save(self) -> None:
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        bad = torch.stack([~torch.isfinite(own_part(weight.detach())).all() for weight in trained.values()]).int()
        if wrong := [name for name, is_bad in zip(trained, self.accelerator.reduce(bad, "sum").tolist(), strict=True) if is_bad]:
            raise OptionError(self._no_number(f"the weight {wrong[0]} after step {self.step}"))
        self.run.save(self.step, {"seconds": self.seconds, **self.progress()})

    def _no_number(self, what: str) -> str:
        kept = self.run.checkpoints()[-1:]
        rest = f"; the checkpoint {kept[0].name} from before is kept" if kept else ""
        return f"{self.run.folder}: {what} is no finite number; {self.remedy}{rest}"

    def _aside(self, work: Callable[[], None]) -> None:
        """Do what is no training, with the clock stopped unless `counts_validation`."""
        if not self.counts_validation:
            self.read_clock()
        work()
        if not self.counts_validation:
            self._began = time.perf_counter()

    def read_clock(self) -> None:
        """Add the time since the last reading to `seconds`; the first process's clock is everybody's."""
        now = time.perf_counter()
        passed, self._began = now - self._began, now
        if self.accelerator.num_processes > 1:
            reading = torch.tensor(passed if self.accelerator.is_main_process else 0.0, device=self.accelerator.device)
            passed = float(self.accelerator.reduce(reading, "sum"))
        self.seconds += passed


class Sums:
    """Sums of what batches gave since the last reading, on the device."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._clear()
        self.bad = torch.zeros((), dtype=torch.int64, device=accelerator.device)

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.norm: Tensor | None = None

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        """Add a batch's numbers, times `weight`."""
        for name, value in losses.items():
            number = value.detach().float() * weight
            self.sums[name] = self.sums[name] + number if name in self.sums else number

    def step(self, number: int, norm: Tensor | None, watch_norm: bool) -> None:
        """Count a step. The first whose loss is no number is kept, or, below 0, whose gradient is none."""
        self.steps += 1
        self.norm = norm
        wrong = torch.where(torch.isfinite(self.sums["loss"]), 0, number)
        if norm is not None and watch_norm:
            wrong = torch.where((wrong == 0) & ~torch.isfinite(norm.detach()).to(wrong.device), -number, wrong)
        self.bad = torch.where(self.bad == 0, wrong, self.bad)

    def read(self) -> tuple[dict[str, Any], float | None, int]:
        """The means a step over all processes, a number or a list each; the last norm; the first bad step as in `step`, or 0."""
        flat = torch.cat([value.flatten() for value in self.sums.values()]) / self.steps
        numbers = self.accelerator.reduce(flat, "mean").tolist()
        bad = [int(step) for step in self.accelerator.gather(self.bad.reshape(1)).tolist() if step]
        means: dict[str, Any] = {}
        for name, value in self.sums.items():
            head, numbers = numbers[: value.numel()], numbers[value.numel() :]
            means[name] = head if value.dim() else head[0]
        norm = None if self.norm is None else float(self.norm)
        self._clear()
        return means, norm, min(bad, key=abs, default=0)
