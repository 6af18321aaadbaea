"""Fine-tunes a model with linear attention by transformers.Trainer: python examples/train_with_noise.py MODEL TEXT OUTPUT.

Noise takes the place of dropout (the paper's eq. 28) and is lowered to nothing by the last step. What a converted model learns per head
gets a rate of its own, or it would stay where it started.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_linattn

LENGTH, STEPS = 128, 20


def rows(text: str, tokenizer) -> list[dict[str, Tensor]]:
    ids = torch.tensor(tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"])
    return [{"input_ids": row, "labels": row} for row in ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)]


def main(name: str, text: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="linattn")
    model.config.use_cache = False  # no states are wanted in training
    groups = hf_linattn.parameter_groups(model, learning_rate=3e-4, head_learning_rate=0.03, weight_decay=0.1)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output, max_steps=STEPS, per_device_train_batch_size=4, logging_steps=5, report_to=[], save_strategy="no"),
        train_dataset=rows(text, tokenizer),
        optimizers=(torch.optim.AdamW(groups), None),
        callbacks=[hf_linattn.DropoutCallback("cosine", p=0.1)],
    )
    trainer.train()
    trainer.save_model(output)  # loads with linear attention again, once hf_linattn is imported


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("MODEL", "TEXT", "OUTPUT"):
        parser.add_argument(name)
    given = parser.parse_args()
    if not Path(given.TEXT).is_file():
        parser.error(f"{given.TEXT}: no such file; give the text to train on")
    main(given.MODEL, given.TEXT, given.OUTPUT)
