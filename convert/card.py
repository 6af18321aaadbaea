"""The model card of a converted checkpoint: what it is, and what has been measured of it, or that nothing has."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from convert.costs import Costs
from convert.source import Source
from hf_linattn.config import LinAttnConfig, attention_layers
from recipes.common.reading import not_outside

_INSTALLED = """The package is on no index: install a wheel of it (`pip install hf_linattn-*.whl`), or its
checkout (`pip install .` in it), with nvcc at hand for its CUDA kernels."""
_UNMEASURED, _MEASURED = "How well it predicts now has not been measured.", "How well it predicts now is told below."
_BEGIN, _END = "<!-- convert.evaluate: begin -->", "<!-- convert.evaluate: end -->"


def model_card(source: Source, config: Any, report: dict[str, Any], costs: Costs) -> str:
    """README.md of the converted checkpoint, with its metadata.

    Args:
        source: what was converted.
        config: the converted configuration.
        report: the content of conversion.json.
        costs: what generating takes.
    """
    inherited = _source_metadata(source)
    data = ModelCardData(
        base_model=source.hub_id,
        library_name="transformers",
        pipeline_tag="text-generation" if "ForCausalLM" in config.architectures[0] else None,
        license=inherited.get("license"),
        language=inherited.get("language"),
        tags=["linear-attention", "linattn"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(source, config, report, costs)}"


def with_evaluation(card: str, section: str) -> str:
    """A card with this section in place of the one it had, or at its end, between marks by which it is found again."""
    card, section = card.replace(_UNMEASURED, _MEASURED), f"{_BEGIN}\n\n{section}\n\n{_END}"
    begin, end = card.find(_BEGIN), card.find(_END)
    if 0 <= begin < end:
        return card[:begin] + section + card[end + len(_END) :]
    return f"{card.rstrip()}\n\n{section}\n"


def without_evaluation(card: str) -> str:
    """A card without that section: of a model that is trained further, whose figures it will not be."""
    begin, end = card.find(_BEGIN), card.find(_END)
    if not 0 <= begin < end:
        return card
    return f"{card[:begin].rstrip()}\n\n{card[end + len(_END) :].lstrip()}".rstrip().replace(_MEASURED, _UNMEASURED) + "\n"


def _body(source: Source, config: Any, report: dict[str, Any], costs: Costs) -> str:
    options, parameters = config.linattn, report["parameters"]
    kept, name = options["softmax_layers"], source.hub_id or source.folder.name
    count = len(attention_layers(config))
    which = "layers" if count == config.num_hidden_layers else "layers with attention"
    layers = f"{count - len(kept)} of {count} {which} are linear"
    kept_text = f"; layers {_ranges(kept)} keep softmax attention and a growing key-value cache" if kept else ""
    formula = LinAttnConfig(**options).attention.formula(options["learnable"])
    cast = report["options"].get("dtype")
    weights = f"Its weights are the source's, cast to {cast}," if cast else "Its weights are the source's,"
    lost = "".join(
        f"- `{item['what']}` ({item['value']}) is dropped from layers {_ranges(item['layers'])}: {item['note']}.\n"
        for item in report["dropped"]
    )
    return f"""# {name}, with linear attention

This checkpoint was converted from `{name}` with `hf_linattn` and **has not been trained since**. {weights} and its attention is another
function: it has to be fine-tuned before it predicts well. {_UNMEASURED}

- Attention weights are {formula}; {layers}{kept_text}.
- {parameters["added"]:,} parameters were added to {parameters["source"]:,}. `conversion.json` holds all options and starting values.
- Generating takes {costs.sentence()}
{lost}
## Use

```python
import hf_linattn  # registers the architecture; or pass trust_remote_code=True, with the package installed
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

It was made by `hf_linattn` {report["versions"]["hf_linattn"]}. {_INSTALLED}

For licence, training data, intended use and limits, see the source's own card.
"""


def _source_metadata(source: Source) -> dict[str, Any]:
    path = not_outside(source.folder, source.folder / "README.md")
    if not path.is_file():
        return {}
    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # A source's malformed card is no reason not to convert it.
        return {}


def _ranges(layers: list[int]) -> str:
    """0-3, 5 for [0, 1, 2, 3, 5]."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
