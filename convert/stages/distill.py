"""The loop of `convert.distill`: the student's predictions brought near to its teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType
from torch import Tensor, nn

from convert.errors import ConversionError
from convert.stages.divergence import Divergence, check_head
from convert.stages.kin import stranger
from convert.stages.options import DistillOptions
from convert.stages.repeats import SHORTEST, with_repeats
from convert.stages.stage import Stage, draw_curves
from hf_linattn.models import attention_modules
from recipes.common.compiling import layers
from recipes.common.tokens import Tokens
from recipes.common.windows import Windows

_PART = "student."


class Predictions(nn.Module):
    """The student, with its distance to the teacher as what it gives; so no logits leave it."""

    def __init__(self, student: Any, divergence: Divergence) -> None:
        super().__init__()
        self.student, self.divergence = student, divergence
        # FSDP spreads a module by itself where this names its class, and else all weights as one, which are whole in every step.
        classes = {type(module).__name__ for module in student.modules()}
        self._no_split_modules = [name for name in student._no_split_modules or () if name in classes]

    def forward(self, batch: dict[str, Tensor], teachers: Tensor) -> Any:
        """In training loss, KL divergence and cross-entropy; else what `Divergence.measure` gives. `teachers` is (B, N, width)."""
        hidden = self.student.base_model(**batch, use_cache=False).last_hidden_state
        work = self.divergence.loss if self.training else self.divergence.measure
        return work(hidden[:, :-1], teachers[:, :-1], batch["input_ids"][:, 1:])


class Distill(Stage):
    """A run of `convert.distill`."""

    options: DistillOptions

    @property
    def is_control(self) -> bool:
        return self.options.control

    @property
    def compiled(self) -> bool:
        return self.options.compile

    def to_compile(self, model: Any) -> list[nn.Module]:
        """The layers of student and teacher."""
        return [*layers(self.student), *layers(self.teacher)]

    def trained(self) -> nn.Module:
        """The whole student, or with LoRA what it adds and what is new in attention."""
        o = self.options
        if o.repeat and o.length < 2 * SHORTEST:
            raise ConversionError(
                f"length {o.length} is too short to repeat stretches of {SHORTEST} tokens; raise it, or leave out --repeat"
            )
        tokens = torch.arange(8)[None] % self.student.config.get_text_config().vocab_size
        check_head(o.student, self.student, tokens)
        check_head(o.teacher, self.teacher, tokens.to(self.accelerator.device))
        if not self.is_control and (differs := stranger(self.student, self.teacher)):
            self.accelerator.print(f"{o.student} was not converted from {o.teacher} ({differs}), whose predictions it learns all the same")
        self.adapted = self._adapted() if o.lora else None
        return Predictions(self.student, Divergence(self.student, self.teacher, o.kl_weight, o.text_weight))

    def batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """Rows of `length`, and in the last steps of `long_length`."""
        o = self.options
        turn = self.pace.steps - round(o.long_share * self.pace.steps) if o.long_length else self.pace.steps
        if step < turn:
            ordinary = self.share(self.train_rows, o.batch_size, step)
            for _ in range((turn - step) * o.gradient_accumulation):
                yield next(ordinary)
        if o.long_length:
            yield from self.share(self.long_rows, o.batch_size * o.length // o.long_length, max(step, turn), turn)

    def changed(self, rows: np.ndarray, number: int) -> np.ndarray:
        """Rows with repeats in them."""
        return with_repeats(rows, self.options.repeat, self.options.seed, number) if self.options.repeat else rows

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, the divergence from the teacher and the text's cross-entropy."""
        loss, kl, text = self.model(batch, self._teachers(batch))
        return {"loss": loss, "kl": kl, "cross_entropy": text}

    def measured(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `Divergence.measure` gives."""
        found: dict[str, Tensor] = self.model(batch, self._teachers(batch))
        return found

    def told(self, means: dict[str, Any]) -> dict[str, Any]:
        """The means, and how far the student's loss is above the teacher's."""
        return super().told({**means, "above_teacher": means["loss"] - means["teacher_loss"]})

    def draw(self, records: Sequence[dict[str, Any]]) -> None:
        """Draw the divergence by step."""
        names = {"kl": "training", "valid_kl": "validation", "valid_above_teacher": "loss above the teacher's"}
        draw_curves(self.run, "loss.png", names, "KL divergence to the teacher, nats a token")

    def finished_student(self) -> tuple[Any, dict[str, Tensor]]:
        """The whole student; what LoRA learned is merged into its weights."""
        if self.adapted is not None:
            self.student = self.adapted.merge_and_unload()
            return self.student, self.student.state_dict()
        state = self.accelerator.get_state_dict(self.model)
        return self.student, {name.removeprefix(_PART): value for name, value in state.items()}

    def _cut(self, tokens: Tokens, valid: Tokens | None) -> None:
        super()._cut(tokens, valid)
        o = self.options
        if not o.long_length:
            return
        for name, model in ((o.student, self.student), (o.teacher, self.teacher)):
            positions = getattr(model.config, "max_position_embeddings", None)
            if positions is not None and o.long_length > positions:
                raise ConversionError(
                    f"long_length {o.long_length} is more than the {positions} positions of {name}; give --long-length {positions} or less"
                )
        whole = Windows(tokens, o.long_length, o.separate)
        kept = np.array([], dtype=np.int64) if valid is not None else self.valid_rows.chosen
        touched = np.concatenate([kept * o.length // o.long_length, ((kept + 1) * o.length - 1) // o.long_length])
        self.long_rows = Windows(tokens, o.long_length, o.separate, np.setdiff1d(whole.chosen, touched))
        taken = o.batch_size * o.length // o.long_length * o.gradient_accumulation * self.accelerator.num_processes
        if len(self.long_rows) < taken:
            raise ConversionError(
                f"the text is {len(self.long_rows)} rows of {o.long_length} tokens to train on and one step takes {taken}; give more text, "
                "or lower long_length or batch_size"
            )

    def _teachers(self, batch: dict[str, Tensor]) -> Tensor:
        """The teacher's last hidden states (B, N, width)."""
        with torch.no_grad():
            hidden: Tensor = self.teacher.base_model(**batch, use_cache=False).last_hidden_state
        return hidden

    def _adapted(self) -> Any:
        try:
            import peft
        except ImportError:
            raise ConversionError("LoRA is trained by the library peft: `pip install peft`, or leave out --lora") from None
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ConversionError("LoRA is merged on one device; start with plain data parallelism (MULTI_GPU), or leave out --lora")
        targets = [
            f"{name}.{path}"
            for name, module in attention_modules(self.student)
            for path, inner in module.named_modules()
            if isinstance(inner, nn.Linear) and not path.startswith("linattn")
        ]
        rank = self.options.lora
        adapted: Any = peft.get_peft_model(self.student, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        for name, parameter in self.student.named_parameters():
            if ".linattn." in name:
                parameter.requires_grad_(True)
        return adapted
