"""The model card of a converted checkpoint: what it is, and what nobody has measured yet."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from convert.source import Source


def model_card(source: Source, config: Any, report: dict[str, Any]) -> str:
    """README.md of the converted checkpoint, with its metadata.

    Args:
        source: what was converted.
        config: the converted configuration.
        report: the content of conversion.json.
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
    return f"---\n{data.to_yaml()}\n---\n\n{_body(source, config, report)}"


def _body(source: Source, config: Any, report: dict[str, Any]) -> str:
    options, parameters = config.linattn, report["parameters"]
    kept, name = options["softmax_layers"], source.hub_id or source.folder.name
    layers = f"{config.num_hidden_layers - len(kept)} of {config.num_hidden_layers} layers are linear"
    kept_text = f" (layers {', '.join(map(str, kept))} keep softmax attention)" if kept else ""
    formula = "a + b s" if options["kernel"] == "linear" else "a + b s + c s^2"
    decay = ", with a decay learned per query head" if options["decay"] == "head" and options["learnable"] else ""
    lost = "".join(
        f"- `{item['what']}` ({item['value']}) is dropped from layers {_ranges(item['layers'])}: {item['note']}.\n"
        for item in report["dropped"]
    )
    return f"""# {name}, with linear attention

This checkpoint was converted from `{name}` with `hf_linattn` and **has not been trained since**. Its weights are the source's, and
its attention is another function, so it predicts far worse than the source until it is fine-tuned. Quality has not been measured.

- Attention weights are f(s) = {formula}, normalised, of s = temperature times the cosine of query and key{decay}; {layers}{kept_text}.
- {parameters["added"]:,} parameters were added to {parameters["source"]:,}. `conversion.json` holds all options and starting values.
- Generation keeps a state of constant size in each linear layer instead of a growing key-value cache.
{lost}
## Use

```python
import hf_linattn  # registers the architecture; or pass trust_remote_code=True, with the package installed
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

For licence, training data, intended use and limits, see the source's own card.
"""


def _source_metadata(source: Source) -> dict[str, Any]:
    path = source.folder / "README.md"
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
