"""The model of a run: from a checkpoint, or made from a config."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import hf_linattn
from recipes.common.checkpoint import check_size
from recipes.common.errors import RecipeError, sentence
from recipes.common.loading import load_causal_lm
from recipes.common.tokenizing import start_token


def load_model(
    name: str,
    *,
    attn_implementation: str | None = None,
    linattn: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """`load_causal_lm`, with changes to the checkpoint's config.

    Args:
        attn_implementation: None keeps what the checkpoint says.
        linattn: values laid over the checkpoint's `config.linattn`.
        overrides: values of other config keys.
    """

    def change(config: PretrainedConfig) -> None:
        _change(config, overrides or {}, linattn or {}, name)

    return load_causal_lm(name, attn_implementation=attn_implementation, dtype=dtype, change=change)


def new_model(
    model_type: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    attn_implementation: str | None,
    linattn: dict[str, Any],
    settings: dict[str, Any],
) -> PreTrainedModel:
    """A causal language model with random weights; the vocabulary's size and special tokens are the tokenizer's unless `settings` says."""
    known = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        config = AutoConfig.for_model(model_type)
    except ValueError:
        raise RecipeError(f"model_type: {model_type!r} is no model of Transformers; give one such as llama or gpt_neox") from None
    _change(config, {**known, **settings}, linattn, "model_config")
    if config.vocab_size < len(tokenizer):
        raise RecipeError(f"model_config: vocab_size {config.vocab_size} is less than the tokenizer's {len(tokenizer)}; leave it out")

    # The config is built anew so that what follows from a setting (such as head_dim from hidden_size) follows.
    def build() -> PreTrainedModel:
        fresh = AutoConfig.for_model(model_type, **{**known, **settings}, **({"linattn": linattn} if linattn else {}))
        return AutoModelForCausalLM.from_config(
            fresh, attn_implementation=attn_implementation, dtype=torch.float32, trust_remote_code=False
        )

    check_size(getattr(config, "num_hidden_layers", None), build, f"model_config: a {model_type} model")
    try:
        return build()
    except Exception as error:  # missing backends and memory
        raise RecipeError(f"model_config: no {model_type} model can be made of it ({sentence(error)})") from None


def is_linear(model: PreTrainedModel) -> bool:
    """Whether the model's attention is the plugin's."""
    return model.config._attn_implementation == "linattn"


def check_length(model: PreTrainedModel, length: int, what: str = "length") -> None:
    """Raise RecipeError where `length` tokens are more than the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise RecipeError(
            f"{what} {length} is more than the model's {positions} positions; lower it or set model_config.max_position_embeddings"
        )


def go_on(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """The model's greedy continuation of a story's beginning, up to `tokens` tokens or the end of the story."""
    start = start_token(tokenizer)
    ids = torch.tensor([[start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]], device=model.device)
    ends = sorted({start, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=start,
    )
    whole, given = (str(tokenizer.decode(x, skip_special_tokens=True)) for x in (out[0], ids[0]))
    return whole[len(given) :]


def _change(config: PretrainedConfig, overrides: dict[str, Any], linattn: dict[str, Any], where: str) -> None:
    known = config.to_dict()
    for key, value in overrides.items():
        if key not in known and not hasattr(config, key):
            close = difflib.get_close_matches(key, known, n=1)
            raise RecipeError(
                f"{where}: {key!r} is no key of a {config.model_type} config" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        setattr(config, key, value)
    if linattn:
        config.linattn = {**(getattr(config, "linattn", None) or {}), **linattn}
        try:
            hf_linattn.LinAttnConfig.of(config)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"linattn: {sentence(error)}") from None
