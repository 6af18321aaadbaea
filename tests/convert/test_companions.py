"""What lies beside the weights: it travels whole, and it is proved to fit them; what are no weights is refused or unpacked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tiny_softmax import VOCABULARY, softmax_model

import convert.gguf
from convert.errors import ConversionError
from convert.linearize import LinearizeOptions, linearize
from recipes.common.errors import RecipeError

UNCHECKED = LinearizeOptions(check=False)


@pytest.fixture
def source(softmax_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of its own for a test to change."""
    return Path(shutil.copytree(softmax_checkpoint(), tmp_path / "source"))


def add_tokenizer(folder: Path, last_id: int = 6, **settings: Any) -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "once": 3, "upon": 4, "time": last_id}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    config = {"unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_companions_travel_whole(source: Path, tmp_path: Path) -> None:
    add_tokenizer(source, auto_map={"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None]})
    written = {
        "chat_template.jinja": "{{ messages[0].content }}",
        "chat_template.json": '{"chat_template": ""}',
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "additional_chat_templates/rag.jinja": "{{ documents }}",
        "preprocessor_config.json": '{"size": 4}',
        "processor_config.json": "{}",
        "bpe.codes": "a b 1",
        "source.spm": "x",
        "tokenization_tiny.py": "from .tiny_words import WORDS\nraise SystemExit('was run')\n",
        "tiny_words.py": "from . import tiny_letters\nWORDS = []\n",
        "tiny_letters.py": "",
        "processing_tiny.py": "",
        "image_processing_tiny.py": "",
    }
    left = ("trainer_state.json", "all_results.json", "requirements.txt", ".gitattributes", "pytorch_model.bin.index.json")
    written["processor_config.json"] = '{"auto_map": {"AutoProcessor": "processing_tiny.TinyProcessor"}}'
    written["preprocessor_config.json"] = '{"auto_map": {"AutoImageProcessor": "image_processing_tiny.TinyImages"}}'
    for name, text in written.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    for name in (*left, "setup.py"):
        (source / name).write_text("none of the tokenizer's business")
    report = linearize(source, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_text() for name in written} == written
    assert not {path.name for path in (tmp_path / "out").iterdir()} & {*left, "setup.py"}
    assert report["check"]["tokenizer"] is None  # it has code of its own


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_every_file_can_be_read_by_those_whom_the_user_lets(mask: int, mode: int, dtype: str | None, source: Path, tmp_path: Path) -> None:
    add_tokenizer(source)
    for path in source.iterdir():
        path.chmod(0o400)
    before = os.umask(mask)
    try:
        linearize(source, tmp_path / "out", LinearizeOptions(check=False, dtype=dtype))
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.stat().st_mode & 0o777 != mode} == {}


def test_a_usable_tokenizer_is_named(source: Path, tmp_path: Path) -> None:
    add_tokenizer(source, last_id=VOCABULARY - 1)
    (source / "generation_config.json").write_text(json.dumps({"pad_token_id": -1, "eos_token_id": [2, VOCABULARY - 1]}))
    assert "Tokenizer" in linearize(source, tmp_path / "out")["check"]["tokenizer"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: add_tokenizer(folder, last_id=VOCABULARY), f"tokenizer has ids up to {VOCABULARY}"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'), "loading the tokenizer failed"),
        (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [2, 900]}'), "eos_token_id is 900"),
        (lambda folder: (folder / "generation_config.json").write_text('{"pad_token_id": 97}'), "pad_token_id is 97"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json"),
    ],
    ids=["vocabulary", "tokenizer", "end", "padding", "settings"],
)
def test_what_cannot_be_used_is_refused(spoil: Callable[[Path], Any], message: str, source: Path, tmp_path: Path) -> None:
    add_tokenizer(source)
    spoil(source)
    with pytest.raises(ConversionError, match=message):
        linearize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32], ids=str)
def test_packed_tensors_are_refused(dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(dtype)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="quantised weights, such as model.layers.1.mlp.up_proj.weight"):
        linearize(source, tmp_path / "out", UNCHECKED)


def test_a_row_of_whole_numbers_is_no_packed_tensor(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors") | {"model.counts": torch.ones(3, dtype=torch.int32)}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    linearize(source, tmp_path / "out", UNCHECKED)
    assert load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")["model.counts"].dtype == torch.int32


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_settings_of_a_quantiser_are_refused(name: str, source: Path, tmp_path: Path) -> None:
    (source / name).write_text('{"bits": 4}')
    with pytest.raises(ConversionError, match=name):
        linearize(source, tmp_path / "out", UNCHECKED)


def test_an_adapter_is_answered_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"AutoPeftModelForCausalLM.*merge_and_unload\(\).*save_pretrained"):
        linearize(tmp_path / "adapter", tmp_path / "out", UNCHECKED)


