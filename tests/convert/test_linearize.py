"""convert.linearize: what comes out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shared_data import require_shared_data
from tiny_softmax import LAYERS, MODEL_TYPES, softmax_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import convert.weights
import recipes.common.checkpoint
from convert.linearize import LinearizeOptions, linearize
from hf_linattn import LinAttnParams

Checkpoint = Callable[..., Path]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_source_weight_is_there_bit_for_bit(model_type: str, softmax_checkpoint: Checkpoint, tmp_path: Path) -> None:
    report = linearize(softmax_checkpoint(model_type), tmp_path / "out")
    before, after = tensors(softmax_checkpoint(model_type)), tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    added = after.keys() - before.keys()
    assert added and all(".linattn." in name for name in added)
    assert report["check"]["tensors"] == len(before)
    assert report["check"]["layers"] == LAYERS and report["check"]["bar"] < 0.3
    assert report["parameters"] == {
        "source": sum(value.numel() for value in before.values()),
        "added": sum(after[name].numel() for name in added if not name.endswith("_offset")),  # beside where a number started
    }
    assert report == read_json(tmp_path / "out" / "conversion.json")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.get_input_embeddings().weight, softmax_model(model_type).get_input_embeddings().weight)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_shards_are_read_one_at_a_time(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    softmax_model(model_type).save_pretrained(source, max_shard_size="10KB")
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 5
    alive: list[int] = []
    cast = convert.weights._cast

    def watched(shard: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        found = cast(shard, dtype)
        alive.append(sum(tensor.nbytes for tensor in found.values()))
        return found

    monkeypatch.setattr(convert.weights, "_cast", watched)
    written: list[Path] = []
    linearize(source, tmp_path / "out", LinearizeOptions(dtype="bfloat16"), on_shard=written.append)
    assert len(written) == len(alive) + 1 == len(shards) + 1
    assert [file.name for file in written] == sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    # In bfloat16 each piece is half of one shard of the float32 source; nothing ever holds two of them.
    assert all(2 * size <= shard.stat().st_size for size, shard in zip(alive, shards, strict=True))
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values())
    assert set(index["weight_map"]) == set(tensors(tmp_path / "out"))
    for file in (tmp_path / "out").glob("*.safetensors"):  # older versions of Transformers refuse files without
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


@pytest.mark.slow  # test_conversion_memory.py measures the same of a smaller one
def test_conversion_takes_no_memory_of_the_models_size(tmp_path: Path) -> None:
    """A 256 MB checkpoint in 8 shards is converted, cast included, with less than two shards more than what starting takes."""
    script = f"""
import json, resource, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import LlamaConfig
from convert.linearize import LinearizeOptions, linearize
source = Path({str(tmp_path / "source")!r})
source.mkdir()
config = LlamaConfig(vocab_size=16, hidden_size=1024, intermediate_size=2048, num_hidden_layers=7, num_attention_heads=8,
                     architectures=["LlamaForCausalLM"], dtype="float32")
config.save_pretrained(source)
shapes = {{"self_attn.q_proj.weight": (1024, 1024), "self_attn.k_proj.weight": (1024, 1024), "self_attn.v_proj.weight": (1024, 1024),
    "self_attn.o_proj.weight": (1024, 1024), "mlp.gate_proj.weight": (2048, 1024), "mlp.up_proj.weight": (2048, 1024),
    "mlp.down_proj.weight": (1024, 2048), "input_layernorm.weight": (1024,), "post_attention_layernorm.weight": (1024,)}}
weight_map = {{}}
for layer in range(7):
    shard = {{f"model.layers.{{layer}}.{{name}}": torch.zeros(shape) for name, shape in shapes.items()}}
    if layer == 0:
        shard |= {{"model.embed_tokens.weight": torch.zeros(16, 1024), "lm_head.weight": torch.zeros(16, 1024)}}
        shard |= {{"model.norm.weight": torch.ones(1024)}}
    save_file(shard, source / f"model-{{layer + 1:05d}}-of-00007.safetensors", metadata={{"format": "pt"}})
    weight_map |= dict.fromkeys(shard, f"model-{{layer + 1:05d}}-of-00007.safetensors")
