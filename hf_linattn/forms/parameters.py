"""Learned numbers of one attention layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

OFFSET = "_offset"
"""Ends the names of what is learned of the numbers a head."""


class LinAttnParams(nn.Module):
    """What a converted layer has learned, a few numbers a head and, in some forms, matrices; the base of each form's own.

    Each number is a float32 buffer, where it started, and a parameter ``..._offset`` in the model's dtype, how far it has learned since,
    at first 0. So a bfloat16 model has parameters of one dtype, which FSDP and DeepSpeed ask for, and loses nothing that it loads: a
    bfloat16 log rate of -7.6 can only move in steps of 0.03, an offset near 0 in as small ones as it is itself. AdamW in bfloat16, to move
    it by 0.48 in 300 steps of rates from 0.03 or 0.01 to 0, ends 0.06 or 0.47 away (it never moved), an offset 0.004 away both times.

    Args:
        numbers: how many heads have one each, by name.
        matrices: the shapes of matrices, by name.
        learnable: without it there are buffers alone, which are saved and never trained.
        hidden_size: width of the hidden states that numbers are computed from; None where none is.
    """

    def __init__(
        self, numbers: Mapping[str, int], matrices: Mapping[str, tuple[int, ...]], learnable: bool, hidden_size: int | None = None
    ) -> None:
        super().__init__()
        self.names, self.matrices, self.learnable, self.hidden_size = list(numbers), list(matrices), learnable, hidden_size
        self.readers = 1  # how often attention is computed each time that hidden states enter the layer
        self.entered: dict[int, list[Tensor]] = {}  # those that were not taken yet, once for each, by the thread that runs the model
        self.traced: list[Tensor] = []  # those of a graph that is traced, which knows no threads
        for name, heads in numbers.items():
            # A buffer and not a frozen parameter: loading a checkpoint makes every parameter require a gradient again.
            self.register_buffer(name, torch.empty(heads, dtype=torch.float32))
            if learnable:
                self.register_parameter(name + OFFSET, nn.Parameter(torch.empty(heads)))
        for name, shape in matrices.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @abstractmethod
    def start(self, name: str) -> Tensor:
        """The starting value of a number (heads,) or of a matrix."""

    def reset_parameters(self) -> None:
        """Sets the starting values, except of what Transformers has loaded from disk."""
        for name in (*self.names, *self.matrices):
            init.copy_(getattr(self, name), self.start(name))
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith(OFFSET):
                init.zeros_(parameter)

    def number(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A number a head, (heads,): where it started and what was learned."""
        started, offset = getattr(self, name).to(dtype), getattr(self, name + OFFSET, None)
        return started if offset is None else started + offset.to(dtype)

    def learned(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The numbers a head by name."""
        if torch.compiler.is_compiling() or not self.learnable or not self.names:
            return {name: self.number(name, dtype) for name in self.names}
        started, offsets = ([getattr(self, name + end).to(dtype) for name in self.names] for end in ("", OFFSET))
        return dict(zip(self.names, torch._foreach_add(started, offsets), strict=True))  # one kernel for all

    @torch.no_grad()
    def start_from(self, name: str, value: Tensor) -> None:
        """Begins anew from another value of a number (heads,) or of a matrix."""
        getattr(self, name).copy_(value)
        if hasattr(self, name + OFFSET):
            getattr(self, name + OFFSET).zero_()

    def read_off(self, name: str, hidden: Tensor | None, option: str, value: str = "token") -> Tensor:
        """What a matrix (heads, hidden_size) reads off the hidden states (B, N, hidden_size): (B, heads, N), in their dtype.

        Raises:
            ValueError: `option`, "decay" say, has a value that needs hidden states, and there are none.
        """
        if hidden is None:
            raise ValueError(f'{option}="{value}" is computed from the hidden states that enter the layer, and none were seen to enter it.')
        read = F.linear(hidden, getattr(self, name).to(hidden.dtype)).mT
        if torch.compiler.is_compiling():  # the gradient of a transposed one is traced with other strides than it has (torch 2.13)
            read = read.contiguous()
        return read

    def at_rest(self) -> dict[str, Tensor]:
        """What to attend with where the hidden states are zeros: (heads,) each, and matrices."""
        hidden = torch.zeros(1, 1, self.hidden_size) if self.hidden_size else None
        return {name: number if name in self.matrices else number.flatten() for name, number in self(hidden).items()}

    def tensors(self) -> tuple[Tensor, ...] | None:
        """All that the numbers are made of; None where it is not known, for others have a say: parametrizations, or hooks."""
        if self._modules or self._forward_hooks or self._forward_pre_hooks:
            return None
        return *self._parameters.values(), *self._buffers.values()  # type: ignore[arg-type]

    def keep_hidden_states(self, attention: nn.Module) -> None:
        """Has `attention` leave the hidden states that enter it here, where something is computed from them."""
        if self.hidden_size:
            attention.register_forward_pre_hook(hand_on_what_enters, with_kwargs=True)

    def leave_hidden_states(self, hidden: Tensor) -> None:
        """What enters the layer's attention, for `take_hidden_states`."""
        if torch.compiler.is_compiling():
            self.traced[:] = [hidden] * self.readers
        else:
            self.entered[get_ident()] = [hidden] * self.readers

    def take_hidden_states(self) -> Tensor | None:
        """The hidden states (B, N, hidden_size) that entered the layer's attention, once for each reader; None where nothing is computed
        from them."""
        if not self.hidden_size:
            return None
        if not torch.compiler.is_compiling() and (thread := get_ident()) in self.entered:
            entered = self.entered[thread]
            hidden = entered.pop()
            if not entered:
                del self.entered[thread]
            return hidden
        return self.traced.pop() if self.traced else None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is saved, has seen nothing: where a call was refused midway, what entered is here still."""
        return self.__dict__ | {"entered": {}, "traced": []}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinAttnParams:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != torch.float32:  # model.to(torch.bfloat16) is meant for the weights
                setattr(self, name, before[name].to(buffer.device))
        return self

    def extra_repr(self) -> str:
        return ", ".join((*self.names, *self.matrices))


def refuse_unread(option: str, learnable: bool, hidden_size: int | None, value: str = "token") -> None:
    """Raises ValueError where what is to be read off the hidden states is not to be learned, or their width is not known."""
    if not learnable:
        raise ValueError(f'linattn option {option}="{value}" is learned from the hidden states, so it needs learnable=true.')
    if not hidden_size:
        raise ValueError(f'linattn option {option}="{value}" needs to know the width of the hidden states that enter the layer.')


def hand_on_what_enters(attention: Any, args: Any, kwargs: Any) -> None:
    # Transformers' attention interface passes no hidden states on. A method and no attribute: PEFT's modules_to_save wraps the parameters,
    # and hands on what is called, not what is set.
    attention.linattn.leave_hidden_states(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