@pytest.mark.parametrize(("given", "wanted"), [("tiny.gguf", None), ("", "float16")], ids=["file", "folder"])
def test_gguf_is_unpacked(given: str, wanted: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "tiny.gguf").write_bytes(b"GGUF")
    (tmp_path / "packed" / "adapter_config.json").write_text('{"base_model_name_or_path": "/private"}')

    def unpack(file: Path, folder: Path, dtype: torch.dtype) -> None:
        assert dtype == getattr(torch, wanted or "bfloat16")
        assert file.read_bytes() == b"GGUF" and os.listdir(file.parent) == [file.name]  # what lies beside it is not read
        softmax_model("llama").to(dtype).save_pretrained(folder)

    monkeypatch.setattr(convert.gguf, "_unpack", unpack)
    monkeypatch.setattr(convert.gguf, "find_spec", lambda name: name)
    report = linearize(tmp_path / "packed" / given, tmp_path / "out", LinearizeOptions(dtype=wanted))
    assert report["source"] == str(tmp_path / "packed" / given) and report["check"]["layers"] == 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == (wanted or "bfloat16")


def test_what_is_no_gguf_is_given_back(source: Path, tmp_path: Path) -> None:
    """A file of another kind, a folder that is but called so, a name of nothing here."""
    checkpoint = source.rename(tmp_path / "tiny.gguf")
    others = checkpoint / "model.safetensors", checkpoint / "config.json", checkpoint, tmp_path / "absent.gguf", Path("owner/tiny.gguf")
    (tmp_path / "empty.gguf").mkdir()
    for given in (*others, tmp_path / "empty.gguf"):
        with convert.gguf.unpacked(str(given)) as found:
            assert found == str(given)
    assert linearize(checkpoint, tmp_path / "out")["check"]["layers"] == 3


def test_gguf_is_read_dequantised_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that stays packed cannot be saved; what a repository says beside the file is not run."""
    asked: list[dict[str, Any]] = []

    class Loaded:
        @classmethod
        def from_pretrained(cls, folder: Path, **options: Any) -> Loaded:
            asked.append({"folder": folder, **options})
            return cls()

        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(exist_ok=True)
            (folder / f"saved-{len(list(folder.iterdir()))}").touch()

    monkeypatch.setattr(convert.gguf.transformers, "AutoModelForCausalLM", Loaded)
    monkeypatch.setattr(convert.gguf.transformers, "AutoTokenizer", Loaded)
    convert.gguf._unpack(tmp_path / "tiny.gguf", tmp_path / "out", torch.float16)
    model, tokenizer = asked
    assert tokenizer == {"folder": tmp_path, "gguf_file": "tiny.gguf", "trust_remote_code": False}
    packing = model.pop("quantization_config", None)
    assert model == tokenizer | {"dtype": torch.float16} and (packing is None or packing.dequantize)
    assert (packing is None) == (not hasattr(convert.gguf.transformers, "GgufConfig"))
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_special_tokens_end_where_the_vocabulary_does(file: str, source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").unlink(missing_ok=True)
    content = json.loads((source / file).read_text()) if (source / file).exists() else {}
    for key, good, bad in (("bos_token_id", VOCABULARY - 1, VOCABULARY), ("eos_token_id", [2, VOCABULARY - 1], [2, VOCABULARY])):
        (source / file).write_text(json.dumps(content | {key: bad}))
        with pytest.raises(ConversionError, match=f"^{file}: {key} is {VOCABULARY}, and the vocabulary ends at {VOCABULARY - 1}; nothing"):
            linearize(source, tmp_path / "out")
        (source / file).write_text(json.dumps(content | {key: good}))
        linearize(source, tmp_path / f"out-{key}")


def test_gguf_by_a_link_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    (tmp_path / "private.gguf").write_bytes(b"GGUF")
    (tmp_path / "published" / "tiny.gguf").symlink_to(tmp_path / "private.gguf")
    with pytest.raises(RecipeError, match="tiny.gguf is a link out of its folder"):
        linearize(tmp_path / "published", tmp_path / "out", UNCHECKED)


def test_gguf_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(convert.gguf, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match="pip install gguf"):
        linearize(tmp_path / "tiny.gguf", tmp_path / "out")
    monkeypatch.setattr(convert.gguf, "find_spec", lambda name: name)
    with pytest.raises(ConversionError, match="reading .*tiny.gguf failed"):
        linearize(tmp_path / "tiny.gguf", tmp_path / "out")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConversionError, match="holds 2 GGUF files"):
        linearize(tmp_path, tmp_path.parent / "elsewhere")
