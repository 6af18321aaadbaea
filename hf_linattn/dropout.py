"""Noise in place of dropout, which linear attention cannot have: it never forms the weights that dropout would drop.

What is applied (`LinAttnConfig.dropout_kind`):

- "paper": out~ = (1 - p) out (1 + psi), psi ~ N(0, p), independent for every output (*Towards Making Linear Attention Usable*, eq. 28),
  inside the kernel. p is the variance. Its derivation takes attention's outputs for sums of terms of mean zero and does not renormalise
  what is left after dropping; true dropout of normalised weights keeps the mean at out, not at (1 - p) out, and an output near zero still
  varies. The factor 1 - p is also not undone in evaluation, so p must be lowered to 0 before training ends: hence the schedules.
- "moment": out~ = out + psi sqrt(p / (1 - p) sum_n a_in^2 (v_n - out)^2), psi ~ N(0, 1), a_in the normalised weights: the variance that
  dropping each weight with probability p, and dividing by the sum of those kept, has to first order. The mean stays at out. It needs the
  second moments of the weights: two calls of the operator, about three times the work, and c = 0 only.

p follows a `DropoutSchedule`; `DropoutCallback` does so under `transformers.Trainer`, and in a loop of one's own

    schedule = DropoutSchedule("cosine", p=0.2, steps=1000)
    for step, batch in enumerate(loader):
        set_dropout(model, schedule(step))
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .config import LinAttnConfig

KINDS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class DropoutSchedule:
    """The noise probability p at each optimiser step: constant, or lowered from `p` at step 0 to 0 at step `steps` and kept there.

    Args:
        kind: "constant", "linear" or "cosine" (half a wave: slow at both ends).
        p: at least 0, below 1.
        steps: the step from which p is 0; not used by "constant".

    Raises:
        ValueError: where one of them is out of bounds.
    """

    kind: str
    p: float
    steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the dropout schedule must be one of {', '.join(KINDS)}, not {self.kind!r}.")
        if not 0 <= self.p < 1:
            raise ValueError(f"the dropout probability must be at least 0 and below 1, but is {self.p}.")
        if self.kind != "constant" and self.steps <= 0:
            raise ValueError(f"a {self.kind} dropout schedule needs the number of steps until 0, but steps is {self.steps}.")

    def __call__(self, step: int) -> float:
        if self.kind == "constant":
            return self.p
        done = min(max(step / self.steps, 0.0), 1.0)
        return self.p * (1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def set_dropout(model: nn.Module, p: float) -> None:
    """Make every linear attention module of `model` use noise of probability `p` in training, whatever the config says.

    It is kept in a 0-dimensional tensor `linattn_dropout_p` on each attention module, written in place after the first call, so that a
    compiled model is not compiled again for each p. It is not saved with the model.

    Raises:
        ValueError: if p is not in [0, 1), or the model has no attention module.
    """
    if not 0 <= p < 1:
        raise ValueError(f"the dropout probability must be at least 0 and below 1, but is {p}.")
    _keep(model, "linattn_dropout_p", p)


def set_window_drop(model: nn.Module, p: float) -> None:
    """Make sequences and query heads of `model`, whose form is "window", go without their window in training with probability `p`.

    What the polynomial beside it gives is then all there is, so that it learns, and has to; tokens that have nothing before their window
    keep it. Kept as `set_dropout` keeps its own, in `linattn_window_drop`; lower p to 0 before training ends, by `WindowDropCallback`.

    Raises:
        ValueError: if p is not in [0, 1], or the model has no window beside a polynomial.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"the probability of dropping the window must be from 0 to 1, but is {p}.")
    config: Any = next((module.config for module in model.modules() if hasattr(module, "config")), None)
    options = None if config is None else LinAttnConfig.of(config)
    if options is None or options.form != "window" or options.beside == "none":
        raise ValueError(f"{type(model).__name__} has no window beside another attention to drop: convert with --form window.")
    _keep(model, "linattn_window_drop", p)


def _keep(model: nn.Module, name: str, p: float) -> None:
    """Puts a number on every attention module, in place where it is there already."""
    found = False
    for module in model.modules():
        if not (hasattr(module, "is_causal") and hasattr(module, "config")):
            continue
        found = True
        current = getattr(module, name, None)
        device = next((x.device for x in module.parameters()), torch.device("cpu"))
        if isinstance(current, torch.Tensor) and current.device == device:
            current.fill_(p)
        else:
            setattr(module, name, torch.full((), p, device=device))
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention module that Transformers' attention interface serves.")


class DropoutCallback(TrainerCallback):
    """Sets the noise probability before every step of a `transformers.Trainer`.

    Args:
        schedule: a `DropoutSchedule`, or a kind of one ("linear", "cosine") that then reaches 0 at the last step of each training.
        p: the starting probability where `schedule` is a kind.
    """

    set = staticmethod(set_dropout)

    def __init__(self, schedule: DropoutSchedule | str, p: float = 0.0) -> None:
        self.kind = schedule if isinstance(schedule, str) else None
        self.schedule = schedule  # of the training under way
        self.p = p

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.kind is not None:
            self.schedule = DropoutSchedule(self.kind, self.p, max(state.max_steps, 1))

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        assert isinstance(self.schedule, DropoutSchedule) and model is not None
        self.set(model, self.schedule(state.global_step))


class WindowDropCallback(DropoutCallback):
    """The same for `set_window_drop`."""

    set = staticmethod(set_window_drop)
