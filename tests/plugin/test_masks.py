"""Masks are read: who sees whom, who is padding and what came before, against a quadratic form under the mask itself."""

import copy
import itertools

import pytest
import torch
from tiny_models import SIZES, TEXT, tiny_model, tiny_tokens
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BeitConfig,
    BeitModel,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
    masking_utils,
)
from transformers.models.auto import modeling_auto

from hf_linattn import calls, told
from hf_linattn import mask as mask_module
from hf_linattn.attention import linattn_attention
from hf_linattn.counted import digest, joined
from hf_linattn.mask import linattn_mask
from hf_linattn.pattern import unpack

LEAST = torch.finfo(torch.float32).min


def by_the_mask(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs):
    """The weights 1 + cos(q, k) of the default options, every pair of them, where the mask lets a query see a key."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    weights = 1 + nn.functional.normalize(query, dim=-1) @ nn.functional.normalize(key, dim=-1).mT
    if attention_mask is None and kwargs.get("is_causal", getattr(module, "is_causal", True)):
        attention_mask = torch.ones(weights.shape[-2:], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    if attention_mask is not None:
        weights = weights * (attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0)
    return (weights @ value / weights.sum(-1, keepdim=True).clamp(min=1e-6)).transpose(1, 2), None


AttentionInterface.register("by_the_mask", by_the_mask)
AttentionMaskInterface.register(
    "by_the_mask",
    lambda **kwargs: masking_utils.sdpa_mask(**kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}),
)


def quadratic(model: PreTrainedModel, *args, **kwargs) -> Tensor:
    """What the model gives when every pair of tokens is weighed under its own (N, N) mask."""
    model.set_attn_implementation("by_the_mask")
    try:
        return model(*args, **kwargs)[0]
    finally:
        model.set_attn_implementation("linattn")


def by_steps(model: PreTrainedModel, ids: Tensor, prompt: Tensor, step: Tensor | None, implementation: str) -> Tensor:
    """The logits of a prompt under the mask `prompt`, and of the tokens behind it one at a time under the columns of `step` so far."""
    model.set_attn_implementation(implementation)
    begin = prompt.shape[-1]
    out = model(ids[:, :begin], attention_mask=prompt, use_cache=True)
    logits = [out.logits]
    for at in range(begin, ids.shape[1]):
        seen = None if step is None else step[:, : at + 1]
        out = model(ids[:, at : at + 1], attention_mask=seen, past_key_values=out.past_key_values)
        logits.append(out.logits)
    model.set_attn_implementation("linattn")
    return torch.cat(logits, 1)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def twins(config, auto):
    """A random model of a configuration, its weights large enough for attention to matter."""
    torch.manual_seed(0)
    make = auto.from_config if hasattr(auto, "from_config") else auto._from_config
    model = make(config, attn_implementation="linattn").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return model


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def hybrid():
    return tiny_model("llama", softmax_layers=[1])


def visible(length=16, causal=True):
    seen = torch.ones(1, 1, length, length, dtype=torch.bool)
    return seen.tril() if causal else seen


def packed(length=16, at=7, causal=True):
    seen = visible(length, causal)
    seen[:, :, at:, :at] = False
    seen[:, :, :at, at:] = False
    return seen


def additive(seen, least=LEAST):
    return torch.zeros(seen.shape).masked_fill(~seen, least)


# Causality


@torch.no_grad()
@pytest.mark.parametrize("name", ["LayoutLM", "Roberta", "Esm", "XLMRoberta"])
def test_an_encoder_is_bidirectional(name):
    import transformers

    model = twins(getattr(transformers, name + "Config")(**TEXT | {"mask_token_id": 4}), getattr(transformers, name + "Model"))
    ids = tiny_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    close(model(ids)[0], quadratic(model, ids))
    close(model(ids, attention_mask=mask)[0][mask > 0], quadratic(model, ids, attention_mask=mask)[mask > 0])


@torch.no_grad()
@pytest.mark.parametrize("name, kept", [("llama", []), ("mistral", []), ("bert", []), ("llama", [1]), ("bert", [0, 1, 2])])
@pytest.mark.parametrize("asked", [True, False])
def test_the_mask_function_decides_whatever_the_module_says(name, kept, asked):
    """A module's is_causal is what an author may have forgotten; the mask is what eager attention honours."""
    model, ids = tiny_model(name, softmax_layers=kept), tiny_tokens(2, 9)
    if name == "bert":
        model.config.is_decoder = asked
    elif not asked:  # a config's own is_causal reaches the call, past the module's
        model.config.is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = not asked
    out = model(ids, use_cache=False)[0]
    other = ids.clone()
    other[:, -1] += 1
    assert bool((out - model(other, use_cache=False)[0])[:, 0].abs().max() > 1e-6) is not asked
    if name != "mistral" and not kept:  # a window, and softmax, are not what the quadratic form has
        close(out, quadratic(model, ids, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("told", ["a 4D mask", "the config", "padding beside the config"])
def test_a_prompt_seen_both_ways_and_then_steps(told):
    """As PaliGemma reads a picture and a question: each token of the prompt sees all of it, those that follow see what is behind them."""
    model, ids, real = tiny_model("llama"), tiny_tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    if told == "a 4D mask":
        prompt, step = visible(9, causal=False).expand(2, -1, -1, -1), None
    else:
        model.config.is_causal = False
        real[0, :3] = 0 if told.startswith("padding") else 1
        prompt, step = real[:, :9], real
    got, wanted = (by_steps(model, ids, prompt, step, name) for name in ("linattn", "by_the_mask"))
    close(got[real > 0], wanted[real > 0])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["made by us", "2D", "4D"])
def test_a_mask_is_read_once_a_forward_pass(kind, monkeypatch):
    """By the first of the layers: whoever reads values waits for the device."""
    model, reads = tiny_model("llama"), []
    ids, mask = tiny_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    for name in ("unpack", "_of_2d", "_of_4d"):
        original = getattr(told, name)
        monkeypatch.setattr(told, name, lambda *args, original=original, name=name: reads.append(name) or original(*args))
    if kind == "2D":
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, "linattn", lambda attention_mask, **_: attention_mask)
    given = {"4D": visible(9) & (mask[:, None, None] > 0)}.get(kind, mask)
    model(ids, attention_mask=given, use_cache=False)
    assert reads == {"made by us": ["unpack"], "2D": ["_of_2d"], "4D": ["_of_4d"]}[kind]


