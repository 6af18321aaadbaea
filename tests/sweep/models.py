"""The classes that are swept, and one tiny model of each under any attention implementation, always with the same weights."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from sweep import tiny
from sweep.inputs import candidates
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_linattn.config import PREFIX

CAUSAL, MASKED, BASE = "causal", "masked", "base"
AUTO: dict[str, Any] = {CAUSAL: AutoModelForCausalLM, MASKED: AutoModelForMaskedLM, BASE: AutoModel}


@dataclass(frozen=True)
class Case:
    """One architecture: its model type, and the Auto class that makes its model."""

    model_type: str
    kind: str


def all_cases() -> list[Case]:
    """Every causal class, then every other class: with a masked-LM head where there is one, else the base model."""
    causal = [name for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not name.startswith(PREFIX)]
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    known = [name for name in {**masked, **modeling_auto.MODEL_MAPPING_NAMES} if not name.startswith(PREFIX)]
    others = [name for name in known if name not in causal]
    both = [name for name in masked if name in causal]  # BERT and its kin are encoders first
    return [Case(name, CAUSAL) for name in causal] + [Case(name, MASKED if name in masked else BASE) for name in sorted(others + both)]


NOT_ALONE = "a drafter: it reads the keys and values of its main model"
CODE_BOOKS = "AutoModelForCausalLM cannot make it from its configuration: a decoder of several codes at once"
REASONS = {
    "mimi": "ends in the whole numbers of a codec, which do not tell one attention from another; its encoder and decoder have rows",
    "gemma4_assistant": NOT_ALONE,
    "gemma4_unified_assistant": NOT_ALONE,
    "muse_glimmer_assistant": NOT_ALONE,
    "musicgen": CODE_BOOKS,
    "musicgen_melody": CODE_BOOKS,
    "voxtral_realtime_text": "Transformers names a class for it, VoxtralRealtimeTextModel, that it has not",
}
"""Model types that cannot be tried, and why."""


class Family:
    """Models of one case under different attention implementations, with the same random weights."""

    def __init__(self, case: Case) -> None:
        self.case = case
        if case.model_type in REASONS:
            raise ValueError(REASONS[case.model_type])
        self.config = tiny.tiny_config(case.model_type)
        self._auto = AUTO[case.kind]
        if case.kind == CAUSAL:
            _as_decoder(self.config)
        self.weights: dict[str, Tensor] = {}
        softmax = self._make("eager")
        randomize(softmax)
        self.weights = softmax.state_dict()
        self.class_name = type(softmax).__name__
        self.parameters = list(inspect.signature(softmax.forward).parameters)
        self.main_input = softmax.main_input_name
        self._no_sdpa = False
        self._models = {"eager": softmax}

    def model(self, implementation: str) -> PreTrainedModel:
        """The model under an attention implementation, in evaluation mode."""
        if implementation not in self._models:
            made = self._make(implementation)
            made.load_state_dict(self.weights)
            self._models[implementation] = made
        return self._models[implementation]

    def softmax(self) -> PreTrainedModel:
        """The softmax form: SDPA, or eager where the architecture has no other."""
        if not self._no_sdpa:
            try:
                return self.model("sdpa")
            except ValueError:
                self._no_sdpa = True
        return self.model("eager")

    @property
    def has_attention(self) -> bool:
        names = {type(module).__name__ for module in self.model("eager").modules()}
        return any(part in name for name in names for part in ("Attention", "Attn", "MLA"))

    def _make(self, implementation: str) -> PreTrainedModel:
        torch.manual_seed(0)
        return self._auto.from_config(copy.deepcopy(self.config), attn_implementation=implementation).eval()

    def takes(self, name: str) -> bool:
        return name in self.parameters

    @property
    def decodes(self) -> bool:
        """Whether the model reads a text from left to right and keeps a cache of it."""
        if self.case.kind == MASKED or self.config.is_encoder_decoder or self.main_input != "input_ids":
            return False
        return self.case.kind == CAUSAL or (self.takes("past_key_values") and self.takes("use_cache"))

    @property
    def without_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if self.takes("use_cache") else {}

    def inputs(self) -> dict[str, Any]:
        """Random inputs that the softmax form takes.

        Raises:
            ValueError: it takes none of those that were made; the last error is the cause.
        """
        torch.manual_seed(1)
        last: Exception | None = None
        for made in candidates(self.config, self.main_input, self.parameters):
            try:
                with torch.no_grad():
                    self.softmax()(**made, **self.without_cache)
                return made
            except Exception as error:
                last = last or error
        raise ValueError(f"{self.main_input}: {last}") from last


def _as_decoder(config: PreTrainedConfig) -> None:
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "is_decoder"):
            part.is_decoder = True


def randomize(model: PreTrainedModel) -> None:
    """Weights that make every part matter: unit gain, and nothing left at 0 or 1."""
    generator = torch.Generator().manual_seed(2)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.unique().numel() == 1 and 0 < parameter.abs().max() <= 0.1:
                parameter.fill_(1.0)  # what scales a whole layer away
            if id(parameter) in embeddings:
                parameter.copy_(noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise * max(parameter.shape[1:]) ** -0.5)
            else:
                parameter.add_(0.1 * noise)
