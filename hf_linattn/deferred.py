"""Whether a text has ended is read off a GPU a token late, so that the next token is already on its way.

Transformers has this, its `DeferredStopCheck`, and asks for it on Apple's GPUs alone. Without it the device waits at every token while the
host comes back from the last one and prepares the next, a fifth of the time of a compiled step. With it the loop runs once more than it
has to where all sequences ended before the greatest length, and Transformers takes that token back. It is asked for here where nobody can
tell: no cache is returned, which would hold that token too, and nothing of the user's own is called at each token but a streamer, which is
given every token and no other. Where tokens are drawn, the generator of random numbers is put back to where it was, and a streamer is not
the user's own, which might draw of it between two tokens. A table of positions must have no end that one token more could pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrefixConstrainedLogitsProcessor, SynthIDTextWatermarkLogitsProcessor
from transformers.generation import utils

from .compiled import only_computes

DEVICES = ("cuda",)
_running = threading.local()
"""`unseen`: whether nobody can tell that the text that begins had one token more; `draws`: whether it takes random numbers."""
_TELL = PrefixConstrainedLogitsProcessor, SynthIDTextWatermarkLogitsProcessor
"""Transformers' own that call the user's, or remember their calls until the next text."""
_Theirs: Any = utils.DeferredStopCheck


class DeferredStopCheck(_Theirs):  # type: ignore[misc]
    """Transformers' own, on other devices as well, and without a trace in the generator of random numbers."""

    def __init__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> None:
        super().__init__(input_ids, *args, **kwargs)
        puts_back = input_ids.device.type in DEVICES and getattr(_running, "draws", False)
        self.generator = _generator(input_ids.device) if puts_back else None
        self.drawn: list[Tensor] = []  # the generator's states after the last two tokens

    @staticmethod
    def is_supported(device: torch.device, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
        if _Theirs.is_supported(device, cache, cache_is_returned, is_assistant):
            return True
        is_unseen, _running.unseen = _may_have_one_more(), False  # of this text, and of none that its streamer generates meanwhile
        return is_unseen and device.type in DEVICES and not cache_is_returned and not is_assistant

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        if self.generator is not None:
            self.drawn = [*self.drawn[-1:], self.generator.get_state()]
        return super().__call__(*args, **kwargs)  # type: ignore[no-any-return]

    def finish(self) -> int:
        undone: int = super().finish()
        if undone and self.generator is not None:
            self.generator.set_state(self.drawn[0])
        return undone


def is_unseen(model: nn.Module, logits_processor: Any = (None,), stopping_criteria: Any = (None,), synced_gpus: bool = False,
              streamer: Any = None, **others: Any) -> bool:  # fmt: skip
    """Whether nothing but Transformers' own is called at each token, processors of logits, criteria to stop by, hooks, and any position
    will do."""
    called = [*logits_processor, *stopping_criteria]
    if streamer is not None and draws(model, **others):
        called.append(streamer)
    return not synced_gpus and all(map(_is_transformers, called)) and only_computes(model) and not _looks_positions_up(model)


def _looks_positions_up(model: nn.Module) -> bool:
    """Whether there is a table besides that of tokens: of positions, as GPT-2's, behind whose end a GPU's program comes to its own."""
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    return any(isinstance(module, nn.Embedding) and module is not tokens for module in model.modules())


def _is_transformers(called: Any) -> bool:
    return type(called).__module__.startswith("transformers.") and not isinstance(called, _TELL)


def draws(model: nn.Module, generation_config: Any = None, **others: Any) -> bool:
    """Whether a text takes numbers of the generator. Where it does not, those that others take meanwhile are theirs."""
    return model.training or generation_config is None or bool(generation_config.do_sample)


@contextmanager
def one_more(is_unseen: bool, draws: bool) -> Iterator[None]:
    """The next text of this thread may have one token more, where nobody can tell."""
    around, _running.unseen, _running.draws = _may_have_one_more(), is_unseen, draws
    try:
        yield
    finally:
        _running.unseen = around


def _may_have_one_more() -> bool:
    return getattr(_running, "unseen", False)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


def install() -> None:
    """Makes `generate` ask here."""
    utils.DeferredStopCheck = DeferredStopCheck  # type: ignore[misc]
