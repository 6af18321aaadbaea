"""convert.linearize: what it refuses, in one sentence, leaving nothing behind."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_softmax import softmax_model
from transformers import BertConfig, BertForMaskedLM, BertModel, BloomConfig, BloomForCausalLM
from typer.testing import CliRunner

import convert.weights
import recipes.common.checkpoint
import recipes.common.files
from convert.errors import ConversionError
from convert.linearize import LinearizeOptions, app, linearize
from convert.source import check_architecture

Checkpoint = Callable[..., Path]


@pytest.fixture
def source(softmax_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A checkpoint of its own for a test to spoil, in a folder of its own."""
    return Path(shutil.copytree(softmax_checkpoint(), tmp_path / "in" / "source"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where to write; its parent is empty."""
    (tmp_path / "to").mkdir()
    return tmp_path / "to" / "out"


def refused(source: Path | str, output: Path, *options: str) -> str:
    """Runs the command, which must fail with status 2 and one sentence and leave nothing; gives the sentence."""
    before = {path: path.stat().st_mtime_ns for path in output.parent.rglob("*")} if output.parent.exists() else {}
    result = CliRunner().invoke(app, [str(source), str(output), *options])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ") and len(result.stderr.strip().splitlines()) == 1, result.stderr
    after = {path: path.stat().st_mtime_ns for path in output.parent.rglob("*")} if output.parent.exists() else {}
    assert after == before
    return result.stderr


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_no_such_folder(output: Path, tmp_path: Path) -> None:
    assert "no folder" in refused(tmp_path / "absent", output)
    assert "no folder" in refused("./absent", output)


def test_a_revision_of_what_lies_here(source: Path, output: Path) -> None:
    assert "--revision v2 is of a hub id, and" in refused(source, output, "--revision", "v2")


def test_an_option_that_does_not_fit_is_not_blamed_on_the_file(source: Path, output: Path) -> None:
    said = refused(source, output, "--kernel", "quadratic", "--features", "64")
    assert said.startswith("error: linattn option features=64 must be below the ") and "leave it out (the model: " in said


@pytest.mark.parametrize("option", [("--decay", "head"), ("--kernel", "quadratic"), ("--features", "4"), ("--temperature", "0.5")])
def test_options_of_a_polynomial_that_is_not_there(option: tuple[str, str], source: Path, output: Path) -> None:
    said = refused(source, output, "--form", "window", "--beside", "none", *option)
    assert f"{option[0][2:]}=" in said and 'is of the polynomial beside the window, and beside="none" has none' in said


def test_names_that_look_like_markup(source: Path, output: Path) -> None:
    odd = source.parent / "[bold] and [" / "red]"
    odd.parent.mkdir()
    assert str(odd) in refused(odd, output)
    source.rename(odd)
    result = CliRunner().invoke(app, [str(odd), str(output), "--no-check"])
    assert result.exit_code == 0 and (output / "config.json").is_file()


def test_hub_failure(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise OSError("no connection\nand a long story")

    monkeypatch.setattr(recipes.common.checkpoint, "snapshot_download", fail)
    message = refused("nobody/nothing", output)
    assert "no connection" in message and "long story" not in message


def test_a_file_instead_of_a_folder(source: Path, output: Path) -> None:
    assert "is a file" in refused(source / "model.safetensors", output)


def test_folder_that_is_no_checkpoint(output: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is no checkpoint: it has no config.json" in refused(tmp_path / "empty", output)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    assert f"is the folder of a run, whose model lies below it; give {tmp_path / 'run' / 'model'}\n" in refused(tmp_path / "run", output)


def test_adapter(output: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in refused(tmp_path / "adapter", output)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"llama"'])
def test_config_that_is_none(text: str, source: Path, output: Path) -> None:
    (source / "config.json").write_text(text)
    assert "config.json" in refused(source, output)


def test_config_that_does_not_fit(source: Path, output: Path) -> None:
    edit_config(source, hidden_size="large")
    assert "source" in refused(source, output)


def test_weights_that_do_not_fit_the_config(source: Path, output: Path) -> None:
    edit_config(source, intermediate_size=24)
    assert "nothing was kept" in refused(source, output)


def test_no_weights(source: Path, output: Path) -> None:
    (source / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refused(source, output)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights(name: str, source: Path, output: Path) -> None:
    (source / "model.safetensors").unlink()
    torch.save({}, source / name)
    message = refused(source, output)
    assert "pickled weights" in message and "save_pretrained" in message


@pytest.mark.parametrize("kept", [0, 4, 200, -100])
def test_truncated_weights(kept: int, source: Path, output: Path) -> None:
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:kept])
    assert "truncated" in refused(source, output)


def test_weights_that_are_something_else(source: Path, output: Path) -> None:
    (source / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "no safetensors file" in refused(source, output)


def test_missing_and_damaged_shards(tmp_path: Path, output: Path) -> None:
    source = tmp_path / "source"
    softmax_model("llama").save_pretrained(source, max_shard_size="20KB")
    index = source / "model.safetensors.index.json"
    shards = sorted(source.glob("*.safetensors"))
    data = shards[1].read_bytes()
    shards[1].unlink()
    message = refused(source, output)
    assert f"lacks 1 of its {len(shards)} weight files" in message and shards[1].name in message
    shards[1].write_bytes(data[:-1])
    assert "truncated" in refused(source, output)
    weights = load_file(shards[2])
    lost = weights.popitem()[0]
    shards[1].write_bytes(data)
    save_file(weights, shards[2], metadata={"format": "pt"})
    assert lost in refused(source, output)
    for text in ("{", "{}", '{"weight_map": 3}', '{"weight_map": {}}'):
        index.write_text(text)
        refused(source, output)


def test_a_weight_that_is_not_there(source: Path, output: Path) -> None:
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    message = refused(source, output)
    assert "lacks weights" in message and "model.layers.1.self_attn.q_proj.weight" in message


def test_weights_that_are_not_numbers(source: Path, output: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refused(source, output)
    weights["model.norm.weight"][3] = float("inf")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert "not finite" in refused(source, output)


def test_converted_already(source: Path, output: Path, tmp_path: Path) -> None:
    linearize(source, tmp_path / "once", LinearizeOptions(check=False))
    assert "is converted already" in refused(tmp_path / "once", output)


def test_quantised(source: Path, output: Path) -> None:
    edit_config(source, quantization_config={"quant_method": "bitsandbytes"})
    assert "quantised" in refused(source, output)


def test_other_architectures(tmp_path: Path, output: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for name, encoder in {"masked": BertForMaskedLM, "bare": BertModel}.items():
        encoder(BertConfig(**sizes)).save_pretrained(tmp_path / name)
        message = refused(tmp_path / name, output)
        assert "encoder" in message and "attn_implementation='linattn'" in message
    for model_type in ("t5", "bart"):
        for more in ({"is_encoder_decoder": True}, {}):
            (tmp_path / "both").mkdir(exist_ok=True)
            (tmp_path / "both" / "config.json").write_text(json.dumps({"model_type": model_type, **more}))
            message = refused(tmp_path / "both", output)
            assert f"is an encoder-decoder ({model_type})" in message and "attn_implementation" not in message
    # a model type may have heads of both kinds, and a config need not name any
    for heads, said in (
        ({"architectures": ["BertLMHeadModel"]}, "has the architecture bert"),
        ({}, "is an encoder"),
        ({"architectures": None}, "is an encoder"),
    ):
        with pytest.raises(ConversionError, match=said):
            check_architecture({"model_type": "bert", **heads}, "a model")
    BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "bloom")
    message = refused(tmp_path / "bloom", output)
    assert "bloom" in message and "hf_linattn.models.BASE_MODEL_TYPES names those that are\n" in message


def test_other_heads(source: Path, output: Path) -> None:
    edit_config(source, architectures=["LlamaForEverything"])
    assert "'LlamaForEverything' is not supported; supported are LlamaModel" in refused(source, output)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("3", "--keep-softmax names layer 3, but"),
        ("0-7", "layers 0 to 2"),
        ("-1", "'-1'"),
        ("2-1", "'2-1'"),
        ("one", "'one'"),
        ("0,1-2", "--keep-softmax names every layer"),
    ],
)
def test_keep_softmax(layers: str, message: str, source: Path, output: Path) -> None:
    assert message in refused(source, output, "--keep-softmax", layers)


def test_from_python_an_option_is_named_as_python_has_it(source: Path, output: Path) -> None:
    with pytest.raises(ConversionError, match="^keep_softmax names layer 3, but .* has layers 0 to 2$"):
        linearize(source, output, LinearizeOptions(keep_softmax=(3,)))


@pytest.mark.parametrize(
    "options",
    [("--temperature", "1.5"), ("--temperature", "0"), ("--temperature", "nan"), ("--dropout", "1"), ("--dropout", "-0.1")],
)
def test_numbers_outside_their_bounds(options: tuple[str, str], source: Path, output: Path) -> None:
    assert options[0].strip("-") in refused(source, output, *options)


def test_unknown_options_are_typers_to_refuse(source: Path, output: Path) -> None:
    for options in (("--kernel", "cubic"), ("--decay", "layer"), ("--dtype", "int8"), ("--no-such-thing",)):
        result = CliRunner().invoke(app, [str(source), str(output), *options])
        assert result.exit_code == 2 and not output.exists()
    for field in ({"kernel": "cubic"}, {"decay": "layer"}, {"dtype": "int8"}):
        with pytest.raises(ConversionError):
            linearize(source, output, LinearizeOptions(**field))  # type: ignore[arg-type]
        assert not list(output.parent.iterdir())


def test_existing_output(source: Path, output: Path) -> None:
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    assert "exists already and was not written by convert.linearize" in refused(source, output)
    assert "holds no mark of this program" in refused(source, output, "--overwrite")
    file = output / "thesis.txt"
    assert "exists already and is no folder; choose" in refused(source, file)
    assert "is no folder" in refused(source, file, "--overwrite")


def test_an_empty_name(output: Path) -> None:
    """pathlib takes it for the working folder."""
    assert "an empty name was given" in refused("", output)


def test_output_that_overlaps_the_source(source: Path) -> None:
    for output in (source, source / "out", source.parent):
        assert "overlaps" in refused(source, output, "--overwrite")


def test_parent_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(source, tmp_path / "file" / "out")

    def closed(*args: object, **kwargs: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # The user who runs the tests may be allowed everything, so a closed folder is played.
    monkeypatch.setattr(Path, "mkdir", closed)
    assert "Permission denied" in refused(source, tmp_path / "out")


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("where", "existing"),
    [*itertools.product(["shutil.copyfile", "save_file", "Path.write_text"], [False, True]), ("Path.rename", False), ("exchange", True)],
)
def test_a_disk_that_fills_half_way(where: str, existing: bool, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any of the writes; an earlier checkpoint at the output stays as it was."""
    if existing:
        linearize(source, output, LinearizeOptions(check=False))
    owners = {"shutil.copyfile": shutil, "save_file": convert.weights, "exchange": recipes.common.files}
    owner = owners.get(where, Path)
    monkeypatch.setattr(owner, where.rpartition(".")[2], full_disk)
    assert "No space left on device" in refused(source, output, *(["--overwrite"] if existing else []))


def test_the_second_rename_fails(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where names cannot be exchanged the earlier checkpoint has made room already, and must come back."""
    linearize(source, output, LinearizeOptions(check=False))
    rename, calls = Path.rename, []

    def once(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            full_disk()
        return rename(self, target)

    monkeypatch.setattr(recipes.common.files, "exchange", lambda *names: False)
    monkeypatch.setattr(Path, "rename", once)
    before = sorted(path.name for path in output.iterdir())
    with pytest.raises(ConversionError, match="No space left"):
        linearize(source, output, LinearizeOptions(overwrite=True, check=False))
    assert len(calls) == 3 and sorted(path.name for path in output.iterdir()) == before
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_too_little_space_is_seen_before_writing(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, needed = shutil.disk_usage(source), sum(file.stat().st_size for file in source.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    assert "GB free" in refused(source, output)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    linearize(source, output, LinearizeOptions(check=False))


def test_a_damaged_result_is_not_kept(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copyfile

    def damage(start: Path, end: Path) -> None:
        copy(start, end)
        if Path(end).suffix == ".safetensors":
            data = bytearray(Path(end).read_bytes())
            data[-1] ^= 1
            Path(end).write_bytes(data)

    monkeypatch.setattr(shutil, "copyfile", damage)
    assert "is not what it is in" in refused(source, output)


def test_cached_steps_that_go_astray_are_not_kept(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_linattn import LinearStateLayer

    update = LinearStateLayer.update

    def forgetful(self: Any, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object) -> Any:
        return update(self, key, value + 0.05 * (key.shape[2] == 1), *args, **kwargs)

    monkeypatch.setattr(LinearStateLayer, "update", forgetful)
    assert "in cached steps, is" in refused(source, output)


def test_folders_made_on_the_way_go_again(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(ConversionError, match="No space left"):
        linearize(source, output / "deep" / "down")
    assert not list(output.parent.iterdir())


def test_an_output_that_appears_meanwhile_is_left_alone(source: Path, output: Path) -> None:
    def appear(shard: Path) -> None:
        output.mkdir(exist_ok=True)
        (output / "thesis.txt").write_text("mine")

    with pytest.raises(ConversionError, match="exists already"):
        linearize(source, output, LinearizeOptions(check=False), on_shard=appear)
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_interruption_leaves_nothing(source: Path, output: Path) -> None:
    def interrupt(shard: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        linearize(source, output, on_shard=interrupt)
    assert not list(output.parent.iterdir())


def test_a_polite_kill_leaves_nothing(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(shutil, "copyfile", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    try:
        result = CliRunner().invoke(app, [str(source), str(output)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code != 0
    assert not list(output.parent.iterdir())
