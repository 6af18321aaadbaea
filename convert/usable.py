"""Whether what lies beside the weights can be used with them: the tokenizer and the generation settings load, and fit the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from convert.companions import named_code
from convert.errors import ConversionError, stage

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_usable(folder: Path, model: Any) -> str | None:
    """Loads what ``folder`` holds for ``model``.

    Returns:
        The tokenizer's class; None where there is none, or it comes with code of its own, which is not run.

    Raises:
        ConversionError: something does not load, or has ids that ``model`` has no embedding for.
    """
    size = model.get_input_embeddings().weight.shape[0]
    _check_ids("config.json", model.config.get_text_config(), size)
    if (folder / "generation_config.json").is_file():
        with stage("loading generation_config.json", "mend it in the source, or take it out; nothing was kept"):
            settings = GenerationConfig.from_pretrained(folder)
        _check_ids("generation_config.json", settings, size)
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER) or named_code(folder, "tokenizer_config.json"):
        return None
    with stage("loading the tokenizer", "mend its files in the source, or take them out; nothing was kept"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= size:
        raise ConversionError(
            f"the tokenizer has ids up to {largest}, and the model has embeddings for 0 to {size - 1}: they do not belong together; "
            "nothing was kept"
        )
    return type(tokenizer).__name__


def _check_ids(where: str, settings: Any, size: int) -> None:
    for name in _SPECIAL:
        given = getattr(settings, name, None)
        for token in given if isinstance(given, list) else [given]:
            if isinstance(token, int) and not -1 <= token < size:  # -1 is how some say that there is none
                raise ConversionError(f"{where}: {name} is {token}, and the vocabulary ends at {size - 1}; nothing was kept")