@torch.no_grad()
@pytest.mark.parametrize("why", ["a decay", "packed"])
def test_a_prompt_seen_both_ways_that_no_state_holds(why):
    model, ids = tiny_model("llama", decay="head" if why == "a decay" else "none"), tiny_tokens(2, 12)
    model.config.is_causal = False
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None] if why == "packed" else None
    past = model(ids[:, :9], position_ids=positions).past_key_values
    with pytest.raises(ValueError, match="bidirectional linear attention cannot go on"):
        model(ids[:, 9:10], past_key_values=past, attention_mask=torch.ones(2, 10))
    past.reset()
    model.config.is_causal = True
    close(model(ids, past_key_values=past).logits, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_every_token_seeing_every_other_by_an_overlay_is_bidirectional(llama):
    ids = tiny_tokens(2, 9)
    mask = masking_utils.create_causal_mask(
        config=llama.config, inputs_embeds=torch.zeros(2, 9, 64), attention_mask=None, past_key_values=None,
        or_mask_function=lambda *args: torch.tensor(True),
    )  # fmt: skip
    seen = visible(9, causal=False)
    close(llama(ids, attention_mask=mask, use_cache=False)[0], quadratic(llama, ids, attention_mask=seen, use_cache=False))


@pytest.mark.parametrize("overlay", ["prefix", "image", "strided", "hidden"])
def test_other_overlays_are_refused(llama, overlay):
    functions = {
        "prefix": {"or_mask_function": lambda batch, head, row, column: column < 4},
        "image": {"or_mask_function": lambda batch, head, row, column: (row // 3 == 2) & (column // 3 == 2)},
        "strided": {"and_mask_function": lambda batch, head, row, column: (row - column) % 3 < 2},
        "hidden": {"and_mask_function": lambda batch, head, row, column: (column != 3) | (row < 5)},
    }
    with pytest.raises(ValueError, match="see each other ahead|knows no other pattern"):
        masking_utils.create_causal_mask(
            config=llama.config, inputs_embeds=torch.zeros(2, 9, 64), attention_mask=None, past_key_values=None, **functions[overlay]
        )


def test_the_last_rows_of_a_long_text_are_looked_at_too(llama, monkeypatch):
    """Rows are read a thousand at a time; here four."""
    monkeypatch.setattr(mask_module, "ROWS_AT_ONCE", 4)
    for first in (4, 8, 11):
        with pytest.raises(ValueError, match="knows no other pattern"):
            masking_utils.create_causal_mask(
                config=llama.config, inputs_embeds=torch.zeros(2, 12, 64), attention_mask=None, past_key_values=None,
                and_mask_function=lambda batch, head, row, column, first=first: (column != 1) | (row < first),
            )  # fmt: skip


OVERLAYS = {  # of functions that a graph is traced with; whose neighbours look causal
    "strided": lambda batch, head, row, column: (row - column) % 3 < 2,
    "hidden": lambda batch, head, row, column: (column != 3) | (row < 5),
    "other window": lambda batch, head, row, column: column > row - 5,
}


def overlaid(model, embeddings, overlay):
    mask = masking_utils.create_causal_mask(
        config=model.config, inputs_embeds=embeddings, attention_mask=None, past_key_values=None, and_mask_function=overlay
    )
    return model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)[0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["hidden", *(pytest.param(name, marks=pytest.mark.slow) for name in OVERLAYS if name != "hidden")])
def test_overlays_are_refused_in_a_traced_graph_too(name):
    model, embeddings = tiny_model("mistral", layers=1), torch.randn(2, 12, 64)
    torch._dynamo.reset()
    call = torch.compile(overlaid, backend="eager")
    close(call(model, embeddings, masking_utils.sliding_window_overlay(8)), model(inputs_embeds=embeddings, use_cache=False)[0])
    for run in (overlaid, call):
        with pytest.raises((ValueError, RuntimeError), match="knows no other pattern"):
            run(model, embeddings, OVERLAYS[name])


@torch.no_grad()
def test_a_window_that_a_model_puts_into_its_mask_function_is_dropped():
    """As Gemma 3 with a vision tower does, whose processor gives token_type_ids to every text."""
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
    vision = {**SIZES, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, "vision_use_head": False}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90)
    model, ids = twins(config, Gemma3ForConditionalGeneration), tiny_tokens(2, 20)
    wanted = model(ids)[0]
    for lengths in ([20], [12, 1, 7]):
        cache, types = DynamicCache(config=model.config), torch.zeros_like(ids)
        parts = zip(ids.split(lengths, 1), types.split(lengths, 1), strict=True)
        close(torch.cat([model(part, token_type_ids=kind, past_key_values=cache)[0] for part, kind in parts], 1), wanted)
    with pytest.raises(ValueError, match="see each other ahead"):
        model(ids, token_type_ids=(torch.arange(20) // 4 == 2).long().expand(2, -1))


# Packed sequences


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["Llama4Text", "Cohere2", "Starcoder2"])
def test_boundaries_come_from_the_mask_function(name, compiled):
    import transformers

    sizes = {"num_key_value_heads": 4, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96, "sliding_window": 64}
    config = getattr(transformers, name + "Config")(**TEXT | sizes | {"num_hidden_layers": 1})
    model, ids = twins(config, modeling_auto.AutoModelForCausalLM), tiny_tokens(1, 16)
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    wanted = quadratic(model, ids, position_ids=positions, use_cache=False)
    alone = model(ids[:, 7:], use_cache=False)[0]
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    out = call(ids, position_ids=positions, use_cache=False)[0]
    close(out, wanted)
    close(out[:, 7:], alone)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, window",
    [
        ("Llama4Text", {"attention_chunk_size": 4}),
        ("Qwen2Moe", {"num_experts_per_tok": 2}),
        ("Mistral", {"sliding_window": 1}),
        ("Cohere2", {"sliding_window": 1}),
    ],
)
def test_boundaries_beside_chunks_and_windows_that_part_neighbours(name, window):
    """Qwen2-MoE has a window of 0, and asks for the mask of it, though no layer uses that."""
    import transformers

    sizes = {"num_key_value_heads": 4, "head_dim": 16, "num_local_experts": 2, "num_experts": 2, "moe_intermediate_size": 16}
    config = getattr(transformers, name + "Config")(**TEXT | sizes | window | {"num_hidden_layers": 2, "intermediate_size_mlp": 96})
    model, ids = twins(config, modeling_auto.AutoModelForCausalLM), tiny_tokens(2, 16)
    positions = torch.cat([torch.arange(5), torch.arange(11)])[None].expand(2, -1)
    same = torch.arange(16).view(-1, 1).lt(5) == torch.arange(16).lt(5)
    wanted = quadratic(model, ids, position_ids=positions, attention_mask=visible() & same, use_cache=False)
    close(model(ids, position_ids=positions, use_cache=False)[0], wanted)


def test_a_users_own_chunks_are_documents_or_refused():
    chunks = {"and_mask_function": lambda batch, head, row, column: row // 4 == column // 4, "inputs_embeds": torch.zeros(1, 16, 64)}
    mistral = tiny_model("mistral").config
    mistral.sliding_window = 1
    mask = masking_utils.create_sliding_window_causal_mask(config=mistral, attention_mask=None, past_key_values=None, **chunks)
    assert unpack(mask, 16).starts.nonzero()[:, 1].tolist() == [4, 8, 12]
    mistral.attention_chunk_size = 4
    own = lambda batch, head, row, column: (row // 4 == column // 4) & (column <= row)  # noqa: E731
    with pytest.raises(ValueError, match="cannot be told from chunks of 4"):
        linattn_mask(batch_size=1, q_length=16, kv_length=16, config=mistral, local_size=4, mask_function=own)


@torch.no_grad()
def test_documents_within_a_window():
    """What lies just outside the window is hidden by it and not by the documents."""
    model, ids = tiny_model("mistral"), tiny_tokens(1, 16)  # its window is 8
    documents = torch.tensor([[0] * 5 + [1] * 11])
    mask = masking_utils.create_sliding_window_causal_mask(
        config=model.config, inputs_embeds=torch.zeros(1, 16, 64), attention_mask=None, past_key_values=None,
        and_mask_function=lambda batch, head, row, column: documents[batch, row] == documents[batch, column],
    )  # fmt: skip
    close(model(ids, attention_mask=mask)[0][:, 5:], model(ids[:, 5:], position_ids=torch.arange(5, 16)[None])[0])


@torch.no_grad()
def test_documents_of_a_users_own_mask_function(llama):
    ids, documents = tiny_tokens(2, 16), torch.tensor([[0] * 5 + [1] * 11, [0] * 12 + [1] * 4])
    mask = masking_utils.create_causal_mask(
        config=llama.config, inputs_embeds=torch.zeros(2, 16, 64), attention_mask=None, past_key_values=None,
        and_mask_function=lambda batch, head, row, column: documents[batch, row] == documents[batch, column],
    )  # fmt: skip
    seen = visible() & (documents[:, None, :, None] == documents[:, None, None])
    close(llama(ids, attention_mask=mask)[0], quadratic(llama, ids, attention_mask=seen, use_cache=False))


POSITIONS = {  # and where the sequences begin
    "a gap": (torch.cat([torch.arange(8), torch.arange(20, 28)]), []),
    "two gaps, one of a step": (torch.cat([torch.arange(5), torch.arange(6, 10), torch.arange(30, 37)]), []),
    "groups": (torch.arange(16) // 2, []),
    "groups behind a window": (torch.cat([torch.arange(12) // 4, torch.arange(3, 7)]), []),
    "a fall to 0": (torch.cat([torch.arange(8), torch.arange(8)]), [8]),
    "a fall to 3": (torch.cat([torch.arange(8), torch.arange(3, 11)]), [8]),
    "a sequence of one token": (torch.cat([torch.arange(7), torch.arange(1), torch.arange(8)]), [7, 8]),
}


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "between"])
@pytest.mark.parametrize("case", POSITIONS)
def test_a_fall_in_position_begins_a_sequence_and_nothing_else_does(llama, case, padding):
    positions, starts = POSITIONS[case]
    ids, mask, columns = tiny_tokens(1, 16), torch.ones(1, 16, dtype=torch.long), torch.arange(16)
    mask[:, {"none": slice(0, 0), "left": slice(0, 2), "between": slice(9, 11)}[padding]] = 0
    runs = sum((columns >= start).long() for start in starts) if starts else torch.zeros(16)
    seen = visible() & (runs[:, None] == runs) & (mask[:, None, None] > 0)
    out = llama(ids, position_ids=positions[None], attention_mask=mask)[0]
    wanted = quadratic(llama, ids, position_ids=positions[None], attention_mask=seen, use_cache=False)
    close(out[mask > 0], wanted[mask > 0])


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind, lengths", [("dynamic", [16]), ("dynamic", [4, 12]), ("static", [16]), ("static", [3, 13])])
def test_sequences_packed_into_a_cache_are_kept_apart(llama, hybrid, kind, lengths, padded):
    """Whatever was in it before; softmax layers can do so only where all keys are new."""
    positions = torch.cat([torch.arange(9), torch.arange(1), torch.arange(6)])[None]
    ids, mask = tiny_tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[0, : 2 * padded] = 0

    def feed(model):
        cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
        ends = torch.tensor(lengths).cumsum(0).tolist()
        parts = zip(ids.split(lengths, 1), positions.split(lengths, 1), ends, strict=True)
        more = [{"attention_mask": mask[:, :end]} if padded else {} for end in ends]
        calls = zip(parts, more, strict=True)
        return torch.cat([model(part, position_ids=at, past_key_values=cache, **told)[0] for (part, at, _), told in calls], 1)

    runs = (positions == 0).cumsum(-1)
    seen = visible() & (runs[:, None, :, None] == runs[:, None, None]) & (mask[:, None, None] > 0)
    close(feed(llama)[mask > 0], quadratic(llama, ids, position_ids=positions, attention_mask=seen, use_cache=False)[mask > 0])
    if kind == "dynamic" and len(lengths) == 1:
        wanted = hybrid(ids, position_ids=positions, attention_mask=seen, use_cache=False)[0]
        close(feed(hybrid)[mask > 0], wanted[mask > 0])
    else:
        with pytest.raises(ValueError, match="softmax layers of this model cannot tell them apart"):
            feed(hybrid)


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, torch.arange(9)[None], (torch.arange(9) % 6).expand(3, -1)])
def test_one_row_of_a_mask_is_for_every_row(llama, positions):
    ids, mask = tiny_tokens(3, 9), torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1]])
    told = {} if positions is None else {"position_ids": positions}
    wanted = llama(ids, attention_mask=mask.expand(3, -1), **told)[0]
    close(llama(ids, attention_mask=mask, **told)[0][:, mask[0] > 0], wanted[:, mask[0] > 0])


