"""What a run's config file may say."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .data import TASKS

COMMAND = "recipes.lra.train"


@dataclass
class Settings:
    """One task, one kind of attention, one or more seeds. Lengths are in tokens, times in minutes.

    data: a folder of recipes.lra.prepare, or one with the release's files.
    output: the folder of the runs; each seed has seed-N in it.
    linattn: options of LinAttnConfig, such as {kernel: quadratic}.
    dropout: none; standard, on the weights of softmax attention; noise, linattn's in its place. Its probability is attention_dropout, which
        noise_schedule lowers to 0 over the run. hidden_dropout, on embeddings and sublayers, is the same for all three.
    steps, max_minutes: the run ends at whichever comes first, and the learning rate has come down to 0 by then.
    model: further arguments of LRAConfig, such as {hidden_size: 64}.
    pad_multiple: a batch is padded to its longest sequence, rounded up to a multiple of this; sequences of like length share a batch.
    blank_is_padding: pixels of value 0 are padding, as in the published configurations, where token 0 is masked.
    turn_pictures: each time a picture is trained on it is turned and mirrored, into one of the eight positions of a square.
        Pathfinder's labels do not depend on it. The published rows do without.
    validation_examples: how many of the validation set an evaluation uses; null: all.
    """

    task: str
    data: str
    output: str
    attn_implementation: Literal["linattn", "sdpa", "eager"] = "linattn"
    linattn: dict[str, Any] = field(default_factory=dict)
    dropout: Literal["none", "standard", "noise"] = "none"
    attention_dropout: float = 0.1
    noise_schedule: Literal["constant", "linear", "cosine"] = "linear"
    hidden_dropout: float = 0.1
    model: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    batch_size: int = 32
    learning_rate: float = 1e-4
    schedule: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "linear"
    warmup_steps: int = 1000
    steps: int = 5000
    max_minutes: float | None = None
    weight_decay: float = 0.0
    beta2: float = 0.999
    gradient_clip: float = 1.0
    eval_every: int = 500
    eval_batch_size: int = 64
    validation_examples: int | None = None
    log_every: int = 100
    save_every: int = 1000
    pad_multiple: int = 128
    blank_is_padding: bool = False
    turn_pictures: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compile: Literal["none", "default", "reduce-overhead"] = "none"

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}, expected one of {', '.join(TASKS)}")
        if self.attn_implementation == "linattn" and self.dropout == "standard":
            raise ValueError("dropout: standard drops softmax weights, which linattn never forms; take dropout: noise or none")
        if self.attn_implementation != "linattn" and self.dropout == "noise":
            raise ValueError("dropout: noise is linattn's; take dropout: standard or none with softmax attention")
        if self.turn_pictures and not TASKS[self.task].side:
            raise ValueError(f"turn_pictures is for tasks of pictures, which {self.task} is not")
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0 and less than 1")
        for name in ("batch_size", "steps", "eval_every", "eval_batch_size", "log_every", "save_every", "pad_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.save_every % self.log_every:
            raise ValueError(
                f"save_every {self.save_every} is not a multiple of log_every {self.log_every}, and a resumed run would log other means"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}, expected one or more different numbers")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(f"seeds is {self.seeds}, expected numbers between 0 and {2**32 - 1}")
        if self.learning_rate <= 0 or self.warmup_steps < 0 or (self.max_minutes is not None and self.max_minutes <= 0):
            raise ValueError("learning_rate and max_minutes must be above 0, and warmup_steps not below")

    def folder(self, seed: int) -> Path:
        """Where the run of a seed is, or will be."""
        return Path(self.output) / f"seed-{seed}"