(source / "model.safetensors.index.json").write_text(json.dumps({{"weight_map": weight_map}}))
del shard
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
linearize(source, {str(tmp_path / "out")!r}, LinearizeOptions(check=False, dtype="float16"))
total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
print(json.dumps([peak() - before, total]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert done.returncode == 0, done.stderr
    more, total = json.loads(done.stdout.splitlines()[-1])
    assert total > 2.3e8
    assert more < 2 * total / 7


def test_options_reach_the_model(softmax_checkpoint: Checkpoint, tmp_path: Path, tokens: torch.Tensor) -> None:
    options = LinearizeOptions(kernel="quadratic", decay="none", keep_softmax=(1,), temperature=1.5, dropout=0.1, dtype="bfloat16")
    report = linearize(softmax_checkpoint(), tmp_path / "out", options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    attentions = [layer.self_attn for layer in model.model.layers]
    assert [hasattr(attention, "linattn") for attention in attentions] == [True, False, True]
    numbers = attentions[0].linattn()
    assert set(numbers) == {"a", "b", "c", "temperature"}
    torch.testing.assert_close(numbers["temperature"], torch.full((4,), 1.5))
    assert model.config.linattn["dropout"] == 0.1
    assert report["linear_layers"] == [0, 2]
    assert report["starting_values"]["temperature"] == [1.5] * 4
    assert report["options"]["keep_softmax"] == [1]


def test_without_learning(softmax_checkpoint: Checkpoint, tmp_path: Path) -> None:
    linearize(softmax_checkpoint(), tmp_path / "plain", LinearizeOptions(learnable=False, decay="none"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not any(isinstance(module, LinAttnParams) for module in model.modules())
    assert tensors(tmp_path / "plain").keys() == tensors(softmax_checkpoint()).keys()
    linearize(softmax_checkpoint(), tmp_path / "decay", LinearizeOptions(learnable=False, decay="head"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "decay")
    layers = [module for module in model.modules() if isinstance(module, LinAttnParams)]
    assert len(layers) == LAYERS and not any(list(layer.parameters()) for layer in layers)
    assert (-1 / layers[1]()["log_decay"])[0].item() == pytest.approx(1.5)


def test_kept_layers_are_the_sources(softmax_checkpoint: Checkpoint, tmp_path: Path, tokens: torch.Tensor) -> None:
    """With only the last layer linear, what enters it is what enters it in the source."""
    linearize(softmax_checkpoint(), tmp_path / "out", LinearizeOptions(keep_softmax=tuple(range(LAYERS - 1))))
    with torch.no_grad():
        source = AutoModelForCausalLM.from_pretrained(softmax_checkpoint())(tokens, output_hidden_states=True).hidden_states
        hybrid = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hybrid[LAYERS - 1], source[LAYERS - 1], rtol=1e-5, atol=1e-6)
    assert (hybrid[LAYERS] - source[LAYERS]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": (8, [0, 2])}),
        ("qwen2", {}),
        ("gemma2", {"sliding_window": (8, [0, 2]), "attn_logit_softcapping": (50.0, [0, 2])}),
        ("gemma3_text", {"sliding_window": (8, [0, 2])}),
    ],
)
def test_what_is_dropped_is_said(model_type: str, expected: dict[str, Any], softmax_checkpoint: Checkpoint, tmp_path: Path) -> None:
    report = linearize(softmax_checkpoint(model_type), tmp_path / "out", LinearizeOptions(keep_softmax=(1,), check=False))
    assert {item["what"]: (item["value"], item["layers"]) for item in report["dropped"]} == expected
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"`{what}`" in card for what in expected)
    assert "; layers 1 keep softmax" in card
    kept = (LinearizeOptions(keep_softmax=layers, check=False, overwrite=True) for layers in ((0, 2), (0, 1)))
    for options, words in zip(kept, ("0, 2", "0-1"), strict=True):
        linearize(softmax_checkpoint(model_type), tmp_path / "out", options)
        assert f"; layers {words} keep softmax" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["f(s) = a + b s, normalised", "with a learned decay per query head; 3 of 3 layers are linear.", "are the source's, and"]),
        ({"kernel": "quadratic", "learnable": False}, ["f(s) = a + b s + c s^2, normalised", "with a fixed decay per query head;"]),
        ({"decay": "none", "dtype": "bfloat16"}, ["cosine of query and key; 3 of 3 layers", "are the source's, cast to bfloat16, and"]),
    ],
    ids=str,
)
def test_the_card_says_what_it_is(options: dict[str, Any], words: list[str], softmax_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = Path(shutil.copytree(softmax_checkpoint(), tmp_path / "tiny-llama"))
    (source / "README.md").write_text("---\nlicense: [apache-2.0\n---\nA card whose metadata nobody can read.\n")
    linearize(source, tmp_path / "out", LinearizeOptions(check=False, **options))
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(word in card for word in ["# tiny-llama, with linear attention", "pipeline_tag: text-generation", *words]), card
    assert f"made by `hf_linattn` {version('hf_linattn')}. The package is on no index: install a wheel of it" in card
    assert "license:" not in card and "base_model" not in card


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    softmax_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    linearize(tmp_path / "source", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in tensors(tmp_path / "out")


def test_gpt_neox_head_is_found_under_its_stored_name(tmp_path: Path, softmax_checkpoint: Checkpoint) -> None:
    assert "embed_out.weight" in tensors(softmax_checkpoint("gpt_neox"))
    linearize(softmax_checkpoint("gpt_neox"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, softmax_model("gpt_neox").lm_head.weight)
    model.save_pretrained(tmp_path / "again")
    assert "embed_out.weight" in tensors(tmp_path / "again")


def test_stored_buffers_that_the_model_has_no_use_for(tmp_path: Path, softmax_checkpoint: Checkpoint) -> None:
    source = tmp_path / "source"
    softmax_model("gpt_neox").save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    weights["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    weights["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    weights["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    report = linearize(source, tmp_path / "out")
    assert len(report["check"]["ignored"]) == 3
    linearize(source, tmp_path / "half", LinearizeOptions(dtype="float16"))
    assert tensors(tmp_path / "half")["gpt_neox.layers.0.attention.bias"].dtype == torch.bool


@pytest.mark.parametrize(
    ("model_type", "old"),
    [
        ("llama", {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 5000, "torch_dtype": "float32"}),
    ],
)
def test_old_config_files_keep_their_meaning(model_type: str, old: dict[str, Any], tmp_path: Path, tokens: torch.Tensor) -> None:
    source = tmp_path / "source"
    softmax_model(model_type).save_pretrained(source)
    config = {key: value for key, value in read_json(source / "config.json").items() if key not in ("rope_parameters", "dtype")}
    (source / "config.json").write_text(json.dumps(config | old))
    linearize(source, tmp_path / "out", LinearizeOptions(keep_softmax=tuple(range(LAYERS - 1))))
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(source)(tokens, output_hidden_states=True).hidden_states[LAYERS - 1]
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens, output_hidden_states=True).hidden_states[LAYERS - 1]
        usual = softmax_model(model_type)(tokens, output_hidden_states=True).hidden_states[LAYERS - 1]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert (usual - before).abs().max() > 1e-4


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("named", ["LlamaTokenizer", "GPTNeoXTokenizerFast", "PreTrainedTokenizerFast", None])
def test_the_tokenizer_is_the_sources(model_type: str, named: str | None, softmax_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = Path(shutil.copytree(softmax_checkpoint(model_type), tmp_path / "source"))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "once": 3, "upon": 4, "a": 5, "time": 6}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    settings = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | ({"tokenizer_class": named} if named else {})
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    linearize(source, tmp_path / "out", LinearizeOptions(check=False))
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(after) is type(before)
    assert after("once upon a time").input_ids == before("once upon a time").input_ids
    assert after.chat_template == before.chat_template


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_other_heads(auto: Any, tmp_path: Path, softmax_checkpoint: Checkpoint, tokens: torch.Tensor) -> None:
    auto.from_pretrained(softmax_checkpoint()).save_pretrained(tmp_path / "source")
    report = linearize(tmp_path / "source", tmp_path / "out")
    assert report["check"]["layers"] == LAYERS
    assert "pipeline_tag" not in (tmp_path / "out" / "README.md").read_text()
    model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and type(model).__name__.startswith("LinAttnLlama")


def test_a_dtype_that_config_json_does_not_say_is_that_of_the_first_floating_tensor(tmp_path: Path) -> None:
    source = tmp_path / "source"
    softmax_model("llama").to(torch.bfloat16).save_pretrained(source)
    config = {key: value for key, value in read_json(source / "config.json").items() if key != "dtype"}
    (source / "config.json").write_text(json.dumps(config))
    assert (
        linearize(source, tmp_path / "out", LinearizeOptions(check=False))
        and read_json(tmp_path / "out/config.json")["dtype"] == "bfloat16"
    )
    scalars = {"a": torch.tensor(3), "b": torch.tensor([1, 2]), "c": torch.tensor(0.5, dtype=torch.float16), "d": torch.ones(2, 2)}
    for kept, found in (
        (scalars, torch.float16),
        ({"a": scalars["a"], "b": scalars["b"]}, torch.float32),
        ({"d": scalars["d"].double()}, torch.float64),
    ):
        save_file(kept, tmp_path / "file.safetensors")
        shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
        checkpoint = recipes.common.checkpoint.Checkpoint("x", tmp_path, None, {}, (tmp_path / "file.safetensors",), (shapes,))
        assert convert.weights.floating_dtype(checkpoint) == found


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float64"])
def test_any_stored_dtype_is_kept(stored: str, tmp_path: Path) -> None:
    softmax_model("llama").to(getattr(torch, stored)).save_pretrained(tmp_path / "source")
    linearize(tmp_path / "source", tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert all(str(value.dtype) == ("torch.float32" if ".linattn." in name else f"torch.{stored}") for name, value in after.items())
    assert str(AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype) == f"torch.{stored}"


def test_hub_id(softmax_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    blobs = Path(shutil.copytree(softmax_checkpoint(), tmp_path / "models--some-people--tiny-llama" / "blobs"))
    snapshot = blobs.parent / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\nA model.\n")

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(recipes.common.checkpoint, "snapshot_download", download)
    report = linearize("some-people/tiny-llama", tmp_path / "out", LinearizeOptions(revision="main"))
    assert asked["name"] == "some-people/tiny-llama" and asked["revision"] == "main"
    assert not any("bin" in pattern for pattern in asked["patterns"])
    assert report["source"] == "some-people/tiny-llama" and report["revision"] == "abc123"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: some-people/tiny-llama" in card and "license: apache-2.0" in card
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_overwrite_replaces_the_whole_folder(softmax_checkpoint: Checkpoint, tmp_path: Path) -> None:
    linearize(softmax_checkpoint(), tmp_path / "out")
    linearize(softmax_checkpoint(), tmp_path / "out", LinearizeOptions(overwrite=True, kernel="quadratic"))
    assert read_json(tmp_path / "out" / "config.json")["linattn"]["kernel"] == "quadratic"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_real_checkpoint_by_the_command_line(tmp_path: Path) -> None:
    source = require_shared_data("checkpoints", "stories260K")
    command = [sys.executable, "-m", "convert.linearize", str(source), str(tmp_path / "out"), "--decay", "head", "--keep-softmax", "1,4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"47 weights equal", done.stdout) and "260,032" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer, original = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(source)
    text = "Once upon a time, there was a little girl named Lily."
    assert type(tokenizer) is type(original)
    assert tokenizer(text).input_ids == original(text).input_ids
    assert GenerationConfig.from_pretrained(tmp_path / "out") == GenerationConfig.from_pretrained(source)
    tokens = torch.tensor([tokenizer(text).input_ids])
    loss = model(tokens, labels=tokens).loss.item()
    teacher = AutoModelForCausalLM.from_pretrained(source)(tokens, labels=tokens).loss.item()
    assert teacher < loss < teacher + 2
    assert model.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False).shape[1] == tokens.shape[1] + 8