# Masks of the caller's own


@torch.no_grad()
@pytest.mark.parametrize("form", ["bool", "least", "infinite", "half's least"])
@pytest.mark.parametrize("pattern", ["padded", "right-padded", "packed", "both ways", "both ways, packed and padded", "keys"])
@pytest.mark.parametrize("which", ["llama", "hybrid"])
def test_4d_masks_are_read_and_broadcast(request, which, pattern, form):
    if which == "hybrid" and form != "bool":
        pytest.skip("the same reader")
    model, ids = request.getfixturevalue(which), tiny_tokens(2, 16)
    columns = torch.arange(16)
    seen = {
        "padded": visible() & (columns > 3),
        "right-padded": visible() & (columns < 13),
        "packed": packed(),
        "both ways": visible(causal=False),
        "both ways, packed and padded": packed(causal=False) & (columns > 3),
        "keys": (columns < 13)[None, None, None],
    }[pattern]
    real = seen[0, 0].expand(16, 16).diagonal()
    mask = seen if form == "bool" else additive(seen, {"least": LEAST, "infinite": -torch.inf, "half's least": -65504.0}[form])
    out = model(ids, attention_mask=mask, use_cache=False)[0]
    if which == "llama":
        close(out[:, real], quadratic(model, ids, attention_mask=seen, use_cache=False)[:, real])
    else:
        alone = seen.expand(1, 1, 16, 16)[..., real, :][..., real]
        close(out[:, real], model(ids[:, real], attention_mask=alone, position_ids=columns[real][None], use_cache=False)[0])


