"""A processed prompt is saved, and continued in another process and in many continuations; what another model has seen is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from learned import feed, learned_model
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import TEXT, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, DiffLlamaConfig, DynamicCache, StaticCache

from hf_linattn import load_cache, save_cache

MODELS: dict[str, Any] = {
    "plain": {},
    "head": {"decay": "head", "kernel": "quadratic"},
    "key head": {"decay": "key_head"},
    "token, features": {"decay": "token", "kernel": "quadratic", "features": 3},
    "feature map": {"decay": "head", "feature_map": "hedgehog"},
    "window alone": {"form": "window", "window": 5, "sinks": 2, "beside": "none"},
    "window": {"form": "window", "window": 5, "sinks": 2, "decay": "token", "gate": "token"},
    "hybrid": {"softmax_layers": [1], "decay": "head"},
    "hybrid, sliding": {"name": "mistral", "softmax_layers": [0, 2], "decay": "head"},
}
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
CHILD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
import hf_linattn

folder, ids, mask, options = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder)
cache = hf_linattn.load_cache(folder + "/prompt.safetensors", model)
print(model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), past_key_values=cache, **options).tolist())
"""


def padded_prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences of 23 and 19 tokens, the second padded on the left."""
    ids = tiny_tokens()
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    return ids, mask


def processed(model: Any, static: bool = False) -> Any:
    ids, mask = padded_prompt()
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
    feed(model, ids, cache, [ids.shape[1]], attention_mask=mask, position_ids=positions(mask))
    return cache


def positions(mask: torch.Tensor) -> torch.Tensor:
    """As `generate` counts them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def go_on(model: Any, cache: Any, copies: int = 1) -> torch.Tensor:
    """Logits of the next five tokens, of which the first three come together."""
    new = tiny_tokens(2, 5, seed=5).repeat_interleave(copies, 0)
    mask = torch.cat([padded_prompt()[1].repeat_interleave(copies, 0), torch.ones_like(new)], 1)
    parts = []
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        so_far = mask[:, : 23 + stop]
        where = {"attention_mask": so_far, "position_ids": positions(so_far)[:, 23 + start :]}
        parts.append(feed(model, new[:, start:stop], cache, [stop - start], **where))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", MODELS)
def test_goes_on_as_if_nothing_had_been_in_between(kind: str, tmp_path: Path) -> None:
    """To the bit; from a cache of either kind into one of either kind."""
    options = dict(MODELS[kind])
    model = learned_model(options.pop("name", "llama"), **options)
    statics = (False,) if kind == "hybrid, sliding" else (False, True)
    for static in statics:
        cache, path = processed(model, static), tmp_path / f"{static}.safetensors"
        save_cache(cache, path, model)
        expected = go_on(model, cache)
        for length in (None, 40)[: len(statics)]:
            torch.testing.assert_close(go_on(model, load_cache(path, model, max_cache_len=length)), expected, atol=1e-6, rtol=0)
        if not static:
            assert torch.equal(go_on(model, load_cache(path, model)), expected)


def test_goes_on_in_another_process(tmp_path: Path) -> None:
    model, (ids, mask) = learned_model(**MODELS["window"], softmax_layers=[1]), padded_prompt()
    model.save_pretrained(tmp_path)
    save_cache(processed(model), tmp_path / "prompt.safetensors", model)
    longer = torch.cat([ids, tiny_tokens(2, 3, seed=5)], 1)
    mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    given = json.dumps([str(tmp_path), longer.tolist(), mask.tolist(), NEW])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    out = subprocess.run([sys.executable, "-c", CHILD, given], env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout) == model.generate(longer, attention_mask=mask, **NEW).tolist()


@pytest.mark.parametrize("kind", ["hybrid", "window"])
def test_branches_into_many_continuations(kind: str, tmp_path: Path) -> None:
    model, (ids, mask) = learned_model(**MODELS[kind]), padded_prompt()
    cache = processed(model)
    save_cache(cache, tmp_path / "prompt", model)
    expected = go_on(model, cache)
    torch.testing.assert_close(go_on(model, load_cache(tmp_path / "prompt", model, copies=3), 3), expected.repeat_interleave(3, 0))
    new = tiny_tokens(6, 2, seed=8)
    longer, mask = torch.cat([ids.repeat_interleave(3, 0), new], 1), torch.cat([mask.repeat_interleave(3, 0), torch.ones_like(new)], 1)
    branched = model.generate(longer, attention_mask=mask, past_key_values=load_cache(tmp_path / "prompt", model, copies=3), **NEW)
    assert torch.equal(branched, model.generate(longer, attention_mask=mask, **NEW))


def test_every_reader_of_one_update_is_saved(tmp_path: Path) -> None:
    """Differential attention reads what `update` returns twice, so that a layer has two states."""

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DiffLlamaConfig(**TEXT), attn_implementation="linattn").eval()
    cache = processed(model)
    assert cache.layers[0]._more
    save_cache(cache, tmp_path / "prompt", model)
    assert torch.equal(go_on(model, load_cache(tmp_path / "prompt", model)), go_on(model, cache))


