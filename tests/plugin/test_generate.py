"""generate() in all its forms gives what full forward passes give."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import transformers
from byte_models import TOKENS, byte_tokenizer
from generating import generate, left_padded
from learned import learned_model
from tiny_models import CAUSAL, tiny_model, tiny_tokens
from transformers import BartConfig, BartForConditionalGeneration, CompileConfig, DynamicCache, pipeline
from transformers.generation import BaseStreamer

import hf_linattn

WINDOW = {"form": "window", "window": 5, "sinks": 2, "decay": "head"}
STUDENTS = [  # the kinds of layers that a conversion makes, and mixtures of them
    ("qwen3", {"decay": "head"}),
    ("llama", {"kernel": "quadratic"}),
    ("llama", WINDOW),
    ("llama", {**WINDOW, "softmax_layers": [1]}),
    ("mistral", {"decay": "key_head", "softmax_layers": [0, 2]}),
]
VARIANTS = [(name, {}) for name in CAUSAL] + STUDENTS


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: "-".join([v[0], *map(str, v[1].values())]))
def model(request):
    name, options = request.param
    return tiny_model(name, **options)


def test_greedy(model):
    ids = tiny_tokens()
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


def test_sampling(model):
    ids, drawn = tiny_tokens(), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(generate(model, ids, do_sample=True, use_cache=use_cache))
    assert torch.equal(*drawn) and not torch.equal(drawn[0], generate(model, ids))


def test_beams(model):
    ids = tiny_tokens()
    assert torch.equal(generate(model, ids, num_beams=4), generate(model, ids, num_beams=4, use_cache=False))


def test_several_returned_sequences(model):
    ids, drawn = tiny_tokens(), []
    for use_cache in (True, False):
        torch.manual_seed(4)
        drawn.append(generate(model, ids, do_sample=True, num_return_sequences=3, use_cache=use_cache))
    assert drawn[0].shape[0] == 6 and torch.equal(*drawn)


def test_left_padding_gives_what_each_sequence_gives_alone(model):
    ids = tiny_tokens()
    padded, mask = left_padded(ids)
    alone = torch.cat([generate(model, ids[:1])[:, 23:], generate(model, ids[1:, :19])[:, 19:]])
    assert torch.equal(generate(model, padded, mask)[:, 28:], alone)


def test_prefill_in_chunks(model):
    padded, mask = left_padded(tiny_tokens())
    assert torch.equal(generate(model, padded, mask, prefill_chunk_size=6), generate(model, padded, mask))


def test_a_conversation_goes_on_from_returned_past_key_values(model):
    ids = tiny_tokens()
    first = generate(model, ids, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, tiny_tokens(2, 4, seed=5)], 1)
    assert torch.equal(generate(model, longer, past_key_values=first.past_key_values), generate(model, longer))


def test_static_cache(model):
    padded, mask = left_padded(tiny_tokens())
    assert torch.equal(generate(model, padded, mask, cache_implementation="static"), generate(model, padded, mask))


def test_prompt_lookup_takes_wrong_guesses_back(model):
    # a prompt that repeats itself, so that there are guesses, and a model that does not, so that most are wrong
    ids = tiny_tokens(1, 8).repeat(1, 3)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), generate(model, ids))


def test_prompt_lookup_behind_padding(model):
    ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), tiny_tokens(1, 8).repeat(1, 3)], 1)
    mask = (ids != 0).long()
    assert torch.equal(generate(model, ids, mask, prompt_lookup_num_tokens=3), generate(model, ids, mask))


def test_an_assistant_model_drafts(model):
    assistant = tiny_model("llama", scale=1.5)
    ids = tiny_tokens(1)
    assert torch.equal(generate(model, ids, assistant_model=assistant), generate(model, ids))


types_of_few = pytest.mark.skipif(
    transformers.__version__ < "5.23", reason="softmax models of Transformers 5.17 by itself end in an error there"
)
ends_early = pytest.mark.skipif(transformers.__version__ < "5.23", reason="Transformers 5.17 by itself ends such a text at its first token")


@pytest.mark.parametrize("drafts", [pytest.param({"prompt_lookup_num_tokens": 3}, marks=ends_early), {"assistant_model": True}], ids=str)
def test_an_encoder_and_its_decoder_draft_as_without_this_package(drafts):
    """Their cache holds two caches, and no layers of its own."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 97}
    model = BartForConditionalGeneration(BartConfig(**sizes, encoder_attention_heads=2, decoder_attention_heads=2)).eval()
    drafts = {name: model if value is True else value for name, value in drafts.items()}
    assert torch.equal(generate(model, tiny_tokens(1), **drafts), generate(model, tiny_tokens(1)))


