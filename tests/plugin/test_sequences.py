"""Padded, packed and batched sequences give what each gives alone."""

import pytest
import torch
from ten_lines import by_reference
from tiny_models import CAUSAL, tiny_model, tiny_tokens
from transformers import DataCollatorWithFlattening, DynamicCache

OPTIONS = [{"kernel": "quadratic"}, {"decay": "head"}, {"normalize_qk": False, "b": 0.2}]
VARIANTS = [(name, {}) for name in CAUSAL] + [("llama", options) for options in OPTIONS]
VARIANTS.append(("gemma2", {"normalize_qk": False, "b": 0.2}))  # whose scores have a scale of their own


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: "-".join([v[0], *map(str, v[1].values())]))
def case(request):
    name, options = request.param
    model, ids = tiny_model(name, **options), tiny_tokens()
    with torch.no_grad():
        return model, ids, model(ids, use_cache=False).logits


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_left_padding(case):
    model, ids, full = case
    padded = torch.zeros(2, 28, dtype=torch.long)
    padded[0, 5:], padded[1, 9:] = ids[0], ids[1, :19]
    mask = (padded != 0).long()
    out = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    close(out[0, 5:], full[0])
    close(out[1, 9:], full[1, :19])
    assert out.isfinite().all()


@torch.no_grad()
def test_right_padding(case):
    model, ids, full = case
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    close(model(padded, attention_mask=mask).logits[:, :23], full)


@torch.no_grad()
def test_a_text_goes_on_after_right_padding(case):
    model, ids, full = case
    lengths = (15, 11)
    padded, mask = ids[:, :15].clone(), torch.ones(2, 15, dtype=torch.long)
    padded[1, 11:], mask[1, 11:] = 0, 0
    cache = DynamicCache(config=model.config)
    model(padded, attention_mask=mask, past_key_values=cache)
    rest = torch.stack([ids[row, n : n + 6] for row, n in enumerate(lengths)])
    positions = torch.stack([torch.arange(n, n + 6) for n in lengths])
    mask = torch.cat([mask, torch.ones_like(rest)], 1)
    out = torch.cat([
        model(rest[:, :1], attention_mask=mask[:, :16], position_ids=positions[:, :1], past_key_values=cache).logits,
        model(rest[:, 1:], attention_mask=mask, position_ids=positions[:, 1:], past_key_values=cache).logits,
    ], 1)  # fmt: skip
    for row, n in enumerate(lengths):
        close(out[row], full[row, n : n + 6])


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("mask", [None, "ones"])
def test_packed_position_ids(case, use_cache, mask):
    model, ids, full = case
    packed = torch.cat([ids[:1, :9], ids[1:, :14]], 1)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    mask = None if mask is None else torch.ones_like(packed)
    out = model(packed, position_ids=positions, attention_mask=mask, use_cache=use_cache).logits
    close(out[0, :9], full[0, :9])
    close(out[0, 9:], full[1, :14])


@torch.no_grad()
def test_packed_and_padded(case):
    model, ids, full = case
    packed = torch.cat([ids[:1, :9], ids[1:, :10], torch.zeros(1, 4, dtype=torch.long)], 1)
    positions = torch.cat([torch.arange(9), torch.arange(10), torch.arange(4)])[None]
    out = model(packed, position_ids=positions, attention_mask=(packed != 0).long()).logits
    close(out[0, :9], full[0, :9])
    close(out[0, 9:19], full[1, :10])


@torch.no_grad()
def test_padding_with_positions_of_its_own_before_a_packed_sequence(case):
    model, ids, full = case
    packed = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:1, :9], ids[1:, :14]], 1)
    positions = torch.cat([torch.arange(12), torch.arange(14)])[None]  # rotary embedding: the first sequence may start at 3
    out = model(packed, position_ids=positions, attention_mask=(packed != 0).long()).logits
    close(out[0, 3:12], full[0, :9])
    close(out[0, 12:], full[1, :14])


