"""Which layers matter: the teacher with some of its layers under an untrained window, measured by loss and by recall.

What a layer put under a window costs is told in nats a token, twice: KL to the teacher on text, and the likelihood of keys that lie far
outside the window, taught token by token. Both are 0 where nothing is lost, so their sum can be compared between sets of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from convert.errors import ConversionError
from convert.evaluation.prompts import Prompt
from convert.evaluation.windows import put_under_window, windowed
from hf_linattn.models import attention_modules
from recipes.common.reading import read_json, user_path

_MASS = "linattn_attention_mass"


@dataclass(frozen=True)
class Damage:
    """What a set of layers under a window loses.

    Attributes:
        kl: KL(teacher, it) on text, nats a token.
        key_nats: of the keys' tokens, given those before.
        hits: share of keys whose every token is the likeliest.
    """

    kl: float
    key_nats: float
    hits: float


class Selection:
    """Measures sets of layers.

    Args:
        model: the teacher, softmax over all tokens.
        tokenizer: its own.
        text: int64 (R, N).
        prompts: asking for keys.
        window, sinks: what a layer that does not stay softmax sees.
        batch_tokens: tokens at a time.
    """

    def __init__(self, model: Any, tokenizer: Any, text: Tensor, prompts: list[Prompt], window: int, sinks: int, batch_tokens: int) -> None:
        self.model, self.batch_tokens, self.window = windowed(model, window, sinks, ()), batch_tokens, (window, sinks)
        self.layers = [module.layer_idx for _, module in attention_modules(model)]
        self.text = list(text.to(model.device).split(max(batch_tokens // text.shape[1], 1)))
        self.keys = list(_taught(prompts, tokenizer, batch_tokens, model.device))
        with torch.no_grad():
            self.truth = [self._logits(ids) for ids in self.text]

    @torch.no_grad()
    def damage(self, under_window: Collection[int]) -> Damage:
        """Of these layers under the window and the others as they are."""
        put_under_window(self.model, *self.window, under_window)
        kl, nats, right = [], [], []
        for ids, truth in zip(self.text, self.truth, strict=True):
            kl += [_divergence(*rows) for rows in zip(truth, self._logits(ids), strict=True)]
        for ids, answers in self.keys:
            length = answers.shape[1]
            log_p = self.model(input_ids=ids, use_cache=False, logits_to_keep=length + 1).logits[:, :-1].float().log_softmax(-1)
            there = answers >= 0
            of_key = log_p.gather(2, answers.clamp(min=0)[..., None])[..., 0]
            nats += (-(of_key * there).sum(1) / there.sum(1)).tolist()
            right += ((log_p.argmax(-1) == answers) | ~there).all(1).float().tolist()
        return Damage(_mean(kl), _mean(nats), _mean(right))

    def _logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def choose(
    selection: Selection, count: int, candidates: int, weight: float, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The layers that stay softmax: the rest go under the window one by one, each time the one that is missed least.

    Each layer alone first; those that cost least by themselves go together, until ``candidates`` are left.

    Args:
        weight: of a key's nats beside those of text.

    Returns:
        ``layers``, each layer alone; ``teacher``, none; ``chosen``; ``steps``, which layer went when; ``sets``: what the chosen layers
        lose, evenly spaced ones, and those that cost most by themselves.
    """
    base = selection.damage(())

    def cost(damage: Damage) -> float:
        return damage.kl + weight * max(damage.key_nats - base.key_nats, 0.0)

    alone = {}
    for layer in selection.layers:
        alone[layer] = selection.damage((layer,))
        tell(f"layer {layer} under the window: KL {alone[layer].kl:.3f}, key {alone[layer].key_nats:.3f}, right {alone[layer].hits:.2f}")
    ranked = sorted(selection.layers, key=lambda layer: -cost(alone[layer]))
    kept, steps = ranked[: max(candidates, count)], []
    while len(kept) > count:
        tried = {layer: selection.damage([other for other in selection.layers if other == layer or other not in kept]) for layer in kept}
        least = min(kept, key=lambda layer: cost(tried[layer]))
        kept.remove(least)
        steps.append({"layer": least, **vars(tried[least])})
        tell(f"layer {least} is missed least; {len(kept)} stay: KL {tried[least].kl:.3f}, key {tried[least].key_nats:.3f}")
    sets = {"chosen": sorted(kept), "even": evenly_spaced(selection.layers, count), "alone": sorted(ranked[:count])}
    return {
        "layers": [{"layer": layer, **vars(alone[layer]), "cost": cost(alone[layer])} for layer in selection.layers],
        "teacher": vars(base),
        "chosen": sets["chosen"],
        "steps": steps,
        "sets": [{"name": name, "softmax": kept, **vars(_of_set(selection, kept))} for name, kept in sets.items()],
    }


