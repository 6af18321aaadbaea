"""The training itself: what `recipes.lra.train` runs once its arguments are right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed
from transformers import PreTrainedModel

import hf_linattn
from recipes.common.accelerating import new_accelerator
from recipes.common.checkpoint import check_size
from recipes.common.compiling import compile_options
from recipes.common.config import to_dict
from recipes.common.errors import RecipeError, sentence, stage
from recipes.common.files import staged_directory, write_json
from recipes.common.loop import Loop, Pace
from recipes.common.run import Run
from recipes.common.state import check_written

from .accuracy import accuracy
from .batches import DeviceSplit, drawn_positions, evaluation_order, training_order
from .data import SPLITS, TASKS, Split
from .model import LRAConfig, LRAForSequenceClassification
from .report import read_result
from .settings import COMMAND, Settings

STEPS_BETWEEN_CLOCK_READINGS = 20


class Training(Loop):
    """One seed's run: everything is made in __init__, so that bad input is refused before anything is written but the run's folder."""

    counts_validation = True

    def __init__(
        self,
        settings: Settings,
        seed: int,
        splits: dict[str, Split],
        resume: bool = False,
        overwrite: bool = False,
        inputs: Sequence[str | Path] = (),
    ) -> None:
        self.settings, self.seed, self.task = settings, seed, TASKS[settings.task]
        self.accelerator = new_accelerator(mixed_precision=settings.mixed_precision, step_scheduler_with_optimizer=False)
        processes = self.accelerator.num_processes
        if settings.batch_size % processes:
            raise RecipeError(f"batch_size {settings.batch_size} is not a multiple of the {processes} processes; change one of them")
        read = [*inputs, settings.data]
        self.run = Run(settings.folder(seed), COMMAND, self.accelerator, inputs=read, resume=resume, overwrite=overwrite)
        self.run.check()
        set_seed(seed)
        model = new_model(settings)
        self.splits = {
            name: DeviceSplit.of(self.task, splits[name], self.accelerator.device, settings.blank_is_padding, settings.pad_multiple)
            for name in SPLITS
        }
        if len(splits["train"]) < settings.batch_size:
            raise RecipeError(f"{settings.data}: {len(splits['train'])} training examples do not fill a batch of {settings.batch_size}")
        optimizer = torch.optim.AdamW(
            parameter_groups(model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=(0.9, settings.beta2),
            eps=1e-6,
            fused=self.accelerator.device.type == "cuda",
        )
        told = compile_options(self.accelerator)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.bare: PreTrainedModel = self.accelerator.unwrap_model(self.model)
        self.call: Any = self.model
        if settings.compile != "none":
            varied = not self.task.side
            told = {"mode": settings.compile, "dynamic": True if varied else None}
        if told is not None:
            self.call = torch.compile(self.model, **told)
        self.noise = None
        if settings.dropout == "noise":
            self.noise = hf_linattn.DropoutSchedule(settings.noise_schedule, settings.attention_dropout, 1_000_000)
        facts = {"seed": seed, "parameters": self.bare.num_parameters()}
        facts |= {name: [len(splits[name]), splits[name].digest()] for name in SPLITS}
        self.run.open(to_dict(settings), facts)
        self.best, self.best_step = -1.0, 0
        self.pace = Pace(settings.steps, settings.log_every, settings.eval_every, settings.save_every)

    def run_all(self) -> dict[str, Any]:
        """Train from where the run stands to its end, test the best checkpoint, let go of the folder; return what result.json says."""
        finished = self.run.folder / "result.json"
        with closing(self.run):
            if finished.is_file():
                self.accelerator.print(f"{self.run.folder} is finished")
                return read_result(finished)
            self.train()
            return self.finish()

    def restored(self, progress: dict[str, Any]) -> None:
        """Take back the best score and its step."""
        self.best, self.best_step = float(progress.get("best", -1.0)), int(progress.get("best_step", 0))

    def progress(self) -> dict[str, float]:
        """The best score and its step."""
        return {"best": self.best, "best_step": self.best_step}

    def batches(self, step: int) -> Iterator[dict[str, torch.Tensor | None]]:
        """This process's share of each batch."""
        s, accelerator = self.settings, self.accelerator
        share = s.batch_size // accelerator.num_processes
        own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        for number, indices in enumerate(training_order(self.splits["train"].lengths, s.batch_size, self.seed, start=step), step):
            turned = drawn_positions(s.batch_size, self.seed, number)[own] if s.turn_pictures else None
            yield self.splits["train"].batch(indices[own], turned)

    def losses(self, batch: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """The mean cross-entropy of the examples."""
        with self.accelerator.autocast():
            return {"loss": self.call(**batch).loss}

    def clip(self) -> None:
        """Bound each number of the gradient."""
        self.accelerator.clip_grad_value_(self.model.parameters(), self.settings.gradient_clip)

    def before_step(self) -> None:
        """Set rates and noise, by steps and by the clock."""
        if self.step % STEPS_BETWEEN_CLOCK_READINGS == 0:
            self.read_clock()
        self.set_rates(self.step)

    def over(self) -> bool:
        """Whether the minutes are used up."""
        return self.settings.max_minutes is not None and self.seconds >= self.settings.max_minutes * 60

    def done(self, step: int) -> float:
        """The share of the run after warm-up that is over, by steps or by the clock, whichever is more."""
        s = self.settings
        share = max(step - s.warmup_steps, 0) / max(s.steps - s.warmup_steps, 1)
        return min(max(share, 0.0 if s.max_minutes is None else self.seconds / (s.max_minutes * 60)), 1.0)

    def set_rates(self, step: int) -> None:
        """Learning rate and noise of the next step."""
        s, done = self.settings, self.done(step)
        warm = min((step + 1) / s.warmup_steps, 1.0) if s.warmup_steps else 1.0
        down = {
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "constant": 1.0,
            "inverse_sqrt": (max(step, s.warmup_steps, 1) / max(s.warmup_steps, 1)) ** -0.5,
        }[s.schedule]
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate * warm * down
        if self.noise is not None:
            hf_linattn.set_dropout(self.bare, self.noise(round(done * 1_000_000)))

    def validate(self) -> None:
        """Log the validation accuracy and keep the weights in best/ if it is the best so far; the later one of equals."""
        score, loss = self.evaluate("valid", self.settings.validation_examples)
        self.run.log(self.step, valid_accuracy=score, valid_loss=loss, seconds=round(self.seconds, 2))
        if score >= self.best:
            self.best, self.best_step = score, self.step
            if self.accelerator.is_main_process:
                folder = self.run.folder / "best"
                with (
                    stage(f"writing {folder}", "free some space and start with --resume"),
                    staged_directory(folder, COMMAND, overwrite=True) as aside,
                ):
                    self.bare.save_pretrained(aside)
            self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def evaluate(self, name: str, count: int | None = None) -> tuple[float, float]:
        """Accuracy and mean loss on a split, or on its first `count` examples."""
        split, accelerator = self.splits[name], self.accelerator
        lengths = split.lengths[:count]
        guesses = torch.zeros(len(lengths), dtype=torch.int64, device=accelerator.device)
        total = torch.zeros((), device=accelerator.device)
        self.bare.eval()
        for number, indices in enumerate(evaluation_order(lengths, self.settings.eval_batch_size)):
            if number % accelerator.num_processes != accelerator.process_index:
                continue
            batch = split.batch(indices)
            with accelerator.autocast():
                output = self.model(**batch)  # not the compiled form: evaluation would be compiled for itself
            guesses[torch.from_numpy(indices).to(guesses.device)] = output.logits.argmax(-1)
            total += output.loss * len(indices)
        self.bare.train()
        guesses, total = accelerator.reduce(guesses, "sum"), accelerator.reduce(total, "sum")
        return accuracy(guesses.cpu().numpy(), split.split.labels[:count]), float(total) / len(lengths)

    def finish(self) -> dict[str, Any]:
        """Test best/ and write result.json."""
        s, accelerator = self.settings, self.accelerator
        check_written(self.run.folder / "best", "start anew, for the weights of the best validation are lost")
        best = LRAForSequenceClassification.from_pretrained(self.run.folder / "best", trust_remote_code=False, use_safetensors=True)
        self.bare.load_state_dict(best.state_dict())
        score, loss = self.evaluate("test")
        device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
        result = {
            "task": s.task,
            "attn_implementation": s.attn_implementation,
            "linattn": s.linattn,
            "dropout": s.dropout,
            "attention_dropout": s.attention_dropout if s.dropout != "none" else 0.0,
            "seed": self.seed,
            "test_accuracy": score,
            "test_loss": loss,
            "valid_accuracy": self.best,
            "best_step": self.best_step,
            "steps": self.step,
            "batch_size": s.batch_size,
            "seconds": round(self.seconds, 1),
            "parameters": self.bare.num_parameters(),
            "examples": {name: len(split) for name, split in self.splits.items()},
            "settings": to_dict(s),
            "device": device,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        if accelerator.is_main_process:
            write_json(self.run.folder / "result.json", result)
        accelerator.wait_for_everyone()
        accelerator.print(f"{s.task}, seed {self.seed}: test accuracy {score:.2%} (validation {self.best:.2%} at step {self.best_step})")
        return result


def new_model(settings: Settings) -> LRAForSequenceClassification:
    """The encoder of a run with fresh weights. Raises RecipeError where a size or an option of linattn is not allowed."""
    task = TASKS[settings.task]
    sizes: dict[str, Any] = {
        "vocab_size": task.vocabulary + 1,
        "max_position_embeddings": task.length,
        "num_labels": task.classes,
        "towers": task.towers,
        "hidden_dropout": settings.hidden_dropout,
        "attention_dropout": settings.attention_dropout if settings.dropout == "standard" else 0.0,
    }
    known = set(LRAConfig().to_dict())
    unknown = [key for key in settings.model if key not in known]
    if unknown or set(settings.model) & set(sizes):
        wrong = (unknown or sorted(set(settings.model) & set(sizes)))[0]
        raise RecipeError(
            f"model: {wrong!r} is unknown or set by the task; it takes hidden_size, num_hidden_layers, pooling, norm and the like"
        )
    try:
        config = LRAConfig(**sizes, **settings.model)
        if settings.attn_implementation == "linattn":
            config.linattn = settings.linattn
            hf_linattn.LinAttnConfig.of(config)
        elif settings.linattn:
            raise ValueError("options of linattn are given with softmax attention")

        def build() -> LRAForSequenceClassification:
            return LRAForSequenceClassification._from_config(config, attn_implementation=settings.attn_implementation)

        check_size(config.num_hidden_layers, build, "model")
        return build()
    except (ValueError, TypeError) as error:
        raise RecipeError(f"the model cannot be made: {sentence(error)}") from None


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
