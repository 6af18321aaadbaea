"""The loop of `convert.transfer`: every linear attention layer on the teacher's own hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn

import hf_linattn
from convert.errors import ConversionError
from convert.stages.kin import stranger
from convert.stages.options import TransferOptions
from convert.stages.stage import Stage, draw_curves
from convert.truth import attention_output, hidden_states
from hf_linattn.models import attention_modules
from recipes.common.plots import plot_curves

Call = tuple[tuple[Any, ...], dict[str, Any]]
_PART = "student."


class AttentionLayers(nn.Module):
    """The student's linear attention layers side by side, each beside the teacher's.

    Args:
        student: the model that they are part of.
        names: of the attention modules.
    """

    def __init__(self, student: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.student, self.names = student, list(names)
        self.known: tuple[tuple[int, ...], dict[str, Call]] | None = None

    def forward(self, batch: dict[str, Tensor], entered: dict[str, Tensor], left: dict[str, Tensor]) -> Tensor:
        """Errors of the layers, a row of the batch each, (B, layers) float32.

        Args:
            batch: what the models are given.
            entered: by module, the hidden states (B, N, width) that entered the teacher's.
            left: by module, what left it.
        """
        calls, modules = self.calls(batch), dict(attention_modules(self.student))
        errors = []
        for name in self.names:
            args, kwargs = with_hidden_states(*calls[name], entered[name])
            errors.append(relative_error(attention_output(modules[name](*args, **kwargs)), left[name]))
        return torch.stack(errors, 1)

    def calls(self, batch: dict[str, Tensor]) -> dict[str, Call]:
        """What the student itself calls its attention modules with: positions and masks of its own.

        Without positions of the batch's own they depend on its shape alone, and one pass of the student tells for all that follow.
        """
        shape = tuple(batch["input_ids"].shape)
        if self.known is not None and self.known[0] == shape and len(batch) == 1:
            return self.known[1]
        found: dict[str, Call] = {}
        training = self.student.training
        self.student.eval()  # a pass that draws no random numbers, which a resumed run would draw anew
        with torch.no_grad(), watched(self.student, lambda name, call, output: found.update({name: call})):
            self.student.base_model(**batch, use_cache=False)
        self.student.train(training)
        self.known = shape, found
        return found


class Transfer(Stage):
    """A run of `convert.transfer`. The loss is the mean of the layers' errors."""

    options: TransferOptions

    def trained(self) -> nn.Module:
        """The attention layers; of the student nothing else learns."""
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ConversionError(
                f"{kind.value} spreads the weights of whole layers, and transfer runs attention modules alone; start it with plain "
                "data parallelism (MULTI_GPU), or on one device"
            )
        softmax = hf_linattn.LinAttnConfig.of(self.student.config).softmax_layers
        modules = dict(attention_modules(self.student))
        if any(module.layer_idx < 0 for module in modules.values()):
            raise ConversionError(
                f"{self.options.student}: one attention serves several layers, and {self.run.command} takes each by itself; "
                "give it to distill at once"
            )
        names = [name for name, module in modules.items() if module.layer_idx not in softmax]
        if differs := stranger(self.student, self.teacher):
            raise ConversionError(
                f"{self.options.student} was not converted from {self.options.teacher}: {differs}; {self.run.command} needs the teacher it "
                "was converted from"
            )
        self.student.requires_grad_(False)
        for name in names:
            for path, parameter in modules[name].named_parameters():
                parameter.requires_grad_(self.options.train == "attention" or path.startswith("linattn."))
        if not any(parameter.requires_grad for parameter in self.student.parameters()):
            raise ConversionError(f"{self.options.student} has no new parameters to train; give --train attention")
        self.names = names
        return AttentionLayers(self.student, names)

    def to_compile(self, model: Any) -> list[nn.Module]:
        """The student's attention layers."""
        return [module for name, module in attention_modules(self.student) if name in self.names]

    def errors(self, batch: dict[str, Tensor]) -> Tensor:
        """Of each row and layer, (B, layers)."""
        entered: dict[str, Tensor] = {}
        left: dict[str, Tensor] = {}

        def keep(name: str, call: Call, output: Any) -> None:
            if name in self.names:
                entered[name], left[name] = hidden_states(*call), attention_output(output)

        with torch.no_grad(), watched(self.teacher, keep):
            self.teacher.base_model(**batch, use_cache=False)
        errors: Tensor = self.model(batch, entered, left)
        return errors

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss and the layers' errors."""
        errors = self.errors(batch).mean(0)
        return {"loss": errors.mean(), "layer_errors": errors}

    def measured(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layers' errors and their mean, of each row."""
        errors = self.errors(batch)
        return {"error": errors.mean(1), "layer_errors": errors}

    def blame(self, means: dict[str, Any]) -> str:
        """The first layer whose error is no number."""
        bad = [name for name, error in zip(self.names, means["layer_errors"], strict=True) if not math.isfinite(error)]
        return f" in {bad[0]}" if bad else ""

    def draw(self, records: Sequence[dict[str, Any]]) -> None:
        """Draw the mean error by step, and the error by layer before and now."""
        draw_curves(self.run, "loss.png", {"loss": "training", "valid_error": "validation"}, "error of attention, of its mean square")
        by_layer = [record for record in records if "valid_layer_errors" in record]
        layers = [dict(attention_modules(self.student))[name].layer_idx for name in self.names]
        curves = {
            f"after step {record['step']}": list(zip(layers, record["valid_layer_errors"], strict=True))
            for record in (by_layer[0], by_layer[-1])
        }
        plot_curves(self.run.folder / "layers.png", curves, x="layer", y="error, of its mean square", title=self.run.folder.name)

    def finished_student(self) -> tuple[Any, dict[str, Tensor]]:
        """The whole student."""
        state = self.accelerator.get_state_dict(self.model)
        return self.student, {name.removeprefix(_PART): value for name, value in state.items()}


def relative_error(given: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared error of each row (N, width) over the mean square of its row of `wanted`: (B,) float32."""
    wanted = wanted.float()
    return (given.float() - wanted).square().mean((1, 2)) / wanted.square().mean((1, 2))


def with_hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> Call:
    """The arguments of an attention module with other hidden states."""
    return (args, kwargs | {"hidden_states": hidden}) if "hidden_states" in kwargs else ((hidden, *args[1:]), kwargs)


@contextmanager
def watched(model: Any, see: Callable[[str, Call, Any], None]) -> Iterator[None]:
    """Each call of an attention module of `model` is shown to `see`: its name, its arguments, what it gives."""

    def hook(name: str) -> Any:
        return lambda module, args, kwargs, output: see(name, (args, kwargs), output)

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in attention_modules(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
