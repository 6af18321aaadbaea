"""The settings of a training run, one key a line in the YAML files under configs/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

COMMAND = "recipes.tinystories.train"


@dataclass
class Settings:
    """What decides a run. Every field is a key of the YAML file and of `--set`."""

    output: str
    """Folder of the run: checkpoints, metrics, curve, and at the end model/."""

    # The model
    model: str | None = None
    """Checkpoint folder or hub id, softmax or converted; leave out for a model from scratch."""
    model_type: str | None = None
    """Transformers' name of an architecture (llama, gpt_neox, ...), for a model from scratch."""
    model_config: dict[str, Any] = field(default_factory=dict)
    """Keys of the model's own config, over the checkpoint's or the architecture's defaults."""
    tokenizer: str | None = None
    """Tokenizer: a checkpoint, hub id or tokenizer.json; by default the model's."""
    attn_implementation: str | None = None
    """Attention to compute: linattn, or one of Transformers' own such as sdpa; by default what the checkpoint says."""
    linattn: dict[str, Any] = field(default_factory=dict)
    """Options of LinAttnConfig (above), over the checkpoint's."""

    # The text
    train_data: list[str] = field(default_factory=lambda: ["roneneldan/TinyStories"])
    """Text to train on: files, tables, folders of them, or hub ids."""
    valid_data: list[str] = field(default_factory=list)
    """Text to validate on, given as train_data is; none: the last `valid_stories` of the training text are held out."""
    train_split: str = "train"
    """Split to read of a hub data set, for training and for validation."""
    valid_split: str = "validation"
    """Split to read of a hub data set, for training and for validation."""
    text_column: str = "text"
    """Column of a table that holds the text, or a conversation, which the tokenizer's chat template makes text of."""
    separator: str = "<|endoftext|>"
    """What stands between the stories of a text file."""
    valid_stories: int = 500
    """Stories held out where there is no valid_data."""
    length: int = 512
    """Tokens a sequence."""
    separate_stories: bool = False
    """Whether stories packed into one sequence are hidden from one another."""

    # The optimizer
    steps: int | None = None
    """Optimizer steps; by default `epochs` times the text."""
    epochs: float = 1.0
    """Passes over the text, where `steps` says nothing."""
    batch_size: int = 8
    """Sequences of each forward pass, in each process."""
    gradient_accumulation: int = 1
    """Forward passes of each step."""
    learning_rate: float = 1e-3
    """Highest learning rate of the weights."""
    linattn_learning_rate: float = 0.1
    """Highest learning rate of the numbers that each head of converted attention has one of; at the rate of the weights they would stay
    where they start."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, on matrices."""
    beta2: float = 0.95
    """Second beta of AdamW."""
    warmup: float = 0.05
    """Share of the steps over which the learning rates rise from 0; after it they fall to 0 along a cosine."""
    clip: float = 1.0
    """Largest norm of a gradient; a larger one is scaled down to it."""
    noise: float = 0.0
    """Probability p of noise dropout at the first step (only of linear attention)."""
    noise_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How p falls to 0 over the run."""
    teacher: str | None = None
    """Checkpoint whose predictions are matched; the tokenizer must be the same."""
    teacher_weight: float = 1.0
    """Share of the KL divergence to the teacher in the loss; the rest is the text's cross-entropy."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Type that products are computed in, no being float32; by default what accelerate is configured for."""
    gradient_checkpointing: bool = False
    """Compute activations twice, for less memory."""
    seed: int = 0
    """Seed of a new model's weights, of the order of the text and of the noise."""

    # What is reported and kept
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 100
    """Steps between two evaluations."""
    eval_sequences: int = 64
    """Held-out sequences that an evaluation uses."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    samples: int = 2
    """Held-out stories whose beginnings the model goes on from at each evaluation."""
    sample_tokens: int = 60
    """Tokens of each such continuation."""

    def __post_init__(self) -> None:
        counts = (
            "length",
            "batch_size",
            "gradient_accumulation",
            "log_every",
            "eval_every",
            "eval_sequences",
            "checkpoint_every",
            "valid_stories",
        )
        for name in (*counts, *(["steps"] if self.steps is not None else [])):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie between 0 and {2**32 - 1}, got {self.seed}")
        for name in ("learning_rate", "linattn_learning_rate", "epochs", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name, top in (("warmup", 1), ("teacher_weight", 1), ("noise", 0.999), ("beta2", 0.9999)):
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(f"{name} must lie between 0 and {top}, got {getattr(self, name)}")
        for name in ("weight_decay", "samples", "sample_tokens"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2, got {self.length}")
        for name in ("checkpoint_every", "eval_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(f"{name} ({getattr(self, name)}) must be a multiple of log_every ({self.log_every})")
        if (self.model is None) == (self.model_type is None):
            raise ValueError("give either model (a checkpoint) or model_type (an architecture, from scratch)")
        if self.model is None and self.tokenizer is None:
            raise ValueError("a model from scratch needs a tokenizer: a checkpoint, a hub id or a tokenizer.json")
        if not self.train_data:
            raise ValueError("train_data names no text")

    def reads(self) -> list[str]:
        """The files, folders and hub ids that a run reads."""
        return [*self.train_data, *self.valid_data, *filter(None, (self.model, self.tokenizer, self.teacher))]
