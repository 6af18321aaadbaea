"""The training itself: what `recipes.tinystories.train` runs once its arguments are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import set_seed
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

import hf_linattn
from recipes.common.accelerating import new_accelerator
from recipes.common.config import to_dict
from recipes.common.documents import Source
from recipes.common.errors import RecipeError, stage
from recipes.common.files import output_path, staged_directory, write_text
from recipes.common.loop import Loop, Pace
from recipes.common.plots import plot_curves
from recipes.common.run import Run
from recipes.common.state import check_written
from recipes.common.threads import threads
from recipes.common.tokenizing import load_tokenizer
from recipes.common.tokens import chat_template, tokenized
from recipes.common.windows import Windows, own_batches, training_order
from recipes.tinystories.card import model_card
from recipes.tinystories.data import Stories, first_words
from recipes.tinystories.model import check_length, go_on, is_linear, load_model, new_model
from recipes.tinystories.settings import COMMAND, Settings


class Training(Loop):
    """One run: everything is made in __init__, so that bad input is refused before anything is written but the run's folder."""

    remedy = "lower {learning_rate} or {linattn_learning_rate} and start anew"

    def __init__(self, settings: Settings, resume: bool, overwrite: bool, inputs: Sequence[str | Path] = ()) -> None:
        self.settings = s = settings
        self.accelerator = new_accelerator(
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
        stories = Stories(
            [Source(name, s.train_split, s.text_column, s.separator) for name in s.train_data],
            [Source(name, s.valid_split, s.text_column, s.separator) for name in s.valid_data],
            s.valid_stories,
            chat_template(tokenizer),
        )
        with self.accelerator.main_process_first():
            train, valid = (
                Windows(tokenized(texts, stories.key(part), tokenizer, what), s.length, s.separate_stories)
                for texts, part, what in ((stories.train, "train", "text"), (stories.valid, "valid", "validation text"))
            )
        self.train_rows, self.valid_rows = train, valid
        self.tokenizer = tokenizer
        self.prompts = first_words(stories.valid(), s.samples, 8) if s.samples else []

        taken = s.batch_size * s.gradient_accumulation * self.accelerator.num_processes
        if not (steps_per_epoch := len(train) // taken):
            raise RecipeError(
                f"the text packs to {len(train)} sequences of {s.length} tokens and one step takes {taken}; "
                "give more text or lower batch_size, gradient_accumulation or length"
            )
        steps = s.steps or max(1, round(s.epochs * steps_per_epoch))
        self.pace = Pace(steps, s.log_every, s.eval_every, s.checkpoint_every, s.gradient_accumulation)
        self.tokens_per_step = taken * s.length
        self.noise = hf_linattn.DropoutSchedule(s.noise_schedule, s.noise, steps) if s.noise else None

        groups = hf_linattn.parameter_groups(model, s.learning_rate, s.linattn_learning_rate, s.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, s.beta2))
        schedule = get_cosine_schedule_with_warmup(optimizer, round(s.warmup * steps), steps)
        self.prepare(model, optimizer, schedule, s.batch_size)
        facts = {"sequences": len(train), "text": train.tokens.digest, "parameters": model.num_parameters()}
        self.run.open(to_dict(s), facts)

    def run_all(self) -> None:
        """Train from where the run stands to its end and write model/; then let go of the folder."""
        with closing(self.run):
            if (model := self.run.folder / "model").exists():
                check_written(model, "remove that folder to have it written again with --resume", compare=False)
                self.accelerator.print(f"{self.run.folder} is finished; its model is in {model}")
                return
            self.accelerator.print(self._ahead())
            self.train()
            self.save_model()
            self.accelerator.end_training()

    def restored(self, progress: dict[str, Any]) -> None:
        """Begin to write for TensorBoard: what cannot be gone on with is refused before anything is written."""
        self.accelerator.init_trackers("tensorboard")

    def start(self) -> None:
        """Measure what training starts from."""
        self.validate()

    def batches(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """This process's rows of each batch."""
        s, accelerator = self.settings, self.accelerator
        parts = s.gradient_accumulation * accelerator.num_processes
        for rows in training_order(len(self.train_rows), s.batch_size * parts, s.seed, step):
            for own in rows.reshape(parts, s.batch_size)[accelerator.process_index :: accelerator.num_processes]:
                yield self.train_rows.batch(own, accelerator.device)

    def before_step(self) -> None:
        """Lower the noise."""
        if self.noise is not None:
            hf_linattn.set_dropout(self.accelerator.unwrap_model(self.model), self.noise(self.step))

    def losses(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss, and the text's cross-entropy in nats a token."""
        loss, entropy = self.objective(batch)
        return {"loss": loss, "cross_entropy": entropy}

    def clip(self) -> torch.Tensor | None:
        """Bound the gradient's norm."""
        return self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip)

    def figures(self, means: dict[str, Any]) -> dict[str, Any]:
        """The noise of the step that is reported."""
        return {} if self.noise is None else {"noise": float(self.noise(self.step - 1))}

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

    def validate(self) -> None:
        """Log the cross-entropy of the validation sequences, in nats a token, and stories gone on with; draw the curve."""
        s, accelerator = self.settings, self.accelerator
        count = min(len(self.valid_rows), s.eval_sequences)
        total = torch.zeros((), device=accelerator.device)
        self.model.eval()
        with torch.no_grad():
            for rows, counted in own_batches(count, s.batch_size, accelerator.process_index, accelerator.num_processes):
                batch = self.valid_rows.batch(rows, accelerator.device)
                logits = self.model(**batch).logits[:, :-1].float()
                nats = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)
                total += nats[:counted].sum()
            loss = float(accelerator.reduce(total, "sum")) / count
            samples = self.sample()
        self.run.log(self.step, valid_loss=loss, seconds=round(self.seconds, 3), **({"samples": samples} if samples else {}))
        texts = {"samples": "\n\n".join(f"**{x['prompt']}** {x['text']}" for x in samples)} if samples else {}
        self.accelerator.log({"valid_loss": loss, **texts}, step=self.step)
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
                tokens = self.step * self.tokens_per_step
                write_text(place / "README.md", model_card(self.settings, model, tokens, self.run.records()))
        self.accelerator.wait_for_everyone()

    def _ahead(self) -> str:
        """What is to come, and what the loss beside the steps is."""
        s, device = self.settings, self.accelerator.device.type
        loss = "cross-entropy of the training text"
        if self.teacher is not None:
            divergence = "KL divergence from the teacher's predictions"
            loss = divergence if s.teacher_weight == 1 else f"{s.teacher_weight:g} {divergence} + {1 - s.teacher_weight:g} {loss}"
        on = f"{threads()} of the CPU" if device == "cpu" else device
        rows = self.tokens_per_step // s.length
        return f"{self.pace.steps} steps of {rows} x {s.length} tokens on {on}; loss: {loss}, nats a token"

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