@pytest.mark.parametrize("options", [{"decay": "head"}, {**WINDOW, "softmax_layers": [1]}, {"softmax_layers": [0]}], ids=str)
@pytest.mark.parametrize(
    "name", ["llama", pytest.param("qwen3", marks=types_of_few)]
)  # the latter's config goes on to name all layers' types
def test_a_model_drafts_by_its_first_layers(name, options):
    """While it does, its config says that there are fewer layers than one that keeps softmax."""
    model, ids = tiny_model(name, **options), tiny_tokens(1)
    expected = generate(model, ids)
    assert torch.equal(generate(tiny_model(name, **options), ids, assistant_early_exit=1), expected)


@pytest.mark.parametrize("drafts", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}], ids=str)
def test_drafts_behind_a_cache_that_has_begun_the_text_are_refused(drafts):
    """Transformers would give the model the whole text once more. An empty cache is as good as none, and does not record on."""
    model, ids = tiny_model("llama", decay="head"), tiny_tokens(1, 8).repeat(1, 3)
    drafts = {name: model if value is True else value for name, value in drafts.items()}
    cache = DynamicCache(config=model.config)
    first = generate(model, ids, past_key_values=cache, return_dict_in_generate=True, **drafts)
    assert torch.equal(first.sequences, generate(model, ids))
    assert first.past_key_values is cache and hf_linattn.cache_bytes(cache) == hf_linattn.cache_bytes(model(ids).past_key_values)
    longer = torch.cat([first.sequences, ids], 1)
    with pytest.raises(ValueError, match="gives the model the whole text again, and past_key_values has seen 31 tokens of it already"):
        generate(model, longer, past_key_values=cache, **drafts)
    assert torch.equal(generate(model, longer, past_key_values=cache), generate(model, longer))


def test_more_drafts_than_can_be_taken_back_are_refused():
    model, ids = tiny_model("llama", decay="head"), tiny_tokens(1, 600).repeat(1, 2)
    with pytest.raises(RuntimeError, match="cannot take 560 tokens back: it has recorded the last 256, .* Draft fewer at once"):
        generate(model, ids, prompt_lookup_num_tokens=560, max_new_tokens=570)


@pytest.fixture(params=STUDENTS, ids=lambda v: "-".join([v[0], *map(str, v[1].values())]))
def student(request):
    name, options = request.param
    return tiny_model(name, **options)


class Seen(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


def test_tokens_are_streamed(student):
    ids = tiny_tokens(1)
    for options in ({}, {"cache_implementation": "static"}):
        seen = Seen()
        out = generate(student, ids, streamer=seen, **options)
        assert seen.tokens == [*out[0].tolist(), "end"]


def test_the_same_bits_from_the_same_seed(student):
    scores = []
    for _ in range(2):
        torch.manual_seed(5)
        out = generate(student, tiny_tokens(), do_sample=True, return_dict_in_generate=True, output_scores=True)
        scores.append(torch.stack(out.scores))
    assert torch.equal(*scores)


@pytest.mark.parametrize("options", [{**WINDOW, "gate": "token"}, {"decay": "token", "output_map": "gate"}], ids=str)
def test_threads_share_a_model(options):
    """Each text goes on by the hidden states of its own, though another enters every layer before the first has left it."""
    model, texts, both = learned_model(**options), [tiny_tokens(1, 9, seed=1), tiny_tokens(1, 9, seed=2)], Barrier(2, timeout=60)
    alone = [generate(model, ids) for ids in texts]

    def wait(*_):
        both.wait()

    for layer in model.model.layers:  # its projections come behind what is kept of hidden states, and before attention
        layer.self_attn.q_proj.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda ids: generate(model, ids), texts))
    assert all(map(torch.equal, together, alone))


def test_a_pipeline_of_batches_gives_what_each_prompt_gives_alone(student):
    student.resize_token_embeddings(TOKENS)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    generator = pipeline("text-generation", model=student, tokenizer=tokenizer)
    prompts, options = ["once upon a time", "there was", "a"], {"max_new_tokens": 8, "do_sample": False}
    together = generator(prompts, batch_size=3, **options)
    assert together == [generator(prompt, **options) for prompt in prompts]


@pytest.mark.parametrize("options", [{}, {"decay": "head"}, {"kernel": "quadratic"}, WINDOW], ids=str)
def test_compiled_decoding_is_one_graph(options):
    model, ids = tiny_model("llama", layers=1, **options), tiny_tokens()
    padded, mask = left_padded(ids)
    expected = generate(model, padded, mask)
    # generate compiles by itself on accelerators only; the private name is how it is told to do so here
    model._compile_all_devices = True
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    out = generate(model, padded, mask, cache_implementation="static", compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(out, expected)
