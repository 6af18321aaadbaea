"""Left padding without position_ids: positions count real tokens, and each sequence gets what it gets alone."""

import inspect

import pytest
import torch
from learned import learned_model
from tiny_models import tiny_config, tiny_model, tiny_tokens
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaModel, OPTConfig, StaticCache

from hf_linattn.models import config_class_for
from hf_linattn.positions import COUNTS

SEES_POSITIONS = [{"features": 6}, {"feature_map": "hedgehog"}]
PADS = [9, 0, 14]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def batch(length=23):
    """A batch padded on the left: ids, mask and positions (3, length)."""
    mask = (torch.arange(length) >= torch.tensor(PADS)[:, None]).long()
    return tiny_tokens(3, length) * mask, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def check_rows(out, model, ids):
    """Each row of a padded batch's results is what its sequence gets alone."""
    for row, pads in enumerate(PADS):
        close(out[row, pads:], model(ids[row : row + 1, pads:], use_cache=False)[0][0])


def gpt2(**options):
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97, n_positions=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="linattn", **options).eval()


@pytest.fixture(scope="module")
def model():
    return learned_model(features=6)


@torch.no_grad()
@pytest.mark.parametrize("options", SEES_POSITIONS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_learned_features_of_rotated_keys(name, options):
    model, (ids, mask, _) = learned_model(name, **options), batch()
    check_rows(model(ids, attention_mask=mask).logits, model, ids)


@torch.no_grad()
def test_a_table_of_positions():
    model, (ids, mask, _) = gpt2(), batch()
    check_rows(model(ids, attention_mask=mask).logits, model, ids)


@torch.no_grad()
@pytest.mark.parametrize("as_given", ["bool", "float", "by place", "embeddings", "inner model"])
def test_however_the_mask_is_given(model, as_given):
    ids, mask, positions = batch()
    wanted = model(ids, attention_mask=mask, position_ids=positions).logits
    out = {
        "bool": lambda: model(ids, attention_mask=mask.bool()).logits,
        "float": lambda: model(ids, attention_mask=mask.float()).logits,
        "by place": lambda: model(ids, mask).logits,
        "embeddings": lambda: model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits,
        "inner model": lambda: model.lm_head(model.model(ids, mask, None)[0]),
    }[as_given]()
    assert torch.equal(out[mask > 0], wanted[mask > 0])


@torch.no_grad()
@pytest.mark.parametrize("columns", ["of the text", "of the cache"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("lengths", [[23], [16, 7], [4, 16, 1, 1, 1]], ids=str)
def test_a_text_goes_on_in_a_cache(model, lengths, kind, columns):
    ids, mask, _ = batch()
    cache = kind(config=model.config, **{"max_cache_len": 32} if kind is StaticCache else {})
    whole = torch.cat([mask, torch.zeros(3, 9, dtype=torch.long)], 1)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    told = [whole if columns == "of the cache" else mask[:, :end] for end in ends]
    out = [model(part, attention_mask=m, past_key_values=cache).logits for part, m in zip(ids.split(lengths, 1), told, strict=True)]
    check_rows(torch.cat(out, 1), model, ids)


@torch.no_grad()
def test_what_a_loop_generates_is_what_generate_does(model):
    ids, mask, _ = batch()
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    cache, new = DynamicCache(config=model.config), ids
    for _ in range(6):
        new = model(new, attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    assert torch.equal(ids, wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("converted", [False, True])
def test_a_loop_that_asks_for_the_next_inputs(converted, kind):
    model, (ids, mask, _) = learned_model(features=6) if converted else tiny_model("llama"), batch()
    cache = kind(config=model.config, **{"max_cache_len": 32} if kind is StaticCache else {})
    kept = {"attention_mask": mask[:, :17], "past_key_values": cache}
    out = model(ids[:, :17], **kept)
    logits = [out.logits]
    for column in range(17, 23):
        kept = model._update_model_kwargs_for_generation(out, kept)
        out = model(**model.prepare_inputs_for_generation(ids[:, : column + 1], next_sequence_length=1, **kept))
        logits.append(out.logits)
    check_rows(torch.cat(logits, 1), model, ids)


@torch.no_grad()
def test_real_tokens_before_padding_keep_their_bits(model):
    ids = tiny_tokens(3, 23)
    mask = (torch.arange(23) < torch.tensor([[23], [11], [17]])).long()
    wanted = model(ids, attention_mask=mask, position_ids=torch.arange(23)[None]).logits
    assert torch.equal(model(ids, attention_mask=mask).logits[mask > 0], wanted[mask > 0])


@torch.no_grad()
def test_positions_that_are_given_and_no_mask_are_left_alone(model):
    ids, mask, _ = batch()
    given, seen = torch.arange(23)[None] + 5, []
    hook = model.model.rotary_emb.register_forward_pre_hook(lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True)
    model(ids, attention_mask=mask, position_ids=given)
    model(ids)
    model(ids, attention_mask=torch.ones(3, 1, 23, 23).tril().bool())
    hook.remove()
    assert seen[0] is given
    assert [x.shape for x in seen[1:]] == [(1, 23), (1, 23)]


@torch.no_grad()
def test_compiled_in_one_graph(model):
    ids, mask, _ = batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(ids, attention_mask=mask, use_cache=False).logits[mask > 0], model(ids, attention_mask=mask).logits[mask > 0])
    cache = StaticCache(config=model.config, max_cache_len=32)
    whole = torch.cat([mask, torch.zeros(3, 9, dtype=torch.long)], 1)
    out = [compiled(part, attention_mask=whole, past_key_values=cache).logits for part in ids.split([15, 4, 4], 1)]
    check_rows(torch.cat(out, 1), model, ids)
    torch._dynamo.reset()


def test_gradient_checkpointing():
    model, (ids, mask, positions) = learned_model(features=6).train(), batch()
    labels = ids.masked_fill(mask == 0, -100)
    gradients = []
    for checkpointed, told in ((False, {"position_ids": positions}), (True, {})):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels, use_cache=False, **told).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_an_adapter_of_a_model_without_head():
    peft = pytest.importorskip("peft")
    stored = learned_model(features=6).config
    torch.manual_seed(0)
    base = AutoModel.from_config(config_class_for("llama")(**stored.to_diff_dict() | {"linattn": stored.linattn})).eval()
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids, mask, positions = batch()
    assert torch.equal(adapted(ids, attention_mask=mask)[0], adapted(ids, attention_mask=mask, position_ids=positions)[0])
    check_rows(adapted(ids, attention_mask=mask)[0], adapted, ids)


@torch.no_grad()
def test_softmax_counts_as_transformers_does():
    tiny_model("llama", layers=1)
    assert hasattr(LlamaModel.forward, COUNTS)
    columns, (ids, mask, _) = torch.arange(23)[None], batch()
    model = tiny_model("llama", "sdpa")
    assert torch.equal(model(ids, attention_mask=mask).logits, model(ids, attention_mask=mask, position_ids=columns).logits)
    model = gpt2()
    counted = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids, attention_mask=mask).logits, model(ids, attention_mask=mask, position_ids=columns).logits)
    model.set_attn_implementation("linattn")
    assert torch.equal(model(ids, attention_mask=mask).logits, counted)


@torch.no_grad()
def test_a_model_that_reads_positions_off_the_mask_itself():
    config = OPTConfig(hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=97, word_embed_proj_dim=64)
    torch.manual_seed(0)
    model, (ids, mask, _) = AutoModelForCausalLM.from_config(config, attn_implementation="linattn").eval(), batch()
    assert not any(hasattr(type(module).forward, COUNTS) for module in model.modules())
    check_rows(model(ids, attention_mask=mask).logits, model, ids)


def test_the_signature_stays():
    model = AutoModel.from_config(tiny_config("llama"), attn_implementation="linattn")
    assert list(inspect.signature(model.forward).parameters)[:3] == ["input_ids", "attention_mask", "position_ids"]
