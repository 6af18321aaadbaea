"""The tokenizer of a checkpoint, and the token that stands in front of every document."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recipes.common.blame import naming_the_key
from recipes.common.checkpoint import open_tokenizer, read_config
from recipes.common.errors import RecipeError, sentence


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or hub id, or a bare tokenizer.json."""
    bare = Path(name).is_file()
    folder = Path(name) if bare else open_tokenizer(name)
    try:
        if bare:
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_file=name)
            if "<|endoftext|>" in tokenizer.get_vocab():
                tokenizer.add_special_tokens({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
        else:
            where = folder / "config.json"  # which tells the tokenizer's class
            with naming_the_key(read_config(folder, name), where) if where.is_file() else nullcontext():
                tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except RecipeError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise RecipeError(
            f"{name}: no tokenizer can be loaded from it ({sentence(error)}); give a checkpoint or a tokenizer.json"
        ) from None
    start_token(tokenizer)
    return tokenizer


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that stands in front of every document."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise RecipeError(
            "the tokenizer has neither a bos nor an eos token, one of which must mark where a story starts; set bos_token in it"
        )
    return int(token)