def read_ranking(path: Path) -> dict[str, Any]:
    """What `choose` found, out of a file.

    Raises:
        ConversionError: it is none, or was made by attention alone.
    """
    ranking = read_json(user_path(path))
    layers = ranking.get("layers") if isinstance(ranking, dict) else None
    right = isinstance(layers, list) and all(isinstance(one, dict) and {"layer", "kl", "key_nats", "hits"} <= set(one) for one in layers)
    if not right or not isinstance(ranking.get("teacher"), dict) or not isinstance(ranking.get("chosen"), list):
        raise ConversionError(f"{path} does not hold what layers lose alone; give the file that linattn select-layers wrote")
    return dict(ranking)


def evenly_spaced(layers: Sequence[int], count: int) -> list[int]:
    """Of layers with attention the middle ones of ``count`` equal parts."""
    return [layers[(2 * index + 1) * len(layers) // (2 * count)] for index in range(count)]


@torch.no_grad()
def attention_on_keys(model: Any, prompts: list[Prompt], tokens: int, batch_tokens: int) -> list[dict[str, Any]]:
    """The cheap way: of each layer and head the attention that the end of a question pays to the last ``tokens`` tokens of the remark
    asked for, the mean over prompts. One pass; heads that retrieve pay most of theirs."""
    sums: dict[int, Any] = {}
    before = model.config._attn_implementation
    modules = [module for _, module in attention_modules(model)]
    size = max(batch_tokens // len(prompts[0].ids), 1)
    model.set_attn_implementation(_MASS)
    try:
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            places = torch.tensor([prompt.place for prompt in batch], device=model.device)
            for module in modules:
                module.asked_for = places, tokens
            model(input_ids=torch.tensor([prompt.ids for prompt in batch], device=model.device), use_cache=False, logits_to_keep=1)
            for module in modules:
                sums[module.layer_idx] = sums.get(module.layer_idx, 0) + module.mass
    finally:
        for module in modules:
            module.__dict__.pop("asked_for", None)
            module.__dict__.pop("mass", None)
        model.set_attn_implementation(before)
    return [{"layer": layer, "heads": (total / len(prompts)).tolist()} for layer, total in sums.items()]


def _of_set(selection: Selection, kept: Collection[int]) -> Damage:
    return selection.damage([layer for layer in selection.layers if layer not in kept])


def _taught(prompts: list[Prompt], tokenizer: Any, batch_tokens: int, device: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Prompts of one length with their answers behind them, ids (B, N), and the answers' tokens (B, A), -1 where one is shorter."""
    lengths = sorted({len(prompt.ids) for prompt in prompts})
    for length in lengths:
        alike = [prompt for prompt in prompts if len(prompt.ids) == length]
        answers = [tokenizer(f" {prompt.answer}", add_special_tokens=False)["input_ids"] for prompt in alike]
        longest = max(map(len, answers))
        padded = torch.tensor([answer + [-1] * (longest - len(answer)) for answer in answers], device=device)
        ids = torch.cat([torch.tensor([prompt.ids for prompt in alike], device=device), padded.clamp(min=0)], 1)
        size = max(batch_tokens // ids.shape[1], 1)
        yield from zip(ids.split(size), padded.split(size), strict=True)


def _divergence(truth: Tensor, logits: Tensor) -> float:
    """KL(truth, what is found), the mean over a row's tokens, in float32; logits (N, V)."""
    log_t, log_p = truth.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (log_t.exp() * (log_t - log_p)).sum(-1).mean().item()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _attention_with_mass(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """SDPA's; beside it what the last query (B, H, D) pays to the keys (B, Hk, N, D) just before each row's place."""
    places, tokens = module.asked_for
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    grouped = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    paid = (query[:, :, -1:].float() @ grouped.float().transpose(2, 3) * scaling).softmax(-1)[:, :, 0]
    back = places[:, None] - torch.arange(key.shape[2], device=key.device)
    module.mass = (paid * ((back > 0) & (back <= tokens))[:, None]).sum(-1).sum(0)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_MASS, _attention_with_mass)
AttentionMaskInterface.register(_MASS, sdpa_mask)
