"""Tiny random models of one byte a token, with their tokenizer."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

START = "<|endoftext|>"
TOKENS = 257
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token 0 starts a document, and every byte is one of the others.

    As many tokenizers do, it begins every text with a token of its own where it is not told to leave special tokens out.
    """
    alphabet = [START, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START)


def byte_model(seed: int = 0, **changes: int) -> LlamaForCausalLM:
    """A random model of those tokens, with weights large enough that attention matters."""
    torch.manual_seed(seed)
    config = {"vocab_size": TOKENS, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 512, **SIZES, **changes}
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model
