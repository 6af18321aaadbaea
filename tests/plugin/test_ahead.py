"""What is appended to a text's mask and positions ahead of its tokens is what Transformers appends at each of them."""

import pytest
import torch
from compiling import converted
from generating import generate, left_padded
from tiny_models import tiny_tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationMixin

from hf_linattn import ahead, texts

THEIRS = GenerationMixin._update_model_kwargs_for_generation


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(ahead, "COLUMNS", 4)
    with texts.text():  # as `generate` is while it asks
        yield


@pytest.fixture
def model():
    return converted(layers=1, decay="head")


def kept_of(batch, **others):
    mask = left_padded(tiny_tokens())[1][:batch]
    return {"attention_mask": mask, "use_cache": True, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0), **others}


def same(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]) and value.dtype == other[name].dtype
        else:
            assert value is other[name]


@pytest.mark.parametrize("batch", [1, 2])
def test_each_token_finds_what_transformers_appends(model, batch):
    ours, theirs = kept_of(batch), kept_of(batch)
    for _ in range(11):
        ours, theirs = model._update_model_kwargs_for_generation({}, ours), THEIRS(model, {}, theirs)
        same(ours, theirs)


def test_a_loop_of_the_users_has_masks_of_its_own(model, monkeypatch):
    monkeypatch.setattr(texts, "is_generating", lambda: False)
    kept = [kept_of(2)]
    for _ in range(3):
        kept.append(model._update_model_kwargs_for_generation({}, kept[-1]))
    before = [one["attention_mask"].clone() for one in kept]
    kept[-1]["attention_mask"].zero_()
    assert all(torch.equal(one["attention_mask"], was) for one, was in zip(kept[:-1], before, strict=False))


def test_what_is_written_into_them_stays(model):
    ours, theirs = kept_of(2), kept_of(2)
    for number in range(9):
        for kept in (ours, theirs):
            if number == 3:
                kept["position_ids"][:, -1] = 77
            if number == 5:
                kept["attention_mask"][0, -2:] = 0
        ours, theirs = model._update_model_kwargs_for_generation({}, ours), THEIRS(model, {}, theirs)
        same(ours, theirs)


@pytest.mark.parametrize(
    "others, more",
    [
        ({"attention_mask": None}, {}),
        ({"position_ids": None}, {}),
        ({"attention_mask": torch.ones(2, 28, dtype=torch.bool)}, {}),
        ({"position_ids": torch.arange(28).expand(3, 2, 28)}, {}),
        ({"token_type_ids": torch.arange(28).expand(2, 28)}, {}),
        ({}, {"num_new_tokens": 3}),
    ],
    ids=["no mask", "no positions", "bool", "three positions a token", "types", "several"],
)
def test_whatever_is_kept(model, others, more):
    ours, theirs = kept_of(2, **others), kept_of(2, **others)
    for _ in range(6):
        ours, theirs = model._update_model_kwargs_for_generation({}, ours, **more), THEIRS(model, {}, theirs, **more)
        same(ours, theirs)


def test_under_inference_mode_and_behind_it(model):
    with torch.inference_mode():
        ours, theirs = kept_of(2), kept_of(2)
        for _ in range(3):
            ours, theirs = model._update_model_kwargs_for_generation({}, ours), THEIRS(model, {}, theirs)
    for _ in range(3):
        ours, theirs = model._update_model_kwargs_for_generation({}, ours), THEIRS(model, {}, theirs)
    same(ours, theirs)


class Counted(TorchDispatchMode):
    """Counts operators that are no views."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **kwargs or {})


def test_a_token_asks_the_device_for_nothing(model, monkeypatch):
    monkeypatch.setattr(ahead, "COLUMNS", 1024)
    kept = model._update_model_kwargs_for_generation({}, kept_of(2))
    with Counted() as counted:
        for _ in range(5):
            kept = model._update_model_kwargs_for_generation({}, kept)
    assert counted.count == 0


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_texts_longer_than_what_was_made_at_once(cache):
    model, (ids, mask) = converted(decay="head"), left_padded(tiny_tokens())
    options = {"max_new_tokens": 13, "min_new_tokens": 13}
    expected = generate(model, ids, mask, use_cache=False, **options)
    assert torch.equal(generate(model, ids, mask, cache_implementation=cache, **options), expected)
