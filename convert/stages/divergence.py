"""The distance between two models' predictions without ever holding all of them: logits are made and used a piece at a time.

At 16 x 1,024 tokens and 49,152 words the logits of one model in float32 are 3.2 GB, and a divergence and its gradient hold several such.
Here the gradient of each piece is taken at once, down to the hidden states and the weights of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convert.errors import ConversionError

NUMBERS_AT_ONCE = 2**26
"""Logits of a piece: 256 MiB in float32."""

Head = Callable[[Tensor], Tensor]


def head_of(model: Any) -> Head:
    """What makes logits of the last hidden states of a causal language model."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or 1.0
    factor = factor / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits = layer(hidden) if factor == 1.0 else layer(hidden) * factor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return head


@torch.no_grad()
def check_head(name: str, model: Any, tokens: Tensor) -> None:
    """Refuses a model whose logits are not `head_of` its last hidden states; `tokens` is (1, N).

    Raises:
        ConversionError: they are not.
    """
    was_training = model.training
    model.eval()
    wanted = model(tokens, use_cache=False).logits
    given = head_of(model)(model.base_model(tokens, use_cache=False).last_hidden_state)
    model.train(was_training)
    if not torch.allclose(given.float(), wanted.float(), rtol=1e-2, atol=1e-2 * float(wanted.float().abs().max())):
        raise ConversionError(
            f"{name}: a {model.config.model_type} makes its logits in a way that convert.distill does not know; add it to "
            "convert.stages.divergence.head_of, or fine-tune it by recipes.tinystories.train with teacher="
        )


class Divergence:
    """Of a student's predictions from a teacher's, and from the text.

    Args:
        student, teacher: causal language models.
        kl_weight, text_weight: of the two in the loss.
    """

    def __init__(self, student: Any, teacher: Any, kl_weight: float, text_weight: float) -> None:
        self.layer, self.student, self.teacher = student.get_output_embeddings(), head_of(student), head_of(teacher)
        self.kl_weight, self.text_weight = kl_weight, text_weight

    def loss(self, hidden: Tensor, teachers: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the KL divergence to the teacher and the cross-entropy of the text: means over tokens, in nats.

        Args:
            hidden: the student's last hidden states (B, N, width); the result is differentiated with respect to them.
            teachers: the teacher's (B, N, width).
            targets: the tokens that come next (B, N).
        """
        learning = [parameter for parameter in self.layer.parameters() if parameter.requires_grad]
        loss, kl, text = _Loss.apply(self, hidden.flatten(0, 1), teachers.flatten(0, 1), targets.flatten(), *learning)
        return loss, kl, text

    @torch.no_grad()
    def measure(self, hidden: Tensor, teachers: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Of each row: the KL divergence, the text's cross-entropy by student and teacher, and how often both think the same likeliest."""
        found: dict[str, list[Tensor]] = {"kl": [], "loss": [], "teacher_loss": [], "top1": []}
        shape = targets.shape
        for part in self._parts(targets.numel()):
            student, teacher, kl = self._compared(hidden.flatten(0, 1)[part], teachers.flatten(0, 1)[part])
            words = targets.flatten()[part, None]
            found["kl"].append(kl)
            found["loss"].append(-student.gather(1, words)[:, 0])
            found["teacher_loss"].append(-teacher.gather(1, words)[:, 0])
            found["top1"].append((student.argmax(1) == teacher.argmax(1)).float())
        return {name: torch.cat(values).view(shape).mean(1) for name, values in found.items()}

    def _parts(self, count: int) -> list[slice]:
        """`count` tokens in pieces."""
        size = max(1, NUMBERS_AT_ONCE // self.layer.weight.shape[0])
        return [slice(begin, begin + size) for begin in range(0, count, size)]

    def _compared(self, hidden: Tensor, teachers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        student = self.student(hidden).float().log_softmax(-1)
        teacher = self.teacher(teachers).float().log_softmax(-1)
        return student, teacher, (teacher.exp() * (teacher - student)).sum(-1)


class _Loss(torch.autograd.Function):
    """Loss, divergence and cross-entropy; the gradients are made in the forward pass, piece by piece, and scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, of: Divergence, hidden: Tensor, teachers: Tensor, targets: Tensor, *parameters: Tensor) -> Any:
        count = len(targets)
        sums = torch.zeros(2, device=hidden.device)
        by_hidden = torch.empty_like(hidden)
        by_parameter = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for part in of._parts(count):
            states = hidden[part].detach().requires_grad_()
            with torch.enable_grad():
                logits = of.student(states)
            words = targets[part, None]
            student = logits.detach().float().log_softmax(-1)
            teacher = of.teacher(teachers[part]).float().log_softmax(-1)
            apart, weights = teacher - student, teacher.exp_()
            sums[0] += apart.mul_(weights).sum()
            sums[1] -= student.gather(1, words).sum()
            # Of KL(p || q) by the logits of q: q - p; of the cross-entropy: q less 1 at the word.
            slope = student.exp_().mul_(of.kl_weight + of.text_weight).sub_(weights, alpha=of.kl_weight)
            slope.scatter_add_(1, words, torch.full_like(words, -of.text_weight, dtype=slope.dtype))
            first, *rest = torch.autograd.grad(logits, [states, *parameters], slope.div_(count).to(logits.dtype))
            by_hidden[part] = first
            for total, gradient in zip(by_parameter, rest, strict=True):
                total += gradient
        kl, text = (sums / count).unbind()
        ctx.save_for_backward(by_hidden, *by_parameter)
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        ctx.mark_non_differentiable(kl, text)
        return of.kl_weight * kl + of.text_weight * text, kl, text

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        by_hidden, *by_parameter = ctx.saved_tensors
        scaled = [(gradient * slopes[0]).to(dtype) for gradient, dtype in zip(by_parameter, ctx.dtypes, strict=True)]
        return None, by_hidden * slopes[0].to(by_hidden.dtype), None, None, *scaled
