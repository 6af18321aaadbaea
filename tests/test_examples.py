"""Every example does what it shows, on tiny models."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from byte_models import byte_model, byte_tokenizer
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import hf_linattn
from recipes.quickstart.corpus import stories

EXAMPLES = Path(__file__).parent.parent / "examples"


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


def test_convert_and_generate(softmax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example("convert_and_generate", monkeypatch).main(str(softmax), str(tmp_path / "out"))
    told = capsys.readouterr().out
    assert "3 layers are linear" in told and "Once upon a time" in told and "its cache holds" in told


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


def test_lora(converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lora = example("lora", monkeypatch)
    monkeypatch.setattr(lora, "STEPS", 3)
    lora.main(str(converted), str(text), str(tmp_path / "adapter"))
    assert "attention of the adapter's model: linattn" in capsys.readouterr().out


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
