"""Recall by generated tokens: whether a model, going on greedily through its own cache, says what was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from convert.evaluation.prompts import Prompt
from recipes.common.tokenizing import start_token

_MORE = 2  # tokens beyond those of the answer: it may be cut into others than ours, and must end where the answer does


@torch.no_grad()
def measure_recall(model: Any, tokenizer: Any, prompts: Sequence[Prompt], batch: int) -> dict[str, Any]:
    """How many of the prompts, all of one length, are answered: the whole answer, and nothing that goes on from it.

    Returns:
        ``right``, the share of whole answers in [0, 1]; its standard error ``right_error``; ``hits``, one 0 or 1 a prompt;
        ``answers``, the first five that were generated.
    """
    answers = [len(tokenizer(f" {prompt.answer}", add_special_tokens=False)["input_ids"]) for prompt in prompts]
    texts: list[str] = []
    for start in range(0, len(prompts), batch):
        ids = torch.tensor([prompt.ids for prompt in prompts[start : start + batch]], device=model.device)
        texts += generated(model, tokenizer, ids, max(answers) + _MORE)
    hits = [int(is_answer(text, prompt.answer)) for text, prompt in zip(texts, prompts, strict=True)]
    right = sum(hits) / len(hits)
    return {"right": right, "right_error": (right * (1 - right) / len(hits)) ** 0.5, "hits": hits, "answers": texts[:5]}


def generated(model: Any, tokenizer: Any, ids: torch.Tensor, tokens: int) -> list[str]:
    """What follows each row of ``ids`` (B, N), greedily."""
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, num_beams=1, use_cache=True, pad_token_id=start_token(tokenizer))
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return list(tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))


def is_answer(text: str, answer: str) -> bool:
    """Whether ``text`` begins with ``answer``, after blanks, and with no longer word or number."""
    return re.match(rf"\s*{re.escape(answer)}(?!\w)", text) is not None
