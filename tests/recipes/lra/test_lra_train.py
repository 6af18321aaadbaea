"""Training: it learns, resumes to the same numbers, keeps the best checkpoint and tests it, and reports runs in a table."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from launched import finish, launch
from transformers import AutoModelForSequenceClassification

from recipes.common import loop
from recipes.common.config import dump, load_config, to_dict
from recipes.common.errors import RecipeError
from recipes.lra import report, train, training
from recipes.lra.accuracy import accuracy, metric_class
from recipes.lra.batches import DeviceSplit, drawn_positions, evaluation_order, training_order
from recipes.lra.data import SPLITS, TASKS, Sequences, Split, load
from recipes.lra.settings import Settings
from recipes.lra.training import Training

CONFIGS = Path(train.__file__).parent / "configs"
TEXT = TASKS["text"]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


def texts(count: int, seed: int, towers: int = 1) -> Split:
    """Short texts whose class is whether "a" or "b" fills them; in pairs, whether both have the same letter."""
    rng = np.random.default_rng(seed)
    letters = rng.integers(0, 2, (towers, count))
    made = [Sequences.of(np.full(rng.integers(3, 20), ord("ab"[c]), np.uint8) for c in row) for row in letters]
    labels = letters[0] if towers == 1 else (letters[0] == letters[1]).astype(np.int64)
    return Split(tuple(made), labels)


def write(folder: Path, task: str = "text", towers: int = 1) -> Path:
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate(zip(SPLITS, (64, 24, 20), strict=True)):
        texts(count, seed, towers).save(folder / f"{name}.npz")
    (folder / "prepared.json").write_text(json.dumps({"task": task}))
    return folder


def settings(tmp_path: Path, **changed) -> Settings:
    data = tmp_path / "data"
    if not data.exists():
        write(data)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "pooling": "mean"}
    values = {
        "task": "text", "data": str(data), "output": str(tmp_path / "out"), "batch_size": 8, "learning_rate": 0.02,
        "warmup_steps": 3, "steps": 24, "eval_every": 8, "log_every": 4, "save_every": 8, "pad_multiple": 4,
        "model": small, "dropout": "noise",
    }  # fmt: skip
    return Settings(**{**values, **changed})


def run(values: Settings, seed: int = 0, **options) -> dict:
    return Training(values, seed, load(TASKS[values.task], values.data), **options).run_all()


def metrics(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


# -- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_the_examples_padded_to_the_longest():
    split = texts(10, 0)
    chosen = np.array([3, 7, 1])
    batch = DeviceSplit.of(TEXT, split, torch.device("cpu"), pad_multiple=4).batch(chosen)
    lengths = split.towers[0].lengths[chosen]
    assert batch["input_ids"].shape == (3, -(-max(lengths) // 4) * 4)
    for row, index in enumerate(chosen):
        assert batch["input_ids"][row, : lengths[row]].tolist() == (split.towers[0][index].astype(int) + 1).tolist()
        assert batch["input_ids"][row, lengths[row] :].sum() == 0
        assert batch["attention_mask"][row].tolist() == [i < lengths[row] for i in range(batch["input_ids"].shape[1])]
    assert batch["labels"].tolist() == split.labels[chosen].tolist()


@pytest.mark.parametrize("blank", [False, True])
def test_images_have_no_padding_unless_blank_pixels_are(blank):
    task = TASKS["pathfinder"]
    pixels = np.random.default_rng(0).integers(0, 3, (3, 1024)).astype(np.uint8)
    pixels[2] = 0
    split = Split((Sequences.of(pixels),), np.array([0, 1, 1]))
    batch = DeviceSplit.of(task, split, torch.device("cpu"), blank_is_padding=blank).batch(np.array([1, 2]))
    if not blank:
        assert batch["attention_mask"] is None
        assert torch.equal(batch["input_ids"], torch.from_numpy(pixels[1:]).int() + 1)
    else:
        assert torch.equal(batch["attention_mask"][0], torch.from_numpy(pixels[1] > 0))
        assert torch.equal(batch["input_ids"][0], torch.where(torch.from_numpy(pixels[1] > 0), torch.from_numpy(pixels[1]).int() + 1, 0))
        assert batch["attention_mask"][1].all()  # an image of nothing is not a sequence of nothing


@pytest.mark.parametrize("blank", [False, True])
def test_pictures_are_turned_and_mirrored_whole(blank):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 1024)).astype(np.uint8)
    split = Split((Sequences.of(pixels),), np.arange(8) % 2)
    batch = DeviceSplit.of(TASKS["pathfinder"], split, torch.device("cpu"), blank_is_padding=blank).batch(np.arange(8), np.arange(8))
    squares, turned = pixels.reshape(8, 32, 32), (batch["input_ids"].numpy() - 1).clip(0).reshape(8, 32, 32)
    expected = [np.rot90(square if i < 4 else square.T, i % 4) for i, square in enumerate(squares)]
    assert np.array_equal(turned, expected)
    assert len({np.rot90(picture, turns).tobytes() for picture in (squares[0], squares[0].T) for turns in range(4)}) == 8
    assert batch["labels"].tolist() == [0, 1] * 4
    if blank:
        assert torch.equal(batch["attention_mask"], batch["input_ids"] > 0)
    drawn = np.concatenate([drawn_positions(64, 0, step) for step in range(50)])
    assert set(drawn) == set(range(8)) and np.bincount(drawn).min() > 300
    assert np.array_equal(drawn[:64], drawn_positions(64, 0, 0)) and not np.array_equal(drawn[:64], drawn_positions(64, 1, 0))


def test_only_pictures_are_turned():
    with pytest.raises(ValueError, match="turn_pictures is for tasks of pictures, which text is not"):
        Settings(task="text", data="data", output="out", turn_pictures=True)


def test_every_epoch_takes_every_example_once_in_another_order():
    lengths = np.random.default_rng(0).integers(1, 100, 240)
    order = training_order(lengths, 4, seed=0)
    first, second = ([next(order) for _ in range(60)] for _ in range(2))
    assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == list(range(240))
    assert not np.array_equal(first, second)
    spread = np.mean([np.ptp(lengths[batch]) for batch in first])
    assert spread < 10 < np.mean([np.ptp(batch) for batch in lengths.reshape(60, 4)])
    steps = [float(np.mean(lengths[batch])) for batch in first]
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1]) < 0.5
    uneven = training_order(lengths, 7, seed=0)  # 34 batches of 7 leave two out, each epoch two others
    assert set(np.concatenate([next(uneven) for _ in range(34 * 4)])) == set(range(240))
    later = training_order(lengths, 4, seed=0, start=75)
    assert np.array_equal(next(later), second[15])
    assert not np.array_equal(next(training_order(lengths, 4, seed=1)), first[0])
    assert sorted(np.concatenate(list(evaluation_order(lengths, 7)))) == list(range(240))


def test_a_seed_gives_the_same_batches_in_every_version():
    """Else a run that is resumed with a newer one would see some examples twice."""

    def digest(arrays) -> str:
        return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]

    lengths = np.arange(1, 241) % 37 + 1
    assert digest(islice(training_order(lengths, 7, 3, start=70), 80)) == "b65aa9194540978c"
    assert digest(islice(training_order(np.full(240, 5), 7, 3, start=70), 80)) == "016a4a62f2db2464"
    assert digest(evaluation_order(lengths, 7)) == "cbec01cd69d8c9a9"
    assert digest(drawn_positions(16, 3, step) for step in range(4)) == "f2a4c22db03f6495"
    for count in (7, 8):
        assert len(next(training_order(np.full(count, 5), 7, 0))) == 7
    with pytest.raises(ValueError, match="6 examples do not fill a batch of 7"):
        next(training_order(np.full(6, 5), 7, 0))


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attention", "dropout"), [("sdpa", "standard"), ("linattn", "none"), ("linattn", "noise"), ("eager", "none")])
def test_it_learns_and_the_best_checkpoint_is_the_one_tested(tmp_path, attention, dropout):
    values = settings(tmp_path, attn_implementation=attention, dropout=dropout, steps=40, eval_batch_size=8)
    result = run(values)
    assert result["test_accuracy"] > 0.9
    folder = tmp_path / "out" / "seed-0"
    records = metrics(folder)
    valid = {record["step"]: record["valid_accuracy"] for record in records if "valid_accuracy" in record}
    assert list(valid) == [8, 16, 24, 32, 40]
    assert result["valid_accuracy"] == max(valid.values()) == valid[result["best_step"]]
    best = AutoModelForSequenceClassification.from_pretrained(folder / "best", attn_implementation=attention).eval()
    split = DeviceSplit.of(TEXT, texts(20, 2), torch.device("cpu"))
    output = best(**split.batch(np.arange(20)))
    assert accuracy(output.logits.argmax(-1).numpy(), split.split.labels) == result["test_accuracy"]
    assert output.loss.item() == pytest.approx(result["test_loss"], rel=1e-4)  # of batches of 8, 8 and 4
    assert result["dropout"] == dropout and result["attention_dropout"] == (0.1 if dropout != "none" else 0)


def test_the_test_uses_the_best_weights_not_the_last(tmp_path, monkeypatch):
    values = settings(tmp_path, steps=16, learning_rate=0.05)
    training = Training(values, 0, load(TEXT, values.data))
    scores = iter([0.75, 0.5])
    evaluate = training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda name, count=None: (next(scores), 1.0) if name == "valid" else evaluate(name, count))
    kept = {}
    validate = training.validate

    def keep():
        kept[training.step] = {name: value.clone() for name, value in training.bare.state_dict().items()}
        validate()

    monkeypatch.setattr(training, "validate", keep)
    assert training.run_all()["best_step"] == 8
    assert all(torch.equal(value, kept[8][name]) for name, value in training.bare.state_dict().items())
    assert any(not torch.equal(value, kept[16][name]) for name, value in training.bare.state_dict().items())


def test_killed_and_resumed_it_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    whole = settings(tmp_path, output=str(tmp_path / "whole"), log_every=1)
    expected = run(whole)
    halved = settings(tmp_path, output=str(tmp_path / "halved"), log_every=1)
    logged = training.Run.log

    def die(self, step, **more):
        logged(self, step, **more)
        if step == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "log", die)
        with pytest.raises(KeyboardInterrupt):
            run(halved)
    result = run(halved, resume=True)
    assert metrics(tmp_path / "halved" / "seed-0") == metrics(tmp_path / "whole" / "seed-0")
    same = set(result) - {"seconds", "settings"}
    assert {key: result[key] for key in same} == {key: expected[key] for key in same}
    before = (tmp_path / "halved" / "seed-0" / "result.json").stat().st_mtime_ns
    assert run(halved, resume=True)["test_accuracy"] == result["test_accuracy"]
    assert (tmp_path / "halved" / "seed-0" / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(("scores", "best"), [([0.75, 0.5, 0.25], 8), ([0.5, 0.75, 0.75], 24), ([0.5, 0.5, 0.25], 16)])
def test_the_best_score_and_the_time_survive_a_resume(tmp_path, monkeypatch, scores, best):
    clock = iter(np.arange(0, 100_000, 10.0))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))  # other threads look at clocks too
    evaluate, left = Training.evaluate, iter(scores)
    monkeypatch.setattr(
        Training, "evaluate", lambda self, name, count=None: (next(left), 1.0) if name == "valid" else evaluate(self, name, count)
    )
    logged, values = training.Run.log, settings(tmp_path)

    def die(self, step, **more):
        logged(self, step, **more)
        if step == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Run, "log", die)
        run(values)
    before = json.loads((tmp_path / "out/seed-0/checkpoints/step-00000016/progress.json").read_text())["seconds"]
    result = run(values, resume=True)
    assert (result["best_step"], result["valid_accuracy"]) == (best, max(scores))
    assert before > 0 and result["seconds"] > before
    logs = [json.loads(line)["seconds"] for line in (tmp_path / "out/seed-0/metrics.jsonl").read_text().splitlines()]
    assert logs == sorted(logs)


def test_a_loss_that_is_logged_is_the_mean_of_the_steps_since_the_last(tmp_path):
    losses = []
    for every in (1, 4):
        run(settings(tmp_path, output=str(tmp_path / str(every)), steps=10, log_every=every))
        losses.append([record["loss"] for record in metrics(tmp_path / str(every) / "seed-0") if "loss" in record])
    assert losses[1] == pytest.approx([np.mean(losses[0][:4]), np.mean(losses[0][4:8]), np.mean(losses[0][8:])], rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "warmup", "shares"),
    [
        ("linear", 2, [0.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 0, [1 - step / 8 for step in range(8)]),
        ("cosine", 2, [0.5, 1, *(0.5 + 0.5 * np.cos(np.pi * step / 6) for step in range(6))]),
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("inverse_sqrt", 2, [0.5, 1, *((2 / step) ** 0.5 for step in range(2, 8))]),
        ("inverse_sqrt", 0, [1, *(step**-0.5 for step in range(1, 8))]),
    ],
)
def test_the_rate_of_every_step(tmp_path, schedule, warmup, shares):
    values = settings(tmp_path, schedule=schedule, warmup_steps=warmup, steps=8, log_every=1, eval_every=100)
    run(values)
    rates = [record["learning_rate"] for record in metrics(tmp_path / "out" / "seed-0") if "learning_rate" in record]
    assert rates == pytest.approx([0.02 * share for share in shares], rel=1e-9)


def test_what_a_run_leaves_says_what_ran(tmp_path, capsys):
    values = settings(tmp_path, steps=10, dropout="noise", attention_dropout=0.25, seeds=[3])
    splits = load(TEXT, values.data)
    found = run(values, seed=3)
    folder = tmp_path / "out" / "seed-3"
    assert found == json.loads((folder / "result.json").read_text())
    parameters = sum(p.numel() for p in training.new_model(values).parameters())
    scores = {key: found.pop(key) for key in ("test_accuracy", "test_loss", "valid_accuracy", "best_step", "seconds")}
    assert found == {
        "task": "text", "attn_implementation": "linattn", "linattn": {}, "dropout": "noise", "attention_dropout": 0.25, "seed": 3,
        "steps": 10, "batch_size": 8, "parameters": parameters, "examples": {"train": 64, "valid": 24, "test": 20},
        "settings": to_dict(values), "device": "cpu", "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    facts = json.loads((folder / "facts.json").read_text())
    assert facts == facts | {"seed": 3, "parameters": parameters} | {name: [len(splits[name]), splits[name].digest()] for name in SPLITS}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "valid_loss" in record] == [8, 10]  # the last one too
    assert [record["step"] for record in records if "loss" in record] == [4, 8, 10]
    assert all(set(record) - {"step", "seconds"} in ({"loss", "learning_rate"}, {"valid_accuracy", "valid_loss"}) for record in records)
    said = "text, seed 3: test accuracy {test_accuracy:.2%} (validation {valid_accuracy:.2%} at step {best_step})".format(**scores)
    assert said in capsys.readouterr().out
    assert run(values, seed=3, resume=True)["best_step"] == scores["best_step"]
    assert f"{folder} is finished" in capsys.readouterr().out


def test_the_optimizer_is_as_the_settings_say(tmp_path):
    """Gradients clipped to 1e-10 move nothing: Adam divides by no less than 1e-6."""
    values = settings(tmp_path, beta2=0.9, weight_decay=0.3, gradient_clip=1e-10, steps=2, warmup_steps=0, schedule="constant")
    training = Training(values, 0, load(TEXT, values.data))
    groups = training.optimizer.param_groups
    assert [(group["betas"], group["weight_decay"]) for group in groups] == [((0.9, 0.9), 0.3), ((0.9, 0.9), 0.0)]
    assert all(p.dim() > 1 for p in groups[0]["params"]) and all(p.dim() == 1 for p in groups[1]["params"])
    before = [p.clone() for p in groups[1]["params"]]
    training.run_all()
    assert max((p - old).abs().max() for p, old in zip(groups[1]["params"], before, strict=True)) < 2 * 0.02 * 1e-3


def test_resume_of_another_run_and_an_existing_output_are_refused(tmp_path):
    run(settings(tmp_path, steps=8))
    with pytest.raises(RecipeError, match="pass --resume to go on"):
        run(settings(tmp_path, steps=8))
    with pytest.raises(RecipeError, match="belongs to another run: learning_rate"):
        run(settings(tmp_path, steps=8, learning_rate=0.5), resume=True)


def test_noise_and_learning_rate_come_down_to_nothing(tmp_path):
    values = settings(tmp_path, warmup_steps=4)
    training = Training(values, 0, load(TEXT, values.data))
    rates, noises = [], []
    for step in range(25):
        training.set_rates(step)
        rates.append(training.optimizer.param_groups[0]["lr"])
        noises.append(float(training.bare.encoder.layers[0].attention.linattn_dropout_p))
    assert rates[0] == pytest.approx(0.005) and max(rates) == rates[4] == pytest.approx(0.02) and rates[24] == 0
    assert noises[0] == pytest.approx(0.1) and noises[24] == 0 and noises == sorted(noises, reverse=True)


def test_a_budget_of_minutes_ends_the_run_with_the_rate_at_nothing(tmp_path, monkeypatch):
    clock = iter(np.arange(0, 10_000, 0.05))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))  # other threads look at clocks too
    monkeypatch.setattr(training, "STEPS_BETWEEN_CLOCK_READINGS", 1)
    result = run(settings(tmp_path, steps=100_000, max_minutes=0.02))
    assert 15 < result["steps"] < 40 and 1.1 < result["seconds"] < 1.4
    rates = [record["learning_rate"] for record in metrics(tmp_path / "out" / "seed-0") if "learning_rate" in record]
    assert rates[-1] < 0.2 * max(rates)


def test_pairs_train_with_two_towers(tmp_path):
    values = settings(tmp_path, task="retrieval", data=str(write(tmp_path / "pairs", "retrieval", towers=2)), steps=8)
    result = run(values)
    assert 0 <= result["test_accuracy"] <= 1 and result["steps"] == 8


def test_bfloat16_and_a_part_of_the_validation_set(tmp_path):
    result = run(settings(tmp_path, mixed_precision="bf16", validation_examples=8, steps=40))
    assert result["test_accuracy"] > 0.9 and (8 * result["valid_accuracy"]).is_integer()


def test_several_seeds_by_the_command_and_a_table(tmp_path, capsys):
    values = settings(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(f"task: text\ndata: {values.data}\noutput: {values.output}\nlearning_rate: 0.02\nsteps: 8\nbatch_size: 8\n")
    sizes = ["model.hidden_size=8", "model.num_hidden_layers=1", "model.num_attention_heads=1", "model.intermediate_size=8"]
    train.main(config, ["seeds=[0, 3]", "dropout=noise", "warmup_steps=2"], sizes)
    assert "over 2 seed(s), deviation" in capsys.readouterr().out
    report.report([Path(values.output)], tmp_path / "table")
    table = json.loads((tmp_path / "table" / "table.json").read_text())
    cell = table["linear, noise"]["text"]
    scores = [100 * json.loads(p.read_text())["test_accuracy"] for p in Path(values.output).rglob("result.json")]
    assert cell["seeds"] == [0, 3] and cell["mean"] == pytest.approx(np.mean(scores))
    assert cell["deviation"] == pytest.approx(np.std(scores, ddof=1))
    assert (tmp_path / "table" / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_is_the_mean_of_its_seeds_and_the_deviation_of_a_sample():
    common = {"task": "text", "attn_implementation": "sdpa", "dropout": "none", "seconds": 2.0}
    runs = ((3, 0.5, 100), (1, 0.6, 300), (2, 0.7, 200))
    made = [{**common, "seed": seed, "test_accuracy": score, "steps": steps} for seed, score, steps in runs]
    cell = report.gather(made)["softmax"]["text"]
    assert cell.pop("seeds") == [1, 2, 3]
    assert cell == pytest.approx({"mean": 60.0, "deviation": 10.0, "steps": 200.0, "seconds": 2.0})
    assert report.gather(made[:1])["softmax"]["text"]["deviation"] is None


def test_two_processes_learn_what_one_does(tmp_path):
    changes = {"dropout": "none", "hidden_dropout": 0.0}
    expected = run(settings(tmp_path, output=str(tmp_path / "one"), **changes))
    values = settings(tmp_path, output=str(tmp_path / "two"), **changes)
    (tmp_path / "run.yaml").write_text(dump(values))
    finish(launch(train.main, tmp_path / "run.yaml"))
    found = json.loads((tmp_path / "two" / "seed-0" / "result.json").read_text())
    assert found["test_accuracy"] == expected["test_accuracy"] and found["test_loss"] == pytest.approx(expected["test_loss"], abs=1e-4)
    for one, two in zip(metrics(tmp_path / "one" / "seed-0"), metrics(tmp_path / "two" / "seed-0"), strict=True):
        assert two == pytest.approx(one, abs=1e-4)
    assert json.loads((tmp_path / "two" / "seed-0" / "facts.json").read_text())["processes"] == 2


# -- settings, metric, report ----------------------------------------------------------------------------------------


def test_every_config_file_makes_a_model_of_its_task():
    files = [path for path in CONFIGS.rglob("*.yaml") if path.name not in ("small.yaml", "base.yaml")]
    tasks = {"listops", "text", "retrieval", "image", "pathfinder", "pathx"}
    assert {path.stem for path in files if path.parent.name == "tay"} == tasks <= {path.stem for path in files if path.parent == CONFIGS}
    for path in files:
        values = load_config(Settings, path, ["attn_implementation=linattn", "dropout=noise"])
        model = training.new_model(values)
        assert values.task == path.stem and model.config.max_position_embeddings == TASKS[path.stem].length
        assert model.config.vocab_size == TASKS[path.stem].vocabulary + 1 and model.config.num_labels == TASKS[path.stem].classes
        if path.parent == CONFIGS:
            assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.num_attention_heads) == (64, 2, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": "nothing"}, "task is 'nothing'"),
        ({"dropout": "standard"}, "linattn never forms"),
        ({"attn_implementation": "sdpa"}, "dropout: noise is linattn's"),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0"),
        ({"steps": 0}, "steps is 0"),
        ({"save_every": 10}, "save_every 10 is not a multiple of log_every 4"),
        ({"seeds": [1, 1]}, "seeds is"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_bad_settings(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changed)


def test_dropout_of_softmax_weights_is_standards_alone(tmp_path):
    for dropout, attention in (("standard", "sdpa"), ("none", "sdpa"), ("noise", "linattn")):
        config = training.new_model(settings(tmp_path, dropout=dropout, attn_implementation=attention, attention_dropout=0.3)).config
        assert config.attention_dropout == (0.3 if dropout == "standard" else 0.0) and config.hidden_dropout == 0.1


def test_bad_models_and_too_little_data(tmp_path):
    assert run(settings(tmp_path, output=str(tmp_path / "just"), batch_size=64, steps=1))["steps"] == 1
    for changed, message in (
        ({"model": {"heads": 2}}, "'heads' is unknown"),
        ({"model": {"num_labels": 2}}, "'num_labels' is unknown or set by the task"),
        ({"model": {"hidden_size": 9, "num_attention_heads": 2}}, "not a multiple of"),
        ({"linattn": {"kernal": "linear"}}, "kernal"),
        ({"linattn": {"a": 0.1}}, "the model cannot be made"),
        ({"batch_size": 65}, "64 training examples do not fill a batch of 65"),
    ):
        with pytest.raises(RecipeError, match=message):
            run(settings(tmp_path, **changed))
    assert not (tmp_path / "out").exists()


def test_accuracy_by_the_library_and_without_it(monkeypatch):
    guesses, right = np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4])
    assert accuracy(guesses, right) == 0.75 == metric_class()().compute(predictions=guesses.tolist(), references=right.tolist())["accuracy"]

    def missing():
        raise ImportError

    monkeypatch.setattr("recipes.lra.accuracy.metric_class", missing)
    assert accuracy(guesses, right) == 0.75


def result(task: str, attention: str, dropout: str, seed: int, score: float, **more) -> dict:
    return {"task": task, "attn_implementation": attention, "dropout": dropout, "seed": seed, "test_accuracy": score, **more}


def test_the_table_stands_beside_the_published_rows():
    results = [
        result("text", "sdpa", "standard", 0, 0.62), result("image", "sdpa", "standard", 0, 0.40),
        result("text", "linattn", "noise", 0, 0.64), result("text", "linattn", "noise", 1, 0.66),
        result("image", "linattn", "noise", 0, 0.42),
        result("text", "linattn", "none", 0, 0.5, linattn={"kernel": "quadratic"}),
    ]  # fmt: skip
    lines = report.to_markdown(report.gather(results[:5])).splitlines()
    assert lines[0] == "| test accuracy, % | Text | Image | mean of 2 |"
    assert lines[2] == "| softmax, dropout | 62.00 | 40.00 | 51.00 |"
    assert lines[3] == "| linear, noise | 65.00 ± 1.41 (2) | 42.00 | 53.50 |"
    assert lines[4] == "| *published: softmax* | 61.95 | 40.57 | 51.26 |"
    assert list(report.gather(results)) == ["softmax, dropout", "linear, noise", "quadratic"]
    with pytest.raises(RecipeError, match="two results are of softmax, dropout on text with seed 0"):
        report.gather([results[0], results[0]])


def test_a_bad_run_to_report(tmp_path):
    with pytest.raises(RecipeError, match="no such file or folder"):
        report.result_files([tmp_path / "nowhere"])
    with pytest.raises(RecipeError, match="no result.json in it"):
        report.read_results(report.result_files([tmp_path]))
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(RecipeError, match="test_accuracy is missing"):
        report.read_results(report.result_files([tmp_path]))
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(RecipeError, match="not readable as JSON"):
        report.read_results(report.result_files([tmp_path]))
