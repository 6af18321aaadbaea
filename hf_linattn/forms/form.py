"""What a form of attention is asked for. All else (masks, caches, conversion, reports) knows forms by these questions alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .kept import Made
from .parameters import LinAttnParams
from .seen import Seen

State = dict[str, Tensor]
"""What stands for all tokens so far, by name; sequences along the first dimension. Its shapes do not depend on how many there were."""
Tokens = dict[str, Tensor]
"""What a state takes in of some tokens, by name; sequences along the first dimension and tokens along the third."""
Numbers = dict[str, Any]
"""What a layer attends with: its options, or what it has learned."""


@dataclass(frozen=True)
class Sizes:
    """Of one attention layer.

    Attributes:
        query_heads, key_heads, head_dim, value_dim: Hq, Hk, D, Dv.
        hidden_size: width of the hidden states that enter the layer; None where nothing is computed from them.
        longest: tokens that the layer can look back over, its window or the model's positions: where slow heads start.
    """

    query_heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    hidden_size: int | None = None
    longest: float = 512.0


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        query, key, value: (B, Hq, N, D), (B, Hk, N, D), (B, Hk, N, Dv), rotary embedding applied.
        segments: None, (B, N) bool that is False at padding, or (B, N) ids where several sequences are packed in a row.
        causal: whether a token sees only those before it.
        scaling: what the softmax model multiplies q.k with; None: D ** -0.5.
        noise: dropout_p and dropout_kind of `linear_attention` in training; empty outside it.
        hidden: (B, N, hidden_size), what entered the layer, where its parameters need it.
        drop: the probability with which a sequence and query head goes without its window in training, where the form has one.
        made: what was made of the layer's numbers for the tokens before, to be added to; None where nothing is kept.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    segments: Tensor | None = None
    causal: bool = True
    scaling: float | None = None
    noise: Numbers = {}
    hidden: Tensor | None = None
    drop: float | Tensor = 0.0
    made: Made | None = None

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.query.shape[1], self.key.shape[1], self.key.shape[-1], self.value.shape[-1])

    @property
    def is_packed(self) -> bool:
        return self.segments is not None and self.segments.dtype != torch.bool


class Form(ABC):
    """One attention, with its options. Making one costs nothing; it holds no tensors.

    `Options` is a frozen dataclass of plain JSON values: the form's part of `config.linattn`. Making it raises ValueError for a value out
    of bounds and TypeError for one of the wrong type, in one sentence that begins with "linattn option".
    """

    name: ClassVar[str]
    Options: ClassVar[Any]
    FEW: ClassVar[int] = 1
    """Tokens that `step` takes at once."""
    SEARCHED: ClassVar[dict[str, tuple[float, ...]]] = {}
    """Numbers whose start calibration searches for, by how near a layer comes to the softmax one: the shifts that are tried."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def named(self) -> dict[str, Any]:
        """The form's name and options, as `config.linattn` holds them."""
        return {"form": self.name, **{field: getattr(self.options, field) for field in self.Options.__dataclass_fields__}}

    # ---- in words, for reports and model cards

    @abstractmethod
    def describe(self, learned: bool = False) -> str:
        """A few words that tell this form from others in a table: "linear with decay"; of numbers that are learned, where they start."""

    @abstractmethod
    def formula(self, learnable: bool) -> str:
        """What it computes, as the end of a sentence that begins "Attention weights are"."""

    # ---- what a layer learns

    @property
    def learns(self) -> bool:
        """Whether layers of a checkpoint have numbers of their own to learn."""
        return True

    @abstractmethod
    def parameters(self, sizes: Sizes, learnable: bool) -> LinAttnParams | None:
        """A layer's own numbers at their starting values, kept inside their bounds by construction; None where it has none of its own.

        Raises:
            ValueError: the form cannot be learned from these options.
        """

    @abstractmethod
    def numbers(self, call: Call, parameters: LinAttnParams | None) -> Numbers:
        """What to attend with."""

    # ---- attention

    @abstractmethod
    def keeps_state(self, call: Call, numbers: Numbers) -> bool:
        """Whether a state can stand for the tokens of this call, so that later ones can see them."""

    @abstractmethod
    def attend(self, call: Call, numbers: Numbers) -> Tensor:
        """(B, Hq, N, Dv), the tokens seeing one another alone."""

    @abstractmethod
    def attend_from(self, call: Call, numbers: Numbers, before: State | None) -> tuple[Tensor, State]:
        """The same, seeing what `before` stands for as well, and the state after them; `before` is left as it is, None if nothing was."""

    @abstractmethod
    def step(self, call: Call, numbers: Numbers, state: State) -> Tensor:
        """(B, Hq, N, Dv) for up to FEW new tokens a sequence, not packed, without gradient and noise; `state` is moved on in place."""

    # ---- the state

    @abstractmethod
    def layout(self, sizes: Sizes, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape for one sequence and dtype of each tensor of a state, in a model of `dtype`."""

    @abstractmethod
    def tokens(self, call: Call, numbers: Numbers) -> Tokens:
        """What `advance` needs of these tokens to take them in again."""

    @abstractmethod
    def advance(self, before: State | None, tokens: Tokens, numbers: Numbers, query_heads: int) -> State:
        """The state after `tokens`, as new tensors."""

    def empty_state(self, sizes: Sizes, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        """The state before the first token: zeros."""
        layout = self.layout(sizes, dtype)
        return {name: torch.zeros(batch, *shape, dtype=kind, device=device) for name, (shape, kind) in layout.items()}

    def state_bytes(self, sizes: Sizes, dtype: torch.dtype) -> int:
        """Bytes of one sequence's state in one layer."""
        return sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in self.layout(sizes, dtype).values())

    # ---- conversion

    @classmethod
    @abstractmethod
    def converted(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a checkpoint to be converted: those given, and where the rest start for training."""

    @abstractmethod
    def starting_numbers(self, sizes: Sizes, learnable: bool) -> Numbers:
        """What a freshly converted layer attends with, numbers or float64 tensors, computed apart from the parameters that hold it."""

    @abstractmethod
    def calibrate(self, parameters: LinAttnParams, seen: Seen, nearest: int = 0) -> None:
        """Starts `parameters` from what the softmax layer was seen to do; `nearest` tokens are another's business (a window's)."""

    @abstractmethod
    def reference(self, call: Call, numbers: Numbers) -> Tensor:
        """`attend` by its formula over all pairs, in the dtype of the call: what the converter's check holds a layer against."""

    def reach(self) -> int:
        """Tokens that a text must be longer than before all of the form is at work: what a probe of it has to go beyond."""
        return 0

    @abstractmethod
    def alternatives(self) -> Iterator[Form]:
        """Forms of the same kind, this one among them, whose costs are worth a line beside its own."""
