"""The training itself: what `recipes.tinystories.train` runs once its arguments are right."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

import hf_linattn
from recipes.common.config import to_dict
from recipes.common.errors import RecipeError, stage
from recipes.common.files import output_path, staged_directory
from recipes.common.plots import plot_curves
from recipes.common.run import Run
from recipes.common.state import check_written
from recipes.common.tokenizing import load_tokenizer, start_token
from recipes.tinystories.data import Collator, EpochSampler, Source, digest, first_words, pack, split_stories
from recipes.tinystories.model import check_length, go_on, is_linear, load_model, new_model
from recipes.tinystories.settings import COMMAND, Settings


class Training:
    """One run: everything is made in __init__, so that bad input is refused before anything is written but the run's folder."""

    def __init__(self, settings: Settings, resume: bool, overwrite: bool, inputs: Sequence[str | Path] = ()) -> None:
        self.settings = s = settings
        self.accelerator = Accelerator(
            gradient_accumulation_steps=s.gradient_accumulation,
            mixed_precision=s.mixed_precision,
            log_with="tensorboard",
            project_dir=output_path(s.output),
            # The schedule is stepped once an optimizer step, however many processes share the batch.
            step_scheduler_with_optimizer=False,
        )
        read = [*inputs, *s.reads()]
        self.run = Run(s.output, COMMAND, self.accelerator, inputs=read, resume=resume, overwrite=overwrite)
        self.run.check()
        set_seed(s.seed)
        tokenizer = load_tokenizer(s.tokenizer or str(s.model))
        model = self._model(tokenizer)
        self.teacher = self._teacher(model)
        with self.accelerator.main_process_first():
            train_text, valid_text = split_stories(
                [Source(name, s.train_split, s.text_column, s.separator) for name in s.train_data],
                [Source(name, s.valid_split, s.text_column, s.separator) for name in s.valid_data],
                s.valid_stories,
            )
            train, valid = pack(train_text, tokenizer, s.length), pack(valid_text, tokenizer, s.length)
        valid = valid.select(range(min(len(valid), s.eval_sequences)))
        self.tokenizer = tokenizer
        self.prompts = first_words(valid_text[: s.samples]["text"], s.samples, 8) if s.samples else []

        taken = s.batch_size * s.gradient_accumulation * self.accelerator.num_processes
        self.steps_per_epoch = len(train) // taken
        if not self.steps_per_epoch:
            raise RecipeError(
                f"the text packs to {len(train)} sequences of {s.length} tokens and one step takes {taken}; "
                "give more text or lower batch_size, gradient_accumulation or length"
            )
        self.steps = s.steps or max(1, round(s.epochs * self.steps_per_epoch))
        self.tokens_per_step = taken * s.length
        self.sampler = EpochSampler(len(train), self.steps_per_epoch * taken, s.seed)
        self.noise = hf_linattn.DropoutSchedule(s.noise_schedule, s.noise, self.steps) if s.noise else None

        groups = hf_linattn.parameter_groups(model, s.learning_rate, s.linattn_learning_rate, s.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, s.beta2))
        schedule = get_cosine_schedule_with_warmup(optimizer, round(s.warmup * self.steps), self.steps)
        collate = Collator(start_token(tokenizer), s.separate_stories)
        # A generator of their own keeps the loaders from drawing on the random numbers that dropout uses, which a resume must repeat.
        loader = DataLoader(train, s.batch_size, sampler=self.sampler, collate_fn=collate, generator=torch.Generator())
        valid_loader = DataLoader(valid, s.batch_size, collate_fn=collate, generator=torch.Generator())  # type: ignore[arg-type]
        self.model, self.optimizer, self.loader, self.valid_loader, self.schedule = self.accelerator.prepare(
            model, optimizer, loader, valid_loader, schedule
        )
        self.run.open(to_dict(s), {"sequences": len(train), "text": digest(train), "parameters": model.num_parameters()})

    def run_all(self) -> None:
        """Train from where the run stands to its end and write model/; then let go of the folder."""
        with closing(self.run):
            self.train()

    def train(self) -> None:
        """The steps that are left."""
        s, accelerator = self.settings, self.accelerator
        if (model := self.run.folder / "model").exists():
            check_written(model, "remove that folder to have it written again with --resume", compare=False)
            accelerator.print(f"{self.run.folder} is finished; its model is in {model}")
            return
        progress = self.run.restore(self.steps)
        step, seconds = int(progress["step"]), float(progress.get("seconds", 0.0))
        if step:
            accelerator.print(f"going on after step {step} of {self.steps}")
        accelerator.init_trackers("tensorboard")
        bar = tqdm(total=self.steps, initial=step, disable=not accelerator.is_main_process, dynamic_ncols=True, unit="step")
        if step == 0:
            self.evaluate(0, seconds)
        sums = torch.zeros(2, device=accelerator.device)
        began = time.perf_counter()
        for losses, norm in self.optimizer_steps(step):
            step += 1
            sums += losses
            last = step == self.steps
            bar.update()
            if step % s.log_every == 0 or last:
                loss, entropy = (accelerator.reduce(sums, "mean") / ((step - 1) % s.log_every + 1)).tolist()
                if not math.isfinite(loss):
                    raise RecipeError(f"the loss at step {step} is {loss}; lower learning_rate or linattn_learning_rate and start anew")
                sums.zero_()
                now = time.perf_counter()
                seconds, began = seconds + now - began, now
                self.report(step, seconds, loss, entropy, float(norm))
                bar.set_postfix(loss=f"{loss:.4f}")
            if step % s.eval_every == 0 or last:
                self.evaluate(step, seconds)
            if step % s.checkpoint_every == 0 or last:
                self.run.save(step, {"seconds": seconds})
            if step % s.log_every == 0:
                began = time.perf_counter()
        bar.close()
        self.save_model()
        accelerator.end_training()

    def optimizer_steps(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One item for each optimizer step after `step`: this process's mean (loss, cross-entropy) and the gradient's norm."""
        s, accelerator = self.settings, self.accelerator
        while step < self.steps:
            epoch, within = divmod(step, self.steps_per_epoch)
            self.sampler.begin_at(epoch, within * s.batch_size * s.gradient_accumulation * accelerator.num_processes)
            self.model.train()
            total = torch.zeros(2, device=accelerator.device)
            norm = torch.zeros(())
            for batch in self.loader:
                if self.noise is not None:
                    hf_linattn.set_dropout(accelerator.unwrap_model(self.model), self.noise(step))
                with accelerator.accumulate(self.model):
                    loss, entropy = self.objective(batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(self.model.parameters(), s.clip)
                    self.optimizer.step()
                    if accelerator.sync_gradients:
                        self.schedule.step()
                    self.optimizer.zero_grad()
                total += torch.stack([loss.detach(), entropy.detach()]).float() / s.gradient_accumulation
                if accelerator.sync_gradients:
                    step += 1
                    yield total, norm
                    total = torch.zeros_like(total)
                    self.model.train()
                    if step == self.steps:
                        return

    def objective(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the text's cross-entropy in nats a token, of input_ids (B, N)."""
        logits = self.model(**batch).logits[:, :-1].float()
        entropy = F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        if self.teacher is None:
            return entropy, entropy
        with torch.no_grad(), self.accelerator.autocast():
            target = self.teacher(**batch).logits[:, :-1, : logits.shape[-1]].float().log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="none").sum(-1).mean()
        weight = self.settings.teacher_weight
        return weight * divergence + (1 - weight) * entropy, entropy

    def report(self, step: int, seconds: float, loss: float, entropy: float, norm: float) -> None:
        """Log the training loss of the steps since the last report."""
        values = {
            "loss": loss,
            "cross_entropy": entropy,
            "learning_rate": self.schedule.get_last_lr()[0],
            "gradient_norm": norm,
            "tokens": step * self.tokens_per_step,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(step * self.tokens_per_step / seconds, 1),
        }
        if self.noise is not None:
            values["noise"] = float(self.noise(step - 1))
        if self.accelerator.device.type == "cuda":
            values["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.run.log(step, **values)
        self.accelerator.log(values, step=step)

    def evaluate(self, step: int, seconds: float) -> None:
        """Log the cross-entropy of the validation sequences, in nats a token, and stories gone on with; draw the curve."""
        losses = []
        self.model.eval()
        with torch.no_grad():
            for batch in self.valid_loader:
                logits = self.model(**batch).logits[:, :-1].float()
                nats = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)
                losses.append(self.accelerator.gather_for_metrics(nats))
            loss = torch.cat(losses).mean().item()
            samples = self.sample()
        self.run.log(step, valid_loss=loss, seconds=round(seconds, 3), **({"samples": samples} if samples else {}))
        texts = {"samples": "\n\n".join(f"**{x['prompt']}** {x['text']}" for x in samples)} if samples else {}
        self.accelerator.log({"valid_loss": loss, **texts}, step=step)
        if self.accelerator.is_main_process:
            draw(self.run)
        self.accelerator.wait_for_everyone()

    def sample(self) -> list[dict[str, str]]:
        """The model's own continuations of the validation prompts; none where its weights are spread over processes."""
        if not self.accelerator.is_main_process or self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return []
        model = self.accelerator.unwrap_model(self.model)
        return [
            {"prompt": prompt, "text": go_on(model, self.tokenizer, prompt, self.settings.sample_tokens)}
            for prompt in self.prompts
            if self.settings.sample_tokens
        ]

    def save_model(self) -> None:
        """Write model/: weights and tokenizer, whole or not at all."""
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            model.config.use_cache = True
            folder = self.run.folder / "model"
            with stage(f"writing {folder}", "free some space and start with --resume"), staged_directory(folder, COMMAND) as place:
                model.save_pretrained(place, state_dict=state)
                self.tokenizer.save_pretrained(place)
        self.accelerator.wait_for_everyone()

    def _model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        s = self.settings
        if s.model_type is not None:
            model = new_model(
                s.model_type, tokenizer, attn_implementation=s.attn_implementation, linattn=s.linattn, settings=s.model_config
            )
        else:
            model = load_model(str(s.model), attn_implementation=s.attn_implementation, linattn=s.linattn, overrides=s.model_config)
        check_length(model, s.length)
        if s.noise and not is_linear(model):
            raise RecipeError(
                "noise is dropout for linear attention, and this model's is softmax; set attn_implementation=linattn or noise=0"
            )
        # A cache would be built in every training step, and stories packed together would then see one another.
        model.config.use_cache = False
        if s.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def _teacher(self, model: PreTrainedModel) -> PreTrainedModel | None:
        if self.settings.teacher is None:
            return None
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.float32)
        teacher = load_model(self.settings.teacher, dtype=low)
        if teacher.config.vocab_size < model.config.vocab_size:
            raise RecipeError(
                f"the teacher has {teacher.config.vocab_size} tokens and the model {model.config.vocab_size}; both must use one tokenizer"
            )
        check_length(teacher, self.settings.length)
        teacher.config.use_cache = False
        return teacher.to(self.accelerator.device).eval().requires_grad_(False)


def draw(run: Run) -> None:
    """Draw loss.png of the run's metrics."""
    records = run.records()
    curves = {
        "training": [(r["step"], r["cross_entropy"]) for r in records if r.get("cross_entropy") is not None],
        "validation": [(r["step"], r["valid_loss"]) for r in records if r.get("valid_loss") is not None],
    }
    plot_curves(run.folder / "loss.png", curves, x="step", y="cross-entropy, nats a token", title=run.folder.name)