def test_the_file_is_whole_or_absent_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = tiny_model("llama"), tmp_path / "prompt"
    cache = processed(model)
    save_cache(cache, path, model)
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask() and [x.name for x in tmp_path.iterdir()] == ["prompt"]
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists already; give another path, or overwrite=True"):
        save_cache(cache, path, model)
    go_on(model, cache)
    save_cache(cache, path, model, overwrite=True)
    assert path.read_bytes() != before

    def breaks_off(tensors: Any, aside: Path, about: Any) -> None:
        aside.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_linattn.saved_prompts.save_file", breaks_off)
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space"):
        save_cache(cache, path, model, overwrite=True)
    assert path.read_bytes() == before and [x.name for x in tmp_path.iterdir()] == ["prompt"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def other_weights() -> Any:
    model = tiny_model("llama", decay="head")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    return model


OTHERS = {
    "model_type='llama', and this one has 'gpt_neox'": lambda: tiny_model("gpt_neox", decay="head"),
    "dtype='torch.float32', and this one has 'torch.bfloat16'": lambda: tiny_model("llama", decay="head").bfloat16(),
    "attn_implementation='linattn', and this one has 'sdpa'": lambda: tiny_model("llama", "sdpa", decay="head"),
    "linattn.form='polynomial', and this one has 'window'": lambda: tiny_model("llama", form="window", decay="head"),
    "linattn.kernel='linear', and this one has 'quadratic'": lambda: tiny_model("llama", decay="head", kernel="quadratic"),
    r"linattn.softmax_layers=\[\], and this one has \[1\]": lambda: tiny_model("llama", decay="head", softmax_layers=[1]),
    "num_hidden_layers=3, and this one has 2": lambda: tiny_model("llama", decay="head", layers=2),
    "of the same kind and size with other weights": other_weights,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, model = tmp_path_factory.mktemp("saved") / "prompt", tiny_model("llama", decay="head")
    save_cache(processed(model), path, model)
    return path


@pytest.mark.parametrize("sentence", OTHERS)
def test_what_another_model_has_seen_is_refused(sentence: str, saved: Path) -> None:
    with pytest.raises(ValueError, match=f"was saved by a model .*{sentence}.*; load it with the model that processed the prompt"):
        load_cache(saved, OTHERS[sentence]())


def test_what_an_adapter_has_seen_is_refused_without_it(tmp_path: Path) -> None:
    """Its weights are in the model all the same, whether it is switched off, makes room for another or is scaled."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama", decay="head"), lora)
    model.add_adapter("other", lora)
    path, ids = tmp_path / "prompt", tiny_tokens()
    save_cache(model(ids).past_key_values, path, model)
    expected = model(ids).past_key_values.layers[2].state["sums"]
    torch.testing.assert_close(load_cache(path, model).layers[2].state["sums"], expected)
    refused = r"adapters=\['default \* 1.0'\], and this one has "
    with model.disable_adapter(), pytest.raises(ValueError, match=refused + r"\[\]"):
        load_cache(path, model)
    model.set_adapter("other")
    with pytest.raises(ValueError, match=refused + r"\['other \* 1.0'\]"):
        load_cache(path, model)
    model.set_adapter("default")
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    with pytest.raises(ValueError, match=refused + r"\['default \* 0.5'\]"):
        load_cache(path, model)


def test_a_file_that_is_none_or_damaged_is_refused(saved: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", decay="head")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_cache(tmp_path / "absent", model)
    (tmp_path / "noise").write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        load_cache(tmp_path / "noise", model)
    with safe_open(saved, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "weights", {"format": "pt"})
    with pytest.raises(ValueError, match="holds no cache of the format"):
        load_cache(tmp_path / "weights", model)
    save_file(tensors, tmp_path / "longer", about | {"tokens": "24"})
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["0.state.sums"][0, 0, 0, 0] += 1
    save_file(changed, tmp_path / "changed", about)
    for name in ("longer", "changed"):
        with pytest.raises(ValueError, match="was changed since it was written, or is damaged"):
            load_cache(tmp_path / name, model)


def test_what_cannot_be_saved_or_continued_is_refused(saved: Path, tmp_path: Path) -> None:
    model, path = tiny_model("llama", decay="head"), tmp_path / "prompt"
    with pytest.raises(ValueError, match="has seen no token"):
        save_cache(DynamicCache(config=model.config), path, model)
    with pytest.raises(ValueError, match=r"not made for this model; make it by DynamicCache\(config=model.config\)"):
        save_cache(processed(tiny_model("llama", softmax_layers=[1])), path, model)
    seen_both_ways, cache = tiny_model("llama", decay="head"), processed(model)
    cache.reset()  # what it holds now are states of nothing
    seen_both_ways.config.is_causal = False
    with torch.no_grad():
        seen_both_ways(tiny_tokens(), past_key_values=cache)
    with pytest.raises(ValueError, match="Layer 0 has seen tokens both ways"):
        save_cache(cache, path, model)
    sliding = tiny_model("mistral", softmax_layers=[1])
    with pytest.raises(ValueError, match="Layer 1 of the cache is a StaticSlidingWindowLayer"):
        save_cache(processed(sliding, static=True), path, sliding)
    with pytest.raises(ValueError, match=r"not made for this model; make it by DynamicCache"):
        save_cache(processed(tiny_model("llama", decay="key_head")), path, model)
    with pytest.raises(FileNotFoundError, match="There is no folder .*absent to write prompt to; make it first"):
        save_cache(processed(model), tmp_path / "absent" / "prompt", model)
    with pytest.raises(FileExistsError, match="is a folder, and a prompt is saved as one file"):
        save_cache(processed(model), tmp_path, model, overwrite=True)
    with pytest.raises(TypeError, match=r"copies must be a whole number, not 1\.5"):
        load_cache(saved, model, copies=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"max_cache_len must be a whole number, not '40'"):
        load_cache(saved, model, max_cache_len="40")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="copies=0 leaves no sequence"):
        load_cache(saved, model, copies=0)
    with pytest.raises(ValueError, match="max_cache_len=23 leaves no room behind the 23 tokens"):
        load_cache(saved, model, max_cache_len=23)
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="is offloaded"):
        load_cache(saved, model)
    assert not path.exists() and not list(tmp_path.iterdir())