BIASES = {
    "everywhere": lambda seen: additive(seen) - 0.1 * seen,
    "by distance": lambda seen: additive(seen) - 0.01 * (torch.arange(16)[:, None] - torch.arange(16)).abs() * seen,
    "of thousands": lambda seen: additive(seen) - 5000.0 * (torch.arange(16) == 3),
    "at one pair": lambda seen: additive(seen) + torch.nn.functional.pad(torch.ones(1, 1, 1, 1), (3, 12, 9, 6)),
    "of one head": lambda seen: torch.cat([additive(seen)] * 3 + [additive(seen) + 0.5 * seen], 1),
}


@pytest.mark.parametrize("which", ["llama", "hybrid"])
@pytest.mark.parametrize("bias", BIASES)
def test_a_bias_is_refused(request, which, bias):
    with pytest.raises(ValueError, match="a bias on softmax scores"):
        request.getfixturevalue(which)(tiny_tokens(2, 16), attention_mask=BIASES[bias](visible()))


@pytest.mark.parametrize("shared", [False, True])
def test_a_relative_position_bias_is_refused(shared):
    """BEiT adds it to the mask; while its table is zeros, there is none."""
    option = "use_shared_relative_position_bias" if shared else "use_relative_position_bias"
    config = BeitConfig(**SIZES | {"num_hidden_layers": 1}, image_size=16, patch_size=4, **{option: True})
    model, images = twins(config, BeitModel), torch.randn(1, 3, 16, 16)
    model(pixel_values=images)
    for name, parameter in model.named_parameters():
        if "bias_table" in name:
            nn.init.normal_(parameter)
    with pytest.raises(ValueError, match="a bias on softmax scores"):
        model(pixel_values=images)


