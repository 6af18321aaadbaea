"""A checkpoint that others published, through every command that opens one: a name in it is no path, it runs no code, and its
configuration asks for no more than its weights hold."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.common.checkpoint import open_checkpoint
from recipes.common.config import build, dump
from recipes.common.errors import RecipeError
from recipes.lra.settings import Settings
from recipes.lra.training import new_model

ENTRIES = ("convert.linearize", "recipes.tinystories.evaluate", "recipes.tinystories.train")
Entry = Callable[[str, Path], tuple[int, str]]
Spoil = Callable[[Path, Path], None]


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def index(folder: Path, name: str) -> None:
    """Puts the index of one shard called `name` in place of the single weight file."""
    keys = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    text = json.dumps({"weight_map": dict.fromkeys(keys, name)})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def move_out(name: str, folder: Path, outside: Path) -> None:
    """Puts a link to a file outside in place of `name`."""
    outside.mkdir(exist_ok=True)
    shutil.move(folder / name, outside / name)
    (folder / name).symlink_to(outside / name)


def secret(outside: Path) -> Path:
    outside.mkdir(exist_ok=True)
    (outside / "secret.json").write_text('{"secret": 1}', encoding="utf-8")
    return outside / "secret.json"


def link_secret(folder: Path, outside: Path) -> None:
    (folder / "LICENSE").symlink_to(secret(outside))


def private_shard(folder: Path, outside: Path, name: str) -> None:
    index(folder, name)
    outside.mkdir()
    shutil.move(folder / "shard.safetensors", outside / "shard.safetensors")


def link_in_a_folder(folder: Path, outside: Path) -> None:
    (folder / "sub").symlink_to(outside)
    private_shard(folder, outside, "sub/shard.safetensors")


NAMES: dict[str, tuple[Spoil, str]] = {
    "shard above": (lambda folder, outside: private_shard(folder, outside, "../outside/shard.safetensors"), "only names inside"),
    "shard absolute": (lambda folder, outside: private_shard(folder, outside, str(outside / "shard.safetensors")), "only names inside"),
    "shard by a linked folder": (link_in_a_folder, "link out of its folder"),
    "weights linked": (lambda folder, outside: move_out("model.safetensors", folder, outside), "link out of its folder"),
    "config linked": (lambda folder, outside: move_out("config.json", folder, outside), "link out of its folder"),
    "tokenizer linked": (lambda folder, outside: move_out("tokenizer.json", folder, outside), "link out of its folder"),
    "licence linked": (link_secret, "link out of its folder"),
    "tokenizer file named": (
        lambda folder, outside: edit(folder / "tokenizer_config.json", tokenizer_file=str(secret(outside))),
        "only names inside",
    ),
    "vocabulary named": (lambda folder, outside: edit(folder / "tokenizer_config.json", vocab=str(secret(outside))), "only names inside"),
    "template named as a path": (
        lambda folder, outside: edit(folder / "tokenizer_config.json", chat_template=[{"name": "../../x", "template": "a"}]),
        "no plain word",
    ),
    "adapter's base model": (
        lambda folder, outside: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/private"}'),  # type: ignore
        "PEFT adapter",
    ),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("command", ENTRIES)
def test_a_name_is_no_path(command: str, kind: str, checkpoint: Path, entry: Entry) -> None:
    spoil, expected = NAMES[kind]
    spoil(checkpoint, checkpoint.parent.parent / "outside")
    status, error = entry(command, checkpoint)
    assert status == 2 and expected in error, error


def test_the_links_of_a_hub_cache_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    """They lead from snapshots/REVISION/NAME to ../../blobs/DIGEST; no link there may lead anywhere else."""
    repository = tmp_path / "hub" / "models--someone--model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        shutil.move(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert open_checkpoint(str(snapshot)).shards == (snapshot / "model.safetensors",)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "NOTICE").symlink_to(Path("../../refs/main"))
    with pytest.raises(RecipeError, match="NOTICE is a link out of its folder"):
        open_checkpoint(str(snapshot))


def own_code(folder: Path, mark: Path, file: str, **config: Any) -> None:
    (folder / "modeling_x.py").write_text(f"open({str(mark)!r}, 'w')\n")
    edit(folder / file, **config)


def generating_code(folder: Path, mark: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(mark)!r}, 'w')\ndef generate(model, **kwargs): return None\n")


def pickled(folder: Path, mark: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str, str]]:
            return open, (str(mark), "w")

    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")


MODEL = {"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X"}
TOKENIZER = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["modeling_x.X", None]}}
CODE: dict[str, tuple[Spoil, set[int]]] = {
    "model": (lambda folder, mark: own_code(folder, mark, "config.json", model_type="x", auto_map=MODEL), {2}),
    "model known here": (lambda folder, mark: own_code(folder, mark, "config.json", auto_map=MODEL), {0}),
    "tokenizer": (lambda folder, mark: own_code(folder, mark, "tokenizer_config.json", **TOKENIZER), {0, 2}),
    "tokenizer elsewhere": (lambda folder, mark: edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": "other/x--y.X"}), {2}),
    "generation": (generating_code, {0, 2}),
    "attention kernel": (lambda folder, mark: edit(folder / "config.json", attn_implementation="someone/kernel"), {2}),
    "attention kernel of a part": (lambda folder, mark: edit(folder / "config.json", attn_implementation={"": "someone/kernel"}), {2}),
    "attention kernel inside": (lambda folder, mark: edit(folder / "config.json", _attn_implementation_internal="a/b"), {2}),
    "experts kernel": (lambda folder, mark: edit(folder / "config.json", text_config={"_experts_implementation": ["a/b"]}), {2}),
    "pickled weights": (pickled, {2}),
}


@pytest.mark.parametrize("kind", CODE)
@pytest.mark.parametrize("command", ENTRIES)
def test_no_code_runs_unasked(command: str, kind: str, checkpoint: Path, entry: Entry, tmp_path: Path) -> None:
    spoil, statuses = CODE[kind]
    spoil(checkpoint, tmp_path / "mark")
    status, error = entry(command, checkpoint)
    assert status in statuses, error
    assert not (tmp_path / "mark").exists()


def fewer_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "mlp" not in key}, folder / "model.safetensors")


SIZES: dict[str, Any] = {
    "layers": {"num_hidden_layers": 10**6},
    "width": {"hidden_size": 10**9},
    "vocabulary": {"vocab_size": 10**12},
    "heads": {"num_attention_heads": 10**8},
    "a larger model": {"num_hidden_layers": 8},
    "a wider model": {"intermediate_size": 240},
    "no heads": {"num_attention_heads": 0},
    "an odd width": {"hidden_size": 15},
    "an unknown activation": {"hidden_act": "x"},
}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("command", ENTRIES)
@pytest.mark.timeout(30)
def test_a_config_that_does_not_fit_the_weights_is_refused_before_it_is_built(
    command: str, kind: str, checkpoint: Path, entry: Entry
) -> None:
    edit(checkpoint / "config.json", **SIZES[kind])
    status, error = entry(command, checkpoint)
    assert status == 2 and str(checkpoint) in error, error


RANGES = [
    ("attention_dropout", 2.0),
    ("attention_dropout", -0.1),
    ("hidden_dropout_prob", 1),
    ("attn_pdrop", 1e9),
    ("max_position_embeddings", -1),
    ("n_positions", 0),
]


@pytest.mark.parametrize("command", ENTRIES)
def test_a_number_of_which_nothing_can_be_computed_is_named(command: str, checkpoint: Path, entry: Entry) -> None:
    right = (checkpoint / "config.json").read_bytes()
    for key, value in RANGES:
        (checkpoint / "config.json").write_bytes(right)
        edit(checkpoint / "config.json", **{key: value})
        status, error = entry(command, checkpoint)
        assert status == 2 and f"config.json: {key} is {value}; expected" in error, error


@pytest.mark.parametrize("command", ENTRIES)
def test_weights_that_are_not_there(command: str, checkpoint: Path, entry: Entry) -> None:
    fewer_weights(checkpoint)
    status, error = entry(command, checkpoint)
    assert status == 2 and "lacks weights, such as model.layers.0.mlp" in error


ASKED = {
    "layers": {"num_hidden_layers": 10**6},
    "width": {"hidden_size": 10**9},
    "vocabulary": {"vocab_size": 10**12},
    "no heads": {"num_attention_heads": 0},
}


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.timeout(60)
def test_a_model_from_scratch_has_bounds(kind: str, whole: Path, run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    settings = {"output": str(tmp_path / "out"), "model_type": "llama", "tokenizer": str(whole / "model"), "model_config": ASKED[kind]}
    (tmp_path / "train.yaml").write_text(dump(settings | {"train_data": [str(whole / "text.txt")]}))
    status, error = run("recipes.tinystories.train", "--config", tmp_path / "train.yaml")
    assert status == 2 and "model_config" in error and not (tmp_path / "out").exists(), error
    if kind in ("layers", "width"):
        with pytest.raises(RecipeError, match="model"):
            new_model(build(Settings, {"task": "listops", "data": "d", "output": "o", "model": ASKED[kind]}, "test"))


def test_a_tensor_in_two_files(checkpoint: Path) -> None:
    index(checkpoint, "shard.safetensors")
    weights = load_file(checkpoint / "shard.safetensors")
    save_file({"model.norm.weight": weights["model.norm.weight"] + 1}, checkpoint / "other.safetensors", metadata={"format": "pt"})
    files = dict.fromkeys(weights, "shard.safetensors") | {"model.norm.weight": "other.safetensors"}
    edit(checkpoint / "model.safetensors.index.json", weight_map=files)
    with pytest.raises(RecipeError, match="two weight files of .* hold model.norm.weight"):
        open_checkpoint(str(checkpoint))


JSON = {
    "a key twice": '{"model_type": "llama", "model_type": "llama"}',
    "no number": '{"model_type": "llama", "rms_norm_eps": NaN}',
    "too large a number": '{"model_type": "llama", "rms_norm_eps": 1e999}',
    "too deep": '{"model_type": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "too many digits": '{"model_type": "llama", "hidden_size": ' + "9" * 10_000 + "}",
    "no UTF-8": b'{"model_type": "\xff"}',
    "another type": '["llama"]',
}


@pytest.mark.parametrize("kind", JSON)
def test_doubtful_json(kind: str, checkpoint: Path) -> None:
    text = JSON[kind]
    (checkpoint / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match="config.json"):
        open_checkpoint(str(checkpoint))


def test_every_load_says_that_no_code_is_trusted() -> None:
    """By reading the sources: every call that could run a checkpoint's or a data set's code. `Auto...from_config` could as well."""
    root, found = Path(__file__).parents[2], 0
    for path in [*(root / "convert").rglob("*.py"), *(root / "recipes").rglob("*.py")]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            if name.startswith("GenerationConfig."):
                continue  # numbers in a JSON file
            if isinstance(call, ast.Call) and name.rpartition(".")[2] in ("from_pretrained", "from_config", "load_dataset"):
                found += 1
                said = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert said.get("trust_remote_code") == "False", f"{path}, line {call.lineno}"
            assert name != "evaluate.load", f"{path} fetches a metric's code"
    assert found >= 9
