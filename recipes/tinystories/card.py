"""The model card of what a training leaves: what it is, what it was trained on, what was measured of it and what was not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from hf_linattn import LinAttnConfig
from recipes.common.reading import user_path
from recipes.tinystories.model import is_linear
from recipes.tinystories.settings import COMMAND, Settings


def model_card(settings: Settings, model: PreTrainedModel, tokens: int, records: Sequence[dict[str, Any]]) -> str:
    """README.md of the trained model, with its metadata.

    Args:
        settings: of the run.
        model: as it is now.
        tokens: that it was trained on.
        records: of the run's metrics.jsonl.
    """
    s, linear = settings, is_linear(model)
    data = ModelCardData(
        base_model=s.model if s.model and not user_path(s.model).exists() else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["linear-attention", "linattn"] if linear else None,
    )
    kind = f"A language model, trained from `{_name(s.model)}`" if s.model else f"A {s.model_type} model, trained from random weights"
    aim = f"to match the predictions of `{_name(s.teacher)}`" if s.teacher else "by the cross-entropy of the text"
    if s.teacher and s.teacher_weight < 1:
        aim += f" ({s.teacher_weight:g} of the loss) and by the cross-entropy of the text"
    texts = ", ".join(f"`{_name(one)}`" for one in s.train_data)
    load = "import hf_linattn  # registers the attention\n" if linear else ""
    return f"""---
{data.to_yaml()}
---

# {_name(s.output)}

{kind} {aim}, by `{COMMAND}` of `hf_linattn`: {tokens:,} tokens of {texts}.

- {_attention(model)} {model.num_parameters():,} parameters in all.
- {_measured(records)} Nothing else was measured.
- All settings are in `config.yaml` beside the folder of this model, every loss in `metrics.jsonl`.

```python
{load}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Licence, intended use and limits are those of the text and of what it began from.
"""


def _attention(model: PreTrainedModel) -> str:
    if not is_linear(model):
        return "Its attention is softmax."
    options = LinAttnConfig.of(model.config)
    kept = f"; of {model.config.num_hidden_layers} layers {len(options.softmax_layers)} keep softmax" if options.softmax_layers else ""
    return f"Its attention weights are {options.attention.formula(options.learnable)}{kept}."


def _measured(records: Sequence[dict[str, Any]]) -> str:
    losses = [record["valid_loss"] for record in records if record.get("valid_loss") is not None]
    if not losses:
        return "How well it predicts was not measured."
    return f"Loss on text kept out of this training: {losses[0]:.4f} nats a token before it, {losses[-1]:.4f} after."


def _name(path: str | None) -> str:
    """A hub id as it is, of a place on this machine its last part; of a run's model/ the run's."""
    place = user_path(str(path))
    if not place.exists():
        return str(path)
    parts = [part for part in place.resolve().parts if part != "model"]
    return parts[-1]
