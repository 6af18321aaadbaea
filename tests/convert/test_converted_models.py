"""The model classes of converted checkpoints under what people do with models: save, load, shard, cast, offload, train, adapt."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_softmax import MODEL_TYPES
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from convert.linearize import LinearizeOptions, linearize
from hf_linattn import LinAttnParams
from hf_linattn.models import STUB_NAME, config_class_for, model_class_for

Converted = Callable[..., Path]


@pytest.fixture(scope="session")
def converted(softmax_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A function: model type -> folder of its converted checkpoint, its new parameters moved away from where they start."""
    written: dict[str, Path] = {}

    def make(model_type: str = "llama") -> Path:
        if model_type not in written:
            first, folder = (tmp_path_factory.mktemp(model_type) / name for name in ("first", "trained"))
            linearize(softmax_checkpoint(model_type), first, LinearizeOptions(check=False))
            model = AutoModelForCausalLM.from_pretrained(first)
            generator = torch.Generator().manual_seed(2)
            for parameter in new_parameters(model).values():
                parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            model.save_pretrained(folder)
            written[model_type] = folder
        return written[model_type]

    return make


def new_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".linattn." in name}


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model.eval()(tokens).logits


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_auto_classes_load_what_was_saved(model_type: str, converted: Converted, tokens: Tensor, tmp_path: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(converted(model_type), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.model_type == "linattn_" + model_type
    assert model.config._attn_implementation == "linattn"
    assert len(new_parameters(model)) == 2 * model.config.num_hidden_layers
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    base = AutoModel.from_pretrained(converted(model_type)).eval()
    assert base(tokens)[0].shape == (2, 13, 32)
    name = next(iter(new_parameters(model)))
    found = dict(base.named_parameters())[name.partition(".")[2]]
    assert torch.equal(found, new_parameters(model)[name])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_starting_values_survive_a_load_that_lacks_the_parameters(model_type: str, softmax_checkpoint: Callable[..., Path]) -> None:
    config_class = config_class_for(model_type)
    folder = softmax_checkpoint(model_type)
    model, info = model_class_for(config_class).from_pretrained(
        folder, config=config_class.from_pretrained(folder), output_loading_info=True
    )
    starts = {name: buffer for name, buffer in model.named_buffers() if ".linattn." in name}
    assert set(info["missing_keys"]) == set(starts)
    for start in starts.values():
        torch.testing.assert_close(torch.sigmoid(start) * 0.999, torch.full_like(start, 0.98))
    assert len(new_parameters(model)) == len(starts) and not any(parameter.any() for parameter in new_parameters(model).values())
    direct = dict(model_class_for(config_class)(model.config).named_buffers())
    for name, start in starts.items():
        torch.testing.assert_close(direct[name], start)


def test_a_converted_class_without_options_learns() -> None:
    config_class = config_class_for("llama")
    model = model_class_for(config_class)(config_class(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2))
    assert model.config.linattn["learnable"] and new_parameters(model)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_stored_weight_names_are_read_as_the_base_reads_them(model_type: str) -> None:
    base_config, config_class = CONFIG_MAPPING[model_type], config_class_for(model_type)
    base, converted_class = MODEL_FOR_CAUSAL_LM_MAPPING[base_config], model_class_for(config_class)
    with torch.device("meta"):
        models = base(base_config(num_hidden_layers=1)), converted_class(config_class(num_hidden_layers=1))
    renamed = [[(rule.source_patterns, rule.target_patterns) for rule in get_model_conversion_mapping(model)] for model in models]
    assert renamed[0] == renamed[1]


def test_every_save_keeps_what_loading_needs(converted: Converted, tmp_path: Path) -> None:
    folder = converted()
    for generation in range(3):
        model = AutoModelForCausalLM.from_pretrained(folder)
        folder = tmp_path / "below" / "others" / str(generation)
        for _ in range(2):  # into a folder that is not there, and over itself
            model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["attn_implementation"] == "linattn"
        assert config["model_type"] == "linattn_llama"
        assert config["architectures"] == ["LinAttnLlamaForCausalLM"]
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_hf_linattn.LinAttnLlamaForCausalLM"
        assert (folder / STUB_NAME).is_file()


def test_trust_remote_code_needs_no_import(converted: Converted, tokens: Tensor, tmp_path: Path) -> None:
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(converted())!r}, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "again")!r})
torch.save(model.eval()(torch.tensor({tokens.tolist()})).logits, {str(tmp_path / "logits.pt")!r})
"""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = logits(AutoModelForCausalLM.from_pretrained(converted()), tokens)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "again").glob("*.py")) == [STUB_NAME]


def test_trust_remote_code_beside_the_import_saves_no_code_of_ours(converted: Converted, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted(), trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == [STUB_NAME]


def test_sharded_save(converted: Converted, tokens: Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_bfloat16_model_has_one_dtype_and_loses_nothing(model_type: str, converted: Converted, tokens: Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted(model_type), dtype=torch.bfloat16)
    exact = AutoModelForCausalLM.from_pretrained(converted(model_type))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    starts = {name: buffer for name, buffer in exact.named_buffers() if ".linattn." in name}
    for name, buffer in model.named_buffers():
        if name in starts:
            assert buffer.dtype == torch.float32 and torch.equal(buffer, starts[name])
    difference = (logits(model, tokens).float() - logits(exact, tokens)).abs().max()
    assert difference < 0.05 * logits(exact, tokens).abs().max()
    model.save_pretrained(tmp_path / "once")
    AutoModelForCausalLM.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "again")
    once, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("once", "again"))
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)
    assert all(once[name].dtype == torch.float32 and torch.equal(once[name], start) for name, start in starts.items())
    for cast in (exact.to(torch.bfloat16), exact.half()):
        assert all(torch.equal(dict(cast.named_buffers())[name], start) for name, start in starts.items())


def test_device_map_auto(converted: Converted, tokens: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted(), device_map="auto")
    assert torch.equal(logits(model, tokens).cpu(), logits(AutoModelForCausalLM.from_pretrained(converted()), tokens))


@pytest.mark.parametrize("is_trained", [False, True])
def test_layers_offloaded_to_disk(
    is_trained: bool, converted: Converted, softmax_checkpoint: Callable[..., Path], tokens: Tensor, tmp_path: Path
) -> None:
    """Of which every number is looked for in the checkpoint, those that were never trained too."""
    if not is_trained:
        linearize(softmax_checkpoint(), tmp_path / "first", LinearizeOptions(check=False))
    folder = converted() if is_trained else tmp_path / "first"
    resident = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    device_map = resident | {"model.layers.1": "disk", "model.layers.2": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(offloaded, tokens), logits(whole, tokens))
    ask = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(offloaded.generate(tokens, **ask), whole.generate(tokens, **ask))


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_gradient_checkpointing_changes_no_gradient(model_type: str, converted: Converted, tokens: Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(converted(model_type)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all((gradients[0][name].abs() > 0).any() for name in new_parameters(model))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_a_trained_checkpoint_is_saved_with_what_it_learned(converted: Converted, tokens: Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    before = load_file(converted() / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in new_parameters(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


def test_lora(converted: Converted, tokens: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(converted())
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["linattn"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    adapted(tokens, labels=tokens).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad and parameter.grad is not None}
    assert sum("linattn.modules_to_save" in name for name in trained) == 2 * 3
    assert any("lora_B" in name for name in trained)
    for name, parameter in adapted.named_parameters():
        if name in trained:
            parameter.data.add_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(converted()), tmp_path / "adapter")
    assert torch.equal(logits(again, tokens), logits(adapted, tokens))
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), logits(adapted, tokens), rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded, tokens), logits(adapted, tokens), rtol=1e-4, atol=1e-5)


def test_lora_beside_what_is_computed_from_hidden_states(softmax_checkpoint: Callable[..., Path], tokens: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    linearize(softmax_checkpoint("llama"), tmp_path / "model", LinearizeOptions(form="window", window=4, decay="token", check=False))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = logits(model, tokens)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, modules_to_save=["linattn"], task_type="CAUSAL_LM"))
    assert torch.equal(logits(adapted, tokens), expected)
    adapted(tokens, labels=tokens).loss.backward()
    gates = [parameter for name, parameter in adapted.named_parameters() if "modules_to_save" in name and name.endswith("_weight")]
    assert len(gates) == 2 * model.config.num_hidden_layers and all(gate.grad.abs().sum() > 0 for gate in gates)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, tokens), expected)


def test_sequence_classification_takes_the_body_of_a_causal_model(converted: Converted, tokens: Tensor) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(converted(), num_labels=3).eval()
    assert model(tokens).logits.shape == (2, 3)
    causal = AutoModelForCausalLM.from_pretrained(converted())
    for name, parameter in new_parameters(causal).items():
        assert torch.equal(dict(model.named_parameters())[name], parameter)


def test_compiles_as_one_graph(converted: Converted, tokens: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, logits(model, tokens))


def test_layers_of_a_kind_share_a_compiled_graph(softmax_checkpoint: Callable[..., Path], tokens: Tensor, tmp_path: Path) -> None:
    """The layers but one are of a kind; their places in the model are no part of it."""
    graphs: list[Any] = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    linearize(softmax_checkpoint(), tmp_path / "student", LinearizeOptions(check=False, keep_softmax=(0,)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    expected = logits(model, tokens)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend=counted)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected)
    assert len(graphs) == 2


def test_copies_and_pickles(converted: Converted, tokens: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, tokens), logits(model, tokens))


def test_the_plain_architecture_is_left_as_it_was(softmax_checkpoint: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(softmax_checkpoint())
    assert type(model).__module__.startswith("transformers.")
    assert not any(isinstance(module, LinAttnParams) for module in model.modules())
    assert AutoConfig.from_pretrained(softmax_checkpoint()).model_type == "llama"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match="'gpt_neo' is not supported; hf_linattn.models.BASE_MODEL_TYPES names those that are, gpt_neox and"
    ):
        config_class_for("gpt_neo")
    with pytest.raises(ValueError, match="'LlamaForNothing' is not supported; supported are LlamaModel"):
        model_class_for(config_class_for("llama"), "LlamaForNothing")
