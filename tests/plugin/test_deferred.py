"""Whether a text has ended is read a token late, and nobody can tell: not from tokens, streamers, random numbers, or what is called."""

import pytest
import torch
from compiling import compile_config, converted
from generating import generate, left_padded
from tiny_models import tiny_tokens
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria, SynthIDTextWatermarkLogitsProcessor
from transformers.generation import BaseStreamer

from hf_linattn import deferred

LONG = {"max_new_tokens": 24, "min_new_tokens": 0}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static", "compile_config": compile_config()}}


class Event:
    """Of a device that has none."""

    def __init__(self, **_):
        pass

    record = synchronize = lambda self: None


@pytest.fixture
def late(monkeypatch):
    """As on a GPU; lists what was asked for at each text."""
    asked = []
    theirs = deferred.DeferredStopCheck.is_supported

    def is_supported(*given, **named):
        asked.append(theirs(*given, **named))
        return asked[-1]

    monkeypatch.setattr(deferred, "DEVICES", ("cpu",))
    monkeypatch.setattr(deferred.DeferredStopCheck, "is_supported", staticmethod(is_supported))
    monkeypatch.setattr(torch, "Event", Event)
    return asked


class Streamer(BaseStreamer):
    def __init__(self):
        self.given = []

    def put(self, value):
        self.given.append(value.tolist())

    def end(self):
        self.given.append("end")


def both_ways(monkeypatch, run):
    """What `run` gives where the end is read at once, and late."""
    with monkeypatch.context() as patch:
        patch.setattr(deferred, "DEVICES", ())
        at_once = run()
    return at_once, run()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("number", [0, 1, 7, 22, 23])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_text_ends_where_it_ends(batch, number, cache, late, monkeypatch):
    model, (ids, mask) = converted(decay="head"), left_padded(tiny_tokens())
    ids, mask = ids[:batch], mask[:batch]
    whole = generate(model, ids, mask, **LONG | {"min_new_tokens": 24})
    ends = {"eos_token_id": whole[:, ids.shape[1] + number].tolist()}

    def run():
        streamer = Streamer() if batch == 1 else None
        out = generate(model, ids, mask, **LONG, **ends, **CACHES[cache], streamer=streamer)
        return out.tolist(), streamer and streamer.given

    at_once, now = both_ways(monkeypatch, run)
    assert now == at_once and late[-2:] == [False, True]
    assert len(now[0][0]) <= ids.shape[1] + number + 1


@pytest.mark.parametrize("number, more", [(7, 1), (23, 0)])
def test_one_pass_more_than_there_are_tokens(number, more, late, monkeypatch):
    model, ids = converted(decay="head"), tiny_tokens(1)
    ends = {"eos_token_id": int(generate(model, ids, **LONG | {"min_new_tokens": 24})[0, ids.shape[1] + number])}
    passes, pass_on = [], model._update_model_kwargs_for_generation
    monkeypatch.setattr(model, "_update_model_kwargs_for_generation", lambda *given, **named: passes.append(1) or pass_on(*given, **named))
    new = generate(model, ids, **LONG, **ends).shape[1] - ids.shape[1]
    assert len(passes) == new + more and late[-1]


@pytest.mark.parametrize("ends", [True, False])
def test_the_same_random_numbers_now_and_afterwards(ends, late, monkeypatch):
    model, ids = converted(decay="head"), tiny_tokens()
    torch.manual_seed(0)
    whole = generate(model, ids, **LONG | {"min_new_tokens": 24, "do_sample": True})
    eos = {"eos_token_id": whole[:, ids.shape[1] + 6].tolist()} if ends else {}

    def run():
        torch.manual_seed(0)
        texts = [generate(model, ids, **LONG | {"do_sample": True, "top_k": 20}, **eos).tolist() for _ in range(2)]
        return texts, torch.randn(3).tolist()

    at_once, now = both_ways(monkeypatch, run)
    assert now == at_once and late[-2:] == [True, True]