PATTERNS = {
    "a prefix that sees itself": lambda seen: seen | (torch.arange(16) < 5),
    "a hidden column": lambda seen: seen & ~((torch.arange(16) == 4) & (torch.arange(16)[:, None] > 6)),
    "a window": lambda seen: seen.triu(-4),
    "heads that differ": lambda seen: torch.cat([seen] * 3 + [packed()], 1),
    "a first row of batch that sees ahead": lambda seen: torch.cat([visible(causal=False), seen]),
    "documents that come back": lambda seen: seen & ((torch.arange(16)[:, None] // 4 % 2) == (torch.arange(16) // 4 % 2)),
}


@pytest.mark.parametrize("which", ["llama", "hybrid"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_other_patterns_are_refused(request, which, pattern):
    mask = PATTERNS[pattern](visible())
    for given in (mask, additive(mask)):
        with pytest.raises(ValueError, match="no other pattern"):
            request.getfixturevalue(which)(tiny_tokens(2, 16), attention_mask=given)


@torch.no_grad()
def test_the_models_own_window_in_a_4d_mask_is_dropped():
    model, ids = tiny_model("mistral"), tiny_tokens(2, 16)  # its window is 8
    close(model(ids, attention_mask=visible().triu(-7))[0], model(ids)[0])
    for end in (13, 16):  # what the window hides of the past was counted by the state
        cache = model(ids[:, :12]).past_key_values
        seen = visible().triu(-7)[..., 12:end, :end]
        close(model(ids[:, 12:end], attention_mask=seen, past_key_values=cache)[0], model(ids)[0][:, 12:end])


@pytest.mark.parametrize("mask", [torch.ones(2, 16, 16), torch.ones(2, 1, 16, 16, dtype=torch.long), torch.ones(2, 1, 16, 9).bool()])
def test_masks_of_other_shapes_and_types_are_refused(llama, mask):
    with pytest.raises(ValueError, match="mask"):
        llama(tiny_tokens(2, 16), attention_mask=mask)


@torch.no_grad()
@pytest.mark.parametrize("name, kept", [("llama", []), ("llama", [1]), ("mistral", [1]), ("gemma3", [0, 2])])
def test_copies_of_the_mask_say_the_same(name, kept):
    """As between the devices of a device_map."""

    def copy(module, args, kwargs):
        mask = kwargs["attention_mask"]
        return args, kwargs | {"attention_mask": None if mask is None else mask.clone()}

    model, ids = tiny_model(name, softmax_layers=kept), tiny_tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    told = []
    for _ in range(2):
        cache = DynamicCache(config=model.config)
        parts = zip(ids.split([14, 5, 1], 1), (14, 19, 20), strict=True)
        told.append(torch.cat([model(part, attention_mask=mask[:, :end], past_key_values=cache)[0] for part, end in parts], 1))
        for layer in model.model.layers:
            layer.register_forward_pre_hook(copy, with_kwargs=True)
    close(told[1][mask > 0], told[0][mask > 0])


# Longer masks, and one token


@torch.no_grad()
@pytest.mark.parametrize("which", ["llama", "hybrid"])
@pytest.mark.parametrize("lengths", [[10], [4, 6], [4, 1, 1, 4]])
def test_a_mask_as_long_as_the_static_cache(request, which, lengths):
    model, ids = request.getfixturevalue(which), tiny_tokens(2, 10)
    mask = torch.zeros(2, 32, dtype=torch.long)
    mask[0, :10], mask[1, 3:10] = 1, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, :10]
    wanted = model(ids, attention_mask=mask[:, :10], position_ids=positions, use_cache=False)[0]
    cache, out, start = StaticCache(config=model.config, max_cache_len=32), [], 0
    for n in lengths:
        part = slice(start, start + n)
        out.append(model(ids[:, part], attention_mask=mask, position_ids=positions[:, part], past_key_values=cache)[0])
        start += n
    close(torch.cat(out, 1)[mask[:, :10] > 0], wanted[mask[:, :10] > 0])


@torch.no_grad()
def test_a_4d_mask_as_long_as_the_static_cache(llama):
    ids, seen = tiny_tokens(2, 10), torch.zeros(1, 1, 10, 32, dtype=torch.bool)
    seen[..., :10] = visible(10) & (torch.arange(10) > 2)
    wanted = llama(ids[:, 3:])[0]
    for lengths in ([10], [6, 4], [6, 1, 3]):
        cache = StaticCache(config=llama.config, max_cache_len=32)
        parts = zip(ids.split(lengths, 1), seen.split(lengths, 2), torch.arange(-3, 7)[None].split(lengths, 1), strict=True)
        out = [llama(part, attention_mask=mask, position_ids=at.clamp(min=0), past_key_values=cache)[0] for part, mask, at in parts]
        close(torch.cat(out, 1)[:, 3:], wanted)


def test_a_mask_that_ends_before_the_text_is_refused(llama):
    ids, cache = tiny_tokens(2, 10), DynamicCache(config=llama.config)
    llama(ids[:, :6], past_key_values=cache)
    with pytest.raises(ValueError, match="4 columns, but 6 tokens were seen before and 4 are new"):
        llama(ids[:, 6:], attention_mask=torch.ones(2, 4), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("kept, kind", [
    *itertools.product(([], [1]), ("dynamic", "static")), ([1], "compiled"), pytest.param([], "compiled", marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_one_new_token_may_be_padding(kept, kind):
    model, ids = tiny_model("llama", layers=2, softmax_layers=kept), tiny_tokens(3, 8)
    mask = torch.tensor([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 0, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)[0]
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=8)
    torch._dynamo.reset()
    call = torch.compile(model, backend="eager", fullgraph=True, dynamic=False) if kind == "compiled" else model
    out = []
    for i in range(8):  # a compiled call gets the whole of the mask, one shape for all steps
        told = mask if kind == "compiled" else mask[:, : i + 1]
        out.append(call(ids[:, i : i + 1], attention_mask=told, position_ids=positions[:, i : i + 1], past_key_values=cache)[0])
    close(torch.cat(out, 1)[mask > 0], wanted[mask > 0])


# The past


@pytest.mark.parametrize("columns, pads", [(300, 2), (40, 3), (24, 5)])
def test_patterns_of_padding_have_digests_of_their_own(columns, pads):
    chosen = torch.combinations(torch.arange(columns), pads)
    left_out = torch.zeros(len(chosen), columns, dtype=torch.bool).scatter_(1, chosen, True)
    whole = digest(left_out)
    assert whole.unique().numel() == len(chosen) and int(whole.min()) >= 0 and int(whole.max()) < 2**31
    assert torch.equal(joined(digest(left_out[:, :17]), digest(left_out[:, 17:], 17)), whole)


def two_turns(model, first, second, lengths=(5, 2), cache=None):
    ids = tiny_tokens(len(first), sum(lengths))
    cache = DynamicCache(config=model.config) if cache is None else cache
    first, second = torch.tensor(first), None if second is None else torch.tensor(second)
    model(ids[:, : lengths[0]], attention_mask=first, past_key_values=cache)
    return model(ids[:, lengths[0] :], attention_mask=second, past_key_values=cache)[0]


OTHER_PASTS = {
    "a pad that was counted": ([[1, 1, 1, 1, 1]], [[1, 1, 1, 0, 0, 1, 1]]),
    "a pad that moved": ([[0, 1, 1, 1, 1]], [[1, 0, 1, 1, 1, 1, 1]]),
    "two pads that moved to the same sum": ([[1, 0, 1, 1, 0]], [[1, 1, 0, 0, 1, 1, 1]]),
    "a pad no more": ([[0, 1, 1, 1, 1]], [[1, 1, 1, 1, 1, 1, 1]]),
    "the other row's": ([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], [[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]),
}


@torch.no_grad()
@pytest.mark.parametrize("which", ["llama", "hybrid"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("lengths", [(5, 2), (5, 1)])
@pytest.mark.parametrize("case", OTHER_PASTS)
def test_a_mask_that_says_otherwise_about_the_past_is_refused(request, case, lengths, static, which):
    model = request.getfixturevalue(which)
    first, second = OTHER_PASTS[case]
    second = [row[: sum(lengths)] for row in second]
    cache = StaticCache(config=model.config, max_cache_len=8) if static else None
    with pytest.raises(ValueError, match="hides other tokens of the past"):
        two_turns(model, first, second, lengths, cache)


@torch.no_grad()
def test_a_mask_that_agrees_goes_on(llama):
    for first, _ in OTHER_PASTS.values():
        second = [row + [1, 1] for row in first]
        ids, mask = tiny_tokens(len(first), 7), torch.tensor(second)
        seen = visible(7) & (mask[:, None, None] > 0)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        wanted = quadratic(llama, ids, attention_mask=seen, position_ids=positions, use_cache=False)[:, 5:]
        close(two_turns(llama, first, second), wanted)
        if all(map(all, first)):
            close(two_turns(llama, first, None), wanted)


@torch.no_grad()
@pytest.mark.parametrize("which", ["llama", "hybrid"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("lengths", [(5, 2), (5, 1)])
def test_no_mask_behind_padding_is_refused(request, lengths, static, which):
    """To softmax it says that every token is real. And generate() gives none where it was given ones."""
    model = request.getfixturevalue(which)
    for first in ([[0, 1, 1, 1, 1]], [[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]]):
        cache = StaticCache(config=model.config, max_cache_len=8) if static else None
        with pytest.raises(ValueError, match="hides other tokens of the past"):
            two_turns(model, first, None, lengths, cache)
    cache = DynamicCache(config=model.config)
    ids, padded = tiny_tokens(2, 7), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    model(ids[:, :5], attention_mask=padded, past_key_values=cache)
    with pytest.raises(ValueError, match="hides other tokens of the past"):
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2)


@torch.no_grad()
def test_a_4d_mask_and_the_past(llama):
    ids, mask = tiny_tokens(1, 7), visible(7)
    mask = mask & (torch.arange(7) != 1)
    wanted = llama(ids, attention_mask=mask)[0][:, 5:]
    cache = llama(ids[:, :5], attention_mask=mask[..., :5, :5]).past_key_values
    close(llama(ids[:, 5:], attention_mask=mask[..., 5:, :], past_key_values=cache)[0], wanted)
    cache = llama(ids[:, :5], attention_mask=mask[..., :5, :5]).past_key_values
    with pytest.raises(ValueError, match="hides other tokens of the past"):
        llama(ids[:, 5:], attention_mask=visible(7)[..., 5:, :], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize(
    "seen", [[[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], [[0, 0, 0, 1, 0], [1, 1, 1, 0, 1]], [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]]
)
def test_rows_of_a_4d_mask_that_disagree_about_the_past_are_refused(llama, seen):
    """The second sequence of a packed row sees nothing of the past, and all rows of the first one see the same."""
    ids, cache = tiny_tokens(1, 5), DynamicCache(config=llama.config)
    llama(ids[:, :3], past_key_values=cache)
    with pytest.raises(ValueError, match="no other pattern"):
        llama(ids[:, 3:], attention_mask=torch.tensor(seen, dtype=torch.bool)[None, None], past_key_values=cache)


@torch.no_grad()
def test_what_was_left_out_follows_the_sequences(llama):
    """Beams, crops and resets move what a state remembers with the state."""
    ids, mask = tiny_tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :2], mask[1, 4] = 0, 0
    for static in (False, True):
        cache = StaticCache(config=llama.config, max_cache_len=12) if static else DynamicCache(config=llama.config)
        llama(ids[:, :2], attention_mask=mask[:, :2], past_key_values=cache)
        cache.activate_past_recording() if hasattr(cache, "activate_past_recording") else None
        for layer in cache.layers:
            layer.activate_past_recording()
        llama(ids[:, 2:5], attention_mask=mask[:, :5], past_key_values=cache)
        for layer in cache.layers:
            layer.crop(-2)  # the second row's padding goes, and comes back as a token
        mask[1, 4] = 1
        llama(ids[:, 3:6], attention_mask=mask[:, :6], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        llama(ids[:, 6:7].flip(0), attention_mask=mask[:, :7].flip(0), past_key_values=cache)
        with pytest.raises(ValueError, match="hides other tokens of the past"):
            llama(ids[:, 7:], attention_mask=mask, past_key_values=cache)
        cache.reset()
        llama(ids[:, :2], attention_mask=torch.ones(2, 2), past_key_values=cache)
        llama(ids[:, 2:4], attention_mask=torch.ones(2, 4), past_key_values=cache)
        mask[1, 4] = 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_mask_that_agreed_with_one_cache_is_held_against_the_next(llama, kind):
    """The same 4D mask, given again: what it hides was compared with what the first cache had left out, and with no other's."""
    ids, padding = tiny_tokens(2, 12), torch.ones(2, 10, dtype=torch.long)
    caches = [
        DynamicCache(config=llama.config) if kind == "dynamic" else StaticCache(config=llama.config, max_cache_len=16) for _ in range(3)
    ]
    for cache, hidden in zip(caches, (3, 5, 0), strict=True):
        padding[:, :5], padding[:, :hidden] = 1, 0
        llama(ids[:, :10], attention_mask=padding, past_key_values=cache)
    mask = torch.zeros(2, 1, 1, 11 if kind == "dynamic" else 16, dtype=torch.bool)
    mask[..., 3:11] = True
    expected = llama(ids[:, 10:11], attention_mask=mask, past_key_values=copy.deepcopy(caches[0])).logits
    for cache in caches[1:]:
        with pytest.raises(ValueError, match="hides other tokens of the past"):
            llama(ids[:, 10:11], attention_mask=mask, past_key_values=cache)
    assert torch.equal(llama(ids[:, 10:11], attention_mask=mask, past_key_values=caches[0]).logits, expected)


@torch.no_grad()
def test_compiled_steps_refuse_another_past_too():
    llama = tiny_model("llama", layers=1)
    ids, mask = tiny_tokens(2, 8), torch.ones(2, 12, dtype=torch.long)
    mask[0, :2] = 0
    cache = StaticCache(config=llama.config, max_cache_len=12)
    llama(ids[:, :6], attention_mask=mask, past_key_values=cache)
    torch._dynamo.reset()
    call = torch.compile(llama, backend="eager", fullgraph=True)
    call(ids[:, 6:7], attention_mask=mask, past_key_values=cache)
    mask[0, 1] = 1
    with pytest.raises(RuntimeError, match="hides other tokens of the past"):
        call(ids[:, 7:8], attention_mask=mask, past_key_values=cache)


# What is no mask's business


class CrossAttention(nn.Module):
    config = LlamaConfig()


class Resampler(nn.Module):
    config = CrossAttention.config

    def forward(self, hidden_states, context): ...


class Encoder(nn.Module):
    config, is_causal = CrossAttention.config, False


class Silent(nn.Module):
    config = CrossAttention.config


def test_a_module_that_says_nothing_of_causality_is_causal():
    """As in Transformers' own attention functions."""
    query, silent, said = torch.randn(1, 4, 16, 8), Silent(), Silent()
    said.is_causal = True
    outs = [linattn_attention(module, query, query, query, None)[0] for module in (silent, said, Encoder())]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_a_2d_mask_with_numbers_below_0_is_refused():
    query, mask = torch.randn(1, 4, 16, 8), torch.ones(1, 16)
    linattn_attention(Silent(), query, query, query, mask)
    with pytest.raises(ValueError, match="has numbers below 0"):
        linattn_attention(Silent(), query, query, query, mask - 2 * (torch.arange(16) == 3))


@pytest.mark.parametrize("length", [16, 9])
@pytest.mark.parametrize("kind", [CrossAttention, Resampler, Encoder, "flag"])
def test_cross_attention_that_was_not_refused_before_is_at_the_call(kind, length):
    module = Encoder() if kind == "flag" else kind()
    module.is_cross_attention = kind == "flag"
    query, key = torch.randn(1, 4, 16, 8), torch.randn(1, 4, length, 8)
    if kind is Encoder and length == 16:
        assert linattn_attention(module, query, key, key, None)[0].shape == (1, 16, 4, 8)
        return
    with pytest.raises(ValueError, match=f"is cross-attention, from 16 tokens to {length} others"):
        linattn_attention(module, query, key, key, None)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_prefix_tuning_gets_a_sentence(name):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(name), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises((ValueError, RuntimeError), match="[Pp]refix tuning"):
        model(tiny_tokens())


def test_attention_weights_are_said_to_be_none(llama, monkeypatch):
    said = []
    monkeypatch.setattr(calls.logger, "warning_once", said.append)
    llama(tiny_tokens(1, 4))
    assert not said
    out = llama(tiny_tokens(1, 4), output_attentions=True)
    assert not out.attentions and "no attention weights" in said[0]


def test_all_ones_cost_nothing(llama, monkeypatch):
    """Neither a mask of ones nor none gives the operator anything to read."""
    from hf_linattn.forms import operators

    given = []
    real = operators.linear_attention
    monkeypatch.setattr(operators, "linear_attention", lambda *args, **kw: given.append(kw["segment_ids"]) or real(*args, **kw))
    cache = DynamicCache(config=llama.config)
    llama(tiny_tokens(2, 6), attention_mask=torch.ones(2, 6), past_key_values=cache)
    llama(tiny_tokens(2, 3), attention_mask=torch.ones(2, 9), past_key_values=cache)
    llama(tiny_tokens(2, 6), position_ids=torch.arange(6)[None], use_cache=False)
    assert given == [None] * 9 and cache.layers[0].left_out is None
