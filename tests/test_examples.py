"""Every example does what it shows, on tiny models."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from byte_models import byte_model, byte_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import hf_linattn
from recipes.quickstart.corpus import stories

EXAMPLES = Path(__file__).parent.parent / "examples"
CHATML = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def softmax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "softmax"
    byte_model(max_position_embeddings=256).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(stories(30, seed=1)), encoding="utf-8")
    return file


def test_the_table_names_all_of_them() -> None:
    told = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}" in told for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_ways_they_are_called(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without what they take they say it in a line, the one that the table and their first line have."""
    called = re.findall(rf"python examples/({path.name}(?: \[?[A-Z]+\]?)*)", path.read_text(encoding="utf-8"))[0]
    assert f"| `{called}` |" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    if called == path.name:
        return
    if path.stem == "sft_with_lora":
        pytest.importorskip("trl", reason="TRL is for Python 3.11 and later")
    for given, status in (["--help"], 0), (["one", "word", "too", "many"], 2), ([], 2):
        if "[" in called and not given:
            continue
        monkeypatch.setattr(sys, "argv", [str(path), *given])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        told = capsys.readouterr()
        assert ended.value.code == status and f"usage: {called.replace(' ', ' [-h] ', 1)}" in told.out + told.err


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("convert_and_chat", ["absent", "there"], "error: there exists already; give another OUTPUT"),
        ("convert_and_chat", ["./absent", "new"], "error: there is no folder ./absent"),
        ("train_with_noise", ["absent", "absent.txt", "new"], "error: absent.txt: no such file; give the text to train on"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(
    name: str, given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_convert_and_chat(softmax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example("convert_and_chat", monkeypatch).main(str(softmax), str(tmp_path / "out"))
    told = capsys.readouterr().out
    assert "3 layers are linear" in told and "> Tell me about a little owl." in told and "the cache holds" in told


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_conversation_is_what_it_would_be_if_every_turn_read_it_from_the_start(
    template: str | None, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = example("convert_and_chat", monkeypatch)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(converted).eval(), byte_tokenizer()
    tokenizer.chat_template = template
    generate, lengths = model.generate, []

    def from_the_start(ids: torch.Tensor, past_key_values=None, **options):
        lengths.append((ids.shape[1], past_key_values.get_seq_length() if past_key_values is not None else 0))
        return generate(ids, **options)

    replies = chat.chat(model, tokenizer)
    monkeypatch.setattr(model, "generate", from_the_start)
    assert chat.chat(model, tokenizer) == replies and all(replies)
    assert lengths[1][1] == lengths[0][0] + 30 - 1


@pytest.fixture
def converted(softmax: Path, tmp_path: Path) -> Path:
    from convert.linearize import linearize

    linearize(softmax, tmp_path / "converted")
    return tmp_path / "converted"


def test_train_with_noise(converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = example("train_with_noise", monkeypatch)
    monkeypatch.setattr(trainer, "STEPS", 3)
    trainer.main(str(converted), str(text), str(tmp_path / "trained"))
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (converted, tmp_path / "trained"))
    assert after.config._attn_implementation == "linattn"
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not (old == new).all(), name


def test_sft_with_lora(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="TRL is for Python 3.11 and later")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"A story: {one[:40]}", "completion": one[40:200]}) for one in stories(12, seed=1)))
    lora = example("sft_with_lora", monkeypatch)
    monkeypatch.setattr(lora, "STEPS", 3)
    lora.main(str(converted), str(data), str(tmp_path / "adapter"))
    assert "attention of the adapter's model: linattn" in capsys.readouterr().out
    before = dict(AutoModelForCausalLM.from_pretrained(converted).named_parameters())
    after = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    added = [name for name in before if "linattn" in name]
    for name in added:
        [found] = [value for key, value in after.items() if key.endswith(name.removeprefix("model."))]
        assert not (before[name] == found).all(), name
    assert added and all(value.abs().max() > 0 for key, value in after.items() if "lora_B" in key)


def test_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    assert example("encoder", monkeypatch).main(str(tmp_path / "bert"), steps=150) == 1.0


def test_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert example("own_model", monkeypatch).main().startswith("the cat sat on the mat and the dog")
    assert hf_linattn.linear_attention_step is not None
