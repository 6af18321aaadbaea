"""What an optimiser has to know of linear attention: its few numbers a head learn at a rate of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from .forms import LinAttnParams


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    head_learning_rate: float = 0.1,
    weight_decay: float = 0.0,
    matrix_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: matrices with weight decay, vectors without, what linear attention has of its own at its own rates.

    A decay or temperature is one number a head, of the order of 1; at the rate of the weights it would stay where it started.
    In a loop of one's own `torch.optim.AdamW(parameter_groups(model, 3e-4))`; in `transformers.Trainer` and TRL's trainers

        Trainer(model=model, args=args, train_dataset=data, optimizers=(torch.optim.AdamW(parameter_groups(model, 3e-4)), None))
        SFTTrainer(model=model, args=args, train_dataset=data, optimizers=(torch.optim.AdamW(parameter_groups(model, 3e-4)), None))

    where the rates of `args` are not used, and the schedule of `args` scales each group's own. With FSDP make the groups once the model is
    wrapped; with DeepSpeed, which makes its own optimiser, give them to `deepspeed.initialize(model_parameters=...)`.

    Args:
        model: a model, wrapped or not (DDP, FSDP with original parameters, PEFT); parameters that need no gradient are left out.
        learning_rate: of the weights.
        head_learning_rate: of the numbers a head of `LinAttnParams`. About 0.1, less for a model that keeps softmax layers.
        weight_decay: of the model's matrices.
        matrix_learning_rate: of the matrices of `LinAttnParams`, gates and projections, which are new; None: four times `learning_rate`.

    Returns:
        One to four groups with "params", "lr" and "weight_decay"; none is empty.

    Raises:
        ValueError: a rate or the decay is negative, or nothing is to be trained.
    """
    matrix_rate = 4 * learning_rate if matrix_learning_rate is None else matrix_learning_rate
    rates = {"learning_rate": learning_rate, "head_learning_rate": head_learning_rate, "weight_decay": weight_decay}
    for name, value in (rates | {"matrix_learning_rate": matrix_rate}).items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, not {value}.")
    of_layers = {id(parameter) for module in model.modules() if isinstance(module, LinAttnParams) for parameter in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = [parameter for parameter in trained if id(parameter) in of_layers]
    weights = [parameter for parameter in trained if id(parameter) not in of_layers]
    groups = [
        {"params": [x for x in weights if x.ndim > 1], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [x for x in weights if x.ndim <= 1], "lr": learning_rate, "weight_decay": 0.0},
        {"params": [x for x in own if x.ndim > 1], "lr": matrix_rate, "weight_decay": 0.0},
        {"params": [x for x in own if x.ndim <= 1], "lr": head_learning_rate, "weight_decay": 0.0},
    ]
    if not trained:
        raise ValueError(f"{type(model).__name__} has no parameter that needs a gradient, so there is nothing to train.")
    return [group for group in groups if group["params"]]