class Does(Streamer):
    """What it is told to at the third token."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def put(self, value):
        super().put(value)
        if len(self.given) == 4:
            self.what()


@pytest.mark.parametrize("number", [2, 3, 7])
def test_numbers_that_others_draw_meanwhile_are_not_drawn_again(number, late):
    model, ids = converted(decay="head"), tiny_tokens(1)
    ends = {"eos_token_id": int(generate(model, ids, **LONG | {"min_new_tokens": 24})[0, ids.shape[1] + number])}
    drawn = []
    generate(model, ids, **LONG, **ends, streamer=Does(lambda: drawn.append(torch.rand(1))))
    assert late[-1] and drawn and drawn[0] != torch.rand(1)


def test_another_model_that_generates_meanwhile_is_as_it_was(late):
    from tiny_models import GROUPED, TEXT
    from transformers import LlamaConfig, LlamaForCausalLM

    model, ids = converted(decay="head"), tiny_tokens(1)
    other = LlamaForCausalLM(LlamaConfig(**TEXT, **GROUPED)).eval()
    generate(model, ids, **LONG, streamer=Does(lambda: generate(other, ids)))
    assert late == [True, False]


class Own(LogitsProcessor):
    def __call__(self, ids, scores):
        return scores


class End(StoppingCriteria):
    def __call__(self, ids, scores, **_):
        return torch.zeros(len(ids), dtype=torch.bool)


WATERMARK = SynthIDTextWatermarkLogitsProcessor(3, [1, 2, 3], 64, 0, 16, torch.device("cpu"))


class Stop(Exception):
    pass


class Fails(Streamer, StoppingCriteria):
    """At the fifth token, or at the prompt where that is given as well."""

    def put(self, value):
        super().put(value)
        if len(self.given) == 5:
            raise Stop

    def __call__(self, ids, scores, **_):
        self.put(ids[0])
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize("place", ["streamer", "stopping_criteria"])
def test_an_exception_comes_at_the_same_token(place, late, monkeypatch):
    model, ids = converted(decay="head"), tiny_tokens(1)

    def run():
        fails = Fails()
        with pytest.raises(Stop):
            generate(model, ids, **LONG, **{place: fails if place == "streamer" else [fails]})
        return fails.given

    at_once, now = both_ways(monkeypatch, run)
    assert now == at_once and late == [False, place == "streamer"]
    assert not deferred._may_have_one_more()


def test_the_cache_that_is_handed_back_holds_the_text_and_no_more(late):
    model, ids = converted(decay="head"), tiny_tokens(1)
    ends = {"eos_token_id": int(generate(model, ids, **LONG | {"min_new_tokens": 24})[0, ids.shape[1] + 7])}
    out = generate(model, ids, **LONG, **ends, return_dict_in_generate=True)
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    assert late == [True, False]


@pytest.mark.parametrize(
    "given",
    [
        {"return_dict_in_generate": True},
        {"past_key_values": DynamicCache},
        {"logits_processor": [Own()]},
        {"logits_processor": [WATERMARK]},
        {"stopping_criteria": [End()]},
        {"prefix_allowed_tokens_fn": lambda number, ids: [5, 6, 7]},
        {"synced_gpus": True},
        {"streamer": Streamer(), "do_sample": True},
        {"hook": True},
    ],
    ids=lambda given: next(iter(given)),
)
def test_at_once_where_a_token_more_would_be_seen(given, late, monkeypatch):
    model, ids = converted(decay="head"), tiny_tokens()
    if "hook" in given:
        model.model.norm.register_forward_hook(lambda module, args, out: None)
    monkeypatch.setattr(model, "_has_unfinished_sequences", lambda ended, *_, **__: not ended)  # there is one process
    own_cache = {"past_key_values": DynamicCache(config=model.config)} if "past_key_values" in given else {}
    generate(model, ids, **LONG, **{name: value for name, value in given.items() if name != "hook"} | own_cache)
    assert late == [False]
    generate(model, ids, **LONG)
    assert late[1:] == [not model.model.norm._forward_hooks]


def test_at_once_where_positions_end_behind_the_text(late):
    """GPT-2's table has as many rows as the prompt has tokens, and the first token behind it ends the text."""
    ids = tiny_tokens(1)
    model = converted("gpt2")
    whole = generate(model, ids, **LONG | {"min_new_tokens": 24})
    model.transformer.wpe = torch.nn.Embedding.from_pretrained(model.transformer.wpe.weight[: ids.shape[1]])
    end = {"eos_token_id": int(whole[0, ids.shape[1]])}
    assert torch.equal(generate(model, ids, **LONG, **end), whole[:, : ids.shape[1] + 1])
    assert late == [False, False]


def test_other_models_are_as_they_were(late):
    from tiny_models import GROUPED, TEXT
    from transformers import LlamaConfig, LlamaForCausalLM

    generate(LlamaForCausalLM(LlamaConfig(**TEXT, **GROUPED)).eval(), tiny_tokens())
    assert late == [False]


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_text_ends_where_it_ends_on_a_gpu(cache, do_sample, monkeypatch):
    torch._dynamo.reset()
    device = torch.device("cuda")
    model, ids = converted(decay="head").to(device), tiny_tokens(1).to(device)
    options = {**LONG, "do_sample": do_sample, "cache_implementation": "static" if cache == "static" else None}
    torch.manual_seed(0)
    whole = generate(model, ids, **options | {"min_new_tokens": 24})

    def run():
        torch.manual_seed(0)
        streamer = Streamer()
        out = generate(model, ids, **options, eos_token_id=int(whole[0, ids.shape[1] + 9]), streamer=streamer)
        return out.tolist(), streamer.given, torch.randn(3, device=device).tolist()

    at_once, now = both_ways(monkeypatch, run)
    assert now == at_once
