"""What a run's config file may say."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .data import TASKS

COMMAND = "recipes.lra.train"


@dataclass
class Settings:
    """One task, one kind of attention, one or more seeds. Every field is a key of the YAML file and of `--set`."""

    task: str
    """Task of the arena: listops, text, retrieval, image, pathfinder, pathfinder64 or pathx."""
    data: str
    """Folder of the task's data: one that recipes.lra.prepare wrote, or one with the files of the arena's release."""
    output: str
    """Folder of the runs; each seed has seed-N in it."""

    # The model
    attn_implementation: Literal["linattn", "sdpa", "eager"] = "linattn"
    """Attention to compute: linattn, linear; sdpa or eager, softmax."""
    linattn: dict[str, Any] = field(default_factory=dict)
    """Options of LinAttnConfig, such as {kernel: quadratic}."""
    dropout: Literal["none", "standard", "noise"] = "none"
    """Dropout of attention: standard, on the weights of softmax; noise, what linattn has in its place."""
    attention_dropout: float = 0.1
    """Probability of `dropout`; of noise, at the first step."""
    noise_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the probability of noise falls to 0 over the run."""
    hidden_dropout: float = 0.1
    """Probability of dropout on embeddings and sublayers, whatever `dropout` says."""
    model: dict[str, Any] = field(default_factory=dict)
    """Further arguments of LRAConfig, such as {hidden_size: 64}."""

    # The optimizer
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds, each of which is a run, one after another."""
    batch_size: int = 32
    """Examples of each step, shared out among the processes."""
    learning_rate: float = 1e-4
    """Highest learning rate."""
    schedule: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "linear"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: int = 1000
    """Steps over which the learning rate rises from 0."""
    steps: int = 5000
    """The run ends here or at max_minutes, whichever comes first, and the learning rate has come down to 0 by then."""
    max_minutes: float | None = None
    """Minutes of training; by default `steps` alone decide."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices."""
    beta2: float = 0.999
    """Second beta of AdamW."""
    gradient_clip: float = 1.0
    """Largest size of each number of a gradient; a larger one is cut to it."""

    # What is measured and kept
    eval_every: int = 500
    """Steps between two evaluations on the validation set."""
    eval_batch_size: int = 64
    """Examples of each forward pass of an evaluation."""
    validation_examples: int | None = None
    """Examples of the validation set that an evaluation uses; by default all."""
    log_every: int = 100
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 1000
    """Steps between two checkpoints."""

    # The batches, and how they are computed
    pad_multiple: int = 128
    """A batch is padded to its longest sequence, rounded up to a multiple of this; sequences of like length share a batch."""
    blank_is_padding: bool = False
    """Pixels of value 0 are padding, as in the published configurations, where token 0 is masked."""
    turn_pictures: bool = False
    """Each time a picture is trained on it is turned and mirrored, into one of the eight positions of a square.

    Pathfinder's labels do not depend on it. The published rows do without.
    """
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Type that products are computed in, no being float32."""
    compile: Literal["none", "default", "reduce-overhead"] = "none"
    """Mode of torch.compile for the training steps; none: they are not compiled."""

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