@torch.no_grad()
def test_packed_cu_seq_lens(case):
    model, ids, full = case
    packed = torch.cat([ids[:1, :9], ids[1:, :14]], 1)
    bounds = torch.tensor([0, 9, 23], dtype=torch.int32)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 14, "max_length_k": 14}
    close(model(packed, position_ids=positions, use_cache=False, **lengths).logits[0, 9:], full[1, :14])


@torch.no_grad()
def test_the_flattening_collator():
    model, ids = tiny_model("llama"), tiny_tokens(3)
    rows = [{"input_ids": ids[i, :n].tolist()} for i, n in enumerate((9, 1, 14))]
    for return_flash_attn_kwargs in (False, True):
        batch = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=return_flash_attn_kwargs)(rows)
        labels = batch.pop("labels")
        assert labels is not None
        out = model(**batch).logits[0].split([9, 1, 14])
        for row, logits in zip(rows, out, strict=True):
            close(logits, model(torch.tensor([row["input_ids"]])).logits[0])


@torch.no_grad()
def test_packed_then_continued_goes_on_from_the_last_sequence():
    model, ids = tiny_model("llama", decay="head"), tiny_tokens()
    packed = torch.cat([ids[:1, :9], ids[1:, :14]], 1)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    cache = DynamicCache(config=model.config)
    model(packed, position_ids=positions, past_key_values=cache)
    out = model(ids[1:, 14:], position_ids=torch.arange(14, 23)[None], past_key_values=cache).logits
    close(out, model(ids[1:]).logits[:, 14:])


@torch.no_grad()
def test_other_padding_beside_the_same_positions_is_read_again():
    model, ids = tiny_model("llama"), tiny_tokens(1)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    for start in (9, 4, 0):  # hidden, the first sequence leaves nothing packed; then it is there again
        mask = torch.ones_like(ids)
        mask[:, :start] = 0
        out = model(ids, position_ids=positions, attention_mask=mask.bool()).logits
        close(out[:, 9:], model(ids[:, 9:]).logits)
        if start < 9:
            close(out[:, start:9], model(ids[:, start:9]).logits)


@torch.no_grad()
def test_nan_at_padding_stays_there():
    model, ids = tiny_model("llama"), tiny_tokens()
    embedded = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    expected = model(inputs_embeds=embedded, attention_mask=mask).logits[0, 6:]
    spoilt = embedded.clone()
    spoilt[0, :6] = float("nan")
    close(model(inputs_embeds=spoilt, attention_mask=mask).logits[0, 6:], expected)


@torch.no_grad()
def test_the_model_computes_the_ten_lines_of_the_reference(case):
    model, ids, full = case
    with by_reference(model):
        close(model(ids, use_cache=False).logits, full)


@torch.no_grad()
def test_positions_written_in_place_are_read_again():
    """Where sequences begin is kept on the tensor of positions, so that a GPU is asked once a forward; not for longer."""
    model, ids = tiny_model("llama"), tiny_tokens(1)
    positions = torch.arange(23)[None].clone()
    full = model(ids, position_ids=positions).logits
    positions[:, 9:] -= 9
    packed = model(ids, position_ids=positions).logits
    close(packed[:, 9:], model(ids[:, 9:]).logits)
    assert (packed - full).abs().max() > 1e-3


@torch.no_grad()
def test_a_4d_mask_of_padding_is_read():
    model, ids = tiny_model("llama"), tiny_tokens()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    expected = model(ids, attention_mask=mask).logits
    visible = torch.ones(23, 23, dtype=torch.bool).tril() & (mask[:, None, None] > 0)
    additive = torch.zeros(2, 1, 23, 23).masked_fill(~visible, torch.finfo(torch.float32).min)
    for given in (visible, additive):
        close(model(ids, attention_mask=given).logits[:, 6:], expected[:, 6:])


def test_a_4d_mask_of_another_pattern_is_refused():
    model, ids = tiny_model("llama"), tiny_tokens()
    prefix = torch.ones(2, 1, 23, 23, dtype=torch.bool).tril()
    prefix[..., :5] = True
    with pytest.raises(ValueError, match="no other pattern"):
        model(ids, attention_mask=prefix)
