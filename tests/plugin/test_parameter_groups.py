"""Per-head parameters learn at a rate of their own, under a plain optimiser, DDP's wrapper and Trainer."""

import pytest
import torch
from tiny_models import tiny_config, tiny_tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_linattn import LinAttnConfig, LinAttnParams, parameter_groups
from hf_linattn.models import config_class_for


def converted(name="llama", dtype=torch.float32, **options):
    options = LinAttnConfig(learnable=True, decay="head", **options).to_dict()
    torch.manual_seed(0)
    config = config_class_for(name)(**{**tiny_config(name).to_diff_dict(), "linattn": options})
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def names(model, group):
    held = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3"])
def test_every_parameter_is_in_one_group(name):
    model = converted(name)
    matrices, vectors, heads = groups = parameter_groups(model, 1e-3, 0.2, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-3, 0.0), (0.2, 0.0)]
    assert names(model, heads) == {name for name, _ in model.named_parameters() if ".linattn." in name}
    assert all(parameter.ndim == 2 for parameter in matrices["params"]) and all(parameter.ndim == 1 for parameter in vectors["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = converted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".linattn." in name)
    (heads,) = parameter_groups(model, 1e-3)
    assert heads["lr"] == 0.1 and len(heads["params"]) == 6
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model.requires_grad_(False), 1e-3)
    with pytest.raises(ValueError, match="head_learning_rate must be at least 0, not -1"):
        parameter_groups(model, 1e-3, -1.0)


def test_new_matrices_have_a_rate_between():
    """Four times that of the weights, where none is given: gates start at nothing."""
    model = converted(form="window", gate="token", features=4)
    for given, rate in (({}, 4e-3), ({"matrix_learning_rate": 0.02}, 0.02), ({"matrix_learning_rate": 0.0}, 0.0)):
        matrices, _, new, heads = parameter_groups(model, 1e-3, weight_decay=0.1, **given)
        assert (new["lr"], new["weight_decay"], heads["lr"], heads["weight_decay"]) == (rate, 0.0, 0.1, 0.0)
        assert {name.rpartition(".")[2] for name in names(model, new)} == {
            "gate_weight",
            "query_projection",
            "key_projection",
            "key_center",
        }
        assert all(".linattn." in name for name in names(model, new)) and matrices["weight_decay"] == 0.1
    assert all(group["lr"] == 0 for group in parameter_groups(model, 0.0, 0.0)) and parameter_groups(model, 1e-3)[0]["weight_decay"] == 0
    for name in ("learning_rate", "head_learning_rate", "weight_decay", "matrix_learning_rate"):
        with pytest.raises(ValueError, match=f"^{name} must be at least 0, not -0.5"):
            parameter_groups(model, **{"learning_rate": 1e-3, name: -0.5})


def test_under_a_trainer_each_group_moves_at_its_own_rate(tmp_path):
    """Adam's first step is the rate itself, whatever the gradient; the schedule scales each group."""
    model, data = converted(), [{"input_ids": row, "labels": row} for row in tiny_tokens(4)]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.2))
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
                                  lr_scheduler_type="constant", max_grad_norm=0.0)  # fmt: skip
    Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    moved = {name: (parameter.detach() - before[name]).abs().max().item() for name, parameter in model.named_parameters()}
    for name, distance in moved.items():
        assert distance == pytest.approx(0.2 if ".linattn." in name else 1e-3, rel=0.01), name
    assert sum(isinstance(module, LinAttnParams) for module in model.modules()) == 3
