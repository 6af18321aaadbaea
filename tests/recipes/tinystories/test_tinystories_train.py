"""Training: it learns, it can be killed and goes on to the same losses, and what it is given is checked before it writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from launched import finish, launch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_linattn
from convert.linearize import linearize
from recipes.common.errors import RecipeError
from recipes.common.state import read_records
from recipes.common.threads import threads
from recipes.tinystories.model import load_model
from recipes.tinystories.train import main
from recipes.tinystories.training import Training

ROOT = Path(__file__).resolve().parents[3]
LINEAR = {"attn_implementation": "linattn"}


def train(settings, resume=False, overwrite=False):
    """Run to the end; the losses by step, of training and of validation."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    Training(settings, resume, overwrite).run_all()
    return losses(Path(settings.output))


def losses(folder):
    records = read_records(folder / "metrics.jsonl")
    names = ("loss", "cross_entropy", "valid_loss", "gradient_norm", "learning_rate", "noise", "samples")
    return [(r["step"], *(r.get(name) for name in names)) for r in records]


def training_losses(records):
    return [record[1] for record in records if record[1] is not None]


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    linearize(tiny.model, folder)
    return folder


def test_it_learns_and_leaves_a_model_a_curve_and_a_log(settings):
    s = settings(**LINEAR, noise=0.1, steps=20, eval_every=10, checkpoint_every=10, separate_stories=True)
    records = train(s)
    first, *_, last = [record[3] for record in records if record[3] is not None]
    assert last < first - 0.5
    noise = [record[6] for record in records if record[6] is not None]
    assert noise == sorted(noise, reverse=True)
    assert noise[0] == 0.1
    assert noise[-1] == pytest.approx(0.1 / 20)
    folder = Path(s.output)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events*"))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000020"]
    samples = [record[7] for record in records if record[7] is not None]
    assert len(samples) == 3
    assert samples[0][0]["prompt"]
    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config._attn_implementation == "linattn"
    assert model.config.use_cache
    assert AutoTokenizer.from_pretrained(folder / "model").bos_token_id == 0


def test_the_model_has_a_card_of_what_it_is_and_what_was_measured(settings, converted, tiny):
    s = settings(model=str(converted), teacher=str(tiny.model), teacher_weight=0.75, steps=3)
    before, *_, after = [record[3] for record in train(s) if record[3] is not None]
    card = ModelCard.load(Path(s.output) / "model" / "README.md")
    assert card.data.tags == ["linear-attention", "linattn"] and card.data.pipeline_tag == "text-generation" and not card.data.base_model
    told = " ".join(card.text.split())
    assert f"A language model, trained from `{converted.parent.name}` to match the predictions of `{tiny.folder.name}` (0.75" in told
    assert f"{3 * 4 * 32} tokens of `stories.txt`" in told and str(tiny.folder) not in told and str(converted) not in told
    assert f"{before:.4f} nats a token before it, {after:.4f} after. Nothing else was measured." in told
    assert "Its attention weights are f(s) = " in told and "import hf_linattn" in told


def test_a_model_from_scratch_has_a_card_too(settings, tiny):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    s = settings(model=None, model_type="llama", tokenizer=str(tiny.model), model_config=sizes, attn_implementation="sdpa", steps=1)
    train(s)
    told = " ".join((Path(s.output) / "model" / "README.md").read_text().split())
    assert "A llama model, trained from random weights by the cross-entropy of the text" in told
    assert "Its attention is softmax." in told and "import hf_linattn" not in told and "tags" not in told


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (None, "loss: cross-entropy of the training text, nats a token"),
        (1.0, "loss: KL divergence from the teacher's predictions, nats a token"),
        (0.5, "loss: 0.5 KL divergence from the teacher's predictions + 0.5 cross-entropy of the training text, nats a token"),
    ],
)
def test_it_says_what_the_loss_is(weight, told, settings, tiny, capsys):
    s = settings(steps=2, samples=0, **({} if weight is None else {"teacher": str(tiny.model), "teacher_weight": weight}))
    train(s)
    said = capsys.readouterr().out
    assert told in said and f"2 steps of 4 x 32 tokens on {threads()} of the CPU" in said


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_model_feels_the_noise_that_the_log_tells_of(settings, tmp_path, monkeypatch, schedule):
    felt, noise = [], hf_linattn.attention.noise

    def watched(module, *args):
        given = noise(module, *args)
        if module.training and module.layer_idx == 0:
            felt.append(float(given.get("dropout_p", 0.0)))
        return given

    monkeypatch.setattr(hf_linattn.attention, "noise", watched)
    s = {**LINEAR, "noise": 0.2, "noise_schedule": schedule, "gradient_accumulation": 2, "batch_size": 2, "eval_every": 100, "samples": 0}
    logged = [record[6] for record in train(settings(**s)) if record[6] is not None]
    falls = hf_linattn.DropoutSchedule(schedule, 0.2, 6)
    assert logged == pytest.approx([falls(step) for step in range(6)])
    assert felt == pytest.approx([falls(step) for step in range(6) for _ in range(2)])


def test_rates_rise_over_the_warm_up_and_fall_to_nothing(settings):
    records = train(settings(warmup=0.5, learning_rate=0.03, eval_every=100))
    rates = [record[5] for record in records if record[5] is not None]
    assert rates == pytest.approx([0.01, 0.02, 0.03, 0.0225, 0.0075, 0.0], abs=1e-9)


def test_the_optimizer_is_as_the_settings_say(settings, converted, tmp_path):
    s = settings(model=str(converted), beta2=0.9, weight_decay=0.3, linattn_learning_rate=0.2, eval_sequences=3)
    training = Training(s, False, False)
    groups = training.optimizer.param_groups
    assert [(group["initial_lr"], group["weight_decay"], group["betas"]) for group in groups] == [
        (0.01, 0.3, (0.9, 0.9)), (0.01, 0.0, (0.9, 0.9)), (0.2, 0.0, (0.9, 0.9))
    ]  # fmt: skip
    training.run.close()


def test_it_validates_on_as_many_rows_as_the_settings_say(settings, tiny):
    s = settings(eval_sequences=3, steps=1, samples=0)
    (valid, *_) = [record[3] for record in train(s) if record[3] is not None]
    model, rows = load_model(str(tiny.model)).eval(), Training(settings(output=s.output + "-2"), False, False).valid_rows
    batch = rows.batch(np.arange(3))["input_ids"]
    with torch.no_grad():
        assert model(batch, labels=batch).loss.item() == pytest.approx(valid, rel=1e-5)


def test_gradients_are_clipped_to_what_the_settings_say(settings, tiny):
    """Adam moves each weight by its rate, but for gradients below 1e-8, by which it divides: clipped to 1e-12 they move nothing."""
    s = settings(clip=1e-12, weight_decay=0.0, steps=2, eval_every=100)
    train(s)
    before, after = (load_model(str(folder)).state_dict() for folder in (tiny.model, Path(s.output) / "model"))
    assert 0 < max((after[name] - before[name]).abs().max() for name in before) < 1e-4 * 2 * s.learning_rate


def test_a_loss_that_is_logged_is_the_mean_of_the_steps_since_the_last(settings, tmp_path):
    each = training_losses(train(settings(steps=5, eval_every=100, checkpoint_every=100)))
    some = training_losses(train(settings(steps=5, log_every=2, eval_every=100, checkpoint_every=100, output=str(tmp_path / "some"))))
    assert some == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2, each[4]], rel=1e-6)


def test_what_is_logged_says_what_was_trained_on(settings):
    s = settings(steps=5, log_every=2, eval_every=4, checkpoint_every=100, sample_tokens=3)
    train(s)
    records = list(read_records(Path(s.output) / "metrics.jsonl"))
    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == [2, 4, 5]
    assert [record["tokens"] for record in training] == [step * s.batch_size * s.length for step in (2, 4, 5)]
    names = {"step", "loss", "cross_entropy", "learning_rate", "gradient_norm", "tokens", "seconds", "tokens_per_second"}
    assert all(set(record) == names for record in training)
    for record in training:  # seconds are rounded to thousandths
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"], rel=0.001 / record["seconds"] + 1e-3)
    evaluations = [record for record in records if "valid_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 4, 5]
    assert all(len(record["samples"]) == s.samples for record in evaluations)
    assert all(len(sample["prompt"].split()) <= 8 and sample["text"] for record in evaluations for sample in record["samples"])
    facts = json.loads((Path(s.output) / "facts.json").read_text())
    assert facts["sequences"] > 0 and facts["parameters"] == load_model(str(s.model)).num_parameters()


def test_how_often_it_evaluates_changes_nothing_it_learns(settings, tmp_path):
    often = train(settings(**LINEAR, noise=0.2, eval_every=1, checkpoint_every=1))
    seldom = train(settings(**LINEAR, noise=0.2, eval_every=100, checkpoint_every=100, output=str(tmp_path / "other")))
    assert training_losses(often) == training_losses(seldom)


def test_accumulated_and_checkpointed_gradients_are_the_whole_batchs(settings, tmp_path):
    whole = train(settings(**LINEAR))
    parts = train(settings(**LINEAR, batch_size=2, gradient_accumulation=2, output=str(tmp_path / "parts")))
    assert training_losses(parts) == pytest.approx(training_losses(whole), abs=1e-4)
    again = train(settings(**LINEAR, gradient_checkpointing=True, noise=0.1, output=str(tmp_path / "again")))
    plain = train(settings(**LINEAR, noise=0.1, output=str(tmp_path / "plain")))
    assert training_losses(again) == pytest.approx(training_losses(plain), abs=1e-5)
    assert training_losses(again) != pytest.approx(training_losses(whole), abs=1e-5)


def test_a_run_goes_on_into_the_next_epoch(settings, tmp_path):
    s = settings(steps=None, epochs=2.0, length=64, batch_size=40, eval_every=100, checkpoint_every=100)
    training = Training(s, False, False)
    assert training.pace.steps == 2 * (len(training.train_rows) // 40)
    training.run_all()
    assert len(training_losses(losses(Path(s.output)))) == training.pace.steps


def test_a_teacher_that_is_the_student_leaves_no_loss(settings, tiny, tmp_path):
    records = train(settings(teacher=str(tiny.model), steps=1))
    assert records[1][1] == pytest.approx(0.0, abs=1e-6)
    assert records[1][2] > 3
    half = train(settings(teacher=str(tiny.model), steps=1, teacher_weight=0.25, output=str(tmp_path / "half")))
    assert half[1][1] == pytest.approx(0.75 * half[1][2], rel=1e-5)


def test_a_converted_model_follows_its_teacher(settings, tiny, converted):
    # The start is the teacher's weights made larger, so that attention matters and the swap costs something.
    records = train(
        settings(model=str(converted), teacher=str(tiny.model), steps=12, learning_rate=3e-3, eval_every=100, checkpoint_every=100)
    )
    kl = training_losses(records)
    assert min(kl[-3:]) < kl[0]


def test_per_head_parameters_have_a_rate_of_their_own(settings, converted):
    s = settings(model=str(converted), linattn_learning_rate=0.5)
    model = load_model(s.model)
    groups = hf_linattn.parameter_groups(model, s.learning_rate, s.linattn_learning_rate, s.weight_decay)
    heads = {id(p) for name, p in model.named_parameters() if ".linattn." in name}
    assert heads
    (own,) = [group for group in groups if group["lr"] == 0.5]
    assert {id(p) for p in own["params"]} == heads
    assert own["weight_decay"] == 0
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_from_scratch(settings, tiny):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    s = settings(model=None, model_type="gpt_neox", model_config=shape, tokenizer=str(tiny.model), steps=2, attn_implementation="sdpa")
    first = train(s)
    config = AutoConfig.from_pretrained(Path(s.output) / "model")
    assert (config.model_type, config.vocab_size, config.hidden_size) == ("gpt_neox", 300, 16)
    assert getattr(config, "linattn", None) is None
    torch.rand(7)  # the seed decides, not what was drawn before
    again, other = (train(settings(**{**vars(s), "seed": seed}), overwrite=True) for seed in (0, 1))
    assert losses(Path(s.output)) == other and again[0] == first[0] and other[0][3] != first[0][3]


def test_from_scratch_with_options_of_linear_attention(settings, tiny):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    scratch = {"model": None, "model_type": "llama", "model_config": shape, "tokenizer": str(tiny.model), "steps": 1}
    s = settings(**scratch, attn_implementation="linattn", linattn={"kernel": "quadratic", "decay": "none", "learnable": False})
    train(s)
    config = AutoConfig.from_pretrained(Path(s.output) / "model")
    assert (config._attn_implementation, config.linattn["kernel"], config.hidden_size) == ("linattn", "quadratic", 16)


KILLED = {**LINEAR, "noise": 0.2, "steps": 8, "gradient_accumulation": 2, "batch_size": 2, "eval_every": 4, "samples": 1}


def test_killed_at_any_moment_it_goes_on_to_the_same_losses(settings, config_file, tmp_path):
    whole = train(settings(**KILLED, output=str(tmp_path / "whole")))
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "recipes.tinystories.train", "--config", str(config_file(**KILLED, output=str(folder)))]
    process = start(command)
    wait_for_step(folder, 5, lambda: process.poll() is None)
    process.send_signal(signal.SIGSTOP)
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(RecipeError, match=f"is being written by process {process.pid} on "):
            train(settings(**KILLED, output=str(folder)), **how)
    process.kill()
    process.wait()
    assert not (folder / "model").exists()
    # What a kill in the middle of writing leaves behind.
    (folder / "checkpoints" / ".partial-step-00000099").mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert train(settings(**KILLED, output=str(folder)), resume=True) == whole
    same_weights(folder, tmp_path / "whole")
    seconds = [record["seconds"] for record in read_records(folder / "metrics.jsonl")]
    assert seconds == sorted(seconds)  # those before the kill are counted


def test_two_processes_learn_what_one_does_and_go_on_after_a_kill(settings, config_file, tmp_path):
    changes = {**KILLED, "noise": 0.0}
    whole = train(settings(**changes, output=str(tmp_path / "whole")))
    folder = tmp_path / "two"
    shared = {**changes, "gradient_accumulation": 1, "output": str(folder)}
    config = config_file(**shared)
    started = launch(main, config)
    wait_for_step(folder, 5, lambda: not started.join(timeout=0))
    family = [psutil.Process(pid) for pid in started.pids()]
    for each in family:
        each.suspend()
    with pytest.raises(RecipeError, match="is being written by process (" + "|".join(str(each.pid) for each in family) + ") on "):
        train(settings(**changes, output=str(folder)), resume=True)
    for each in started.processes:
        each.kill()
        each.join()
    assert not (folder / "model").exists()
    finish(launch(main, config, None, None, True))  # with --resume
    assert training_losses(losses(folder)) == pytest.approx(training_losses(whole), abs=1e-4)
    assert [r[3] for r in losses(folder) if r[3]] == pytest.approx([r[3] for r in whole if r[3]], abs=1e-4)
    with pytest.raises(RecipeError, match="processes was 2 and is now 1"):
        train(settings(**shared), resume=True)


def start(command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)


def wait_for_step(folder, step, is_running):
    end = time.monotonic() + 200
    while not any(r["step"] >= step for r in read_records(folder / "metrics.jsonl")):
        assert is_running(), "the run ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.01)


def same_weights(one, other):
    left, right = (load_model(str(folder / "model")).state_dict() for folder in (one, other))
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_a_finished_run_is_left_alone_and_another_runs_folder_refused(settings, tmp_path):
    s = settings(steps=2)
    records = train(s)
    assert train(s, resume=True) == records
    with pytest.raises(RecipeError, match="exists already; pass --resume"):
        train(s)
    with pytest.raises(RecipeError, match=r"belongs to another run: learning_rate was 0.01 and is now 0.5"):
        train(settings(steps=2, learning_rate=0.5), resume=True)
    assert losses(Path(s.output)) == records
    assert len(train(settings(steps=1), overwrite=True)) < len(records)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for how, why in (({"resume": True}, "no run of this version to resume"), ({"overwrite": True}, "holds no mark")):
        with pytest.raises(RecipeError, match=why):
            train(settings(steps=2, output=str(tmp_path / "mine")), **how)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_processes_that_do_not_see_one_another_are_refused(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    s = settings()
    with pytest.raises(RecipeError, match="2 processes were started and accelerate sees 1"):
        train(s)
    assert not Path(s.output).exists()


def test_resuming_on_other_text_is_refused(settings, tiny, tmp_path):
    text = tmp_path / "text.txt"
    shutil.copy(tiny.text, text)
    s = settings(steps=2, train_data=[str(text)])
    train(s)
    shutil.rmtree(Path(s.output) / "model")
    text.write_text(text.read_text().replace("park", "dark"))
    with pytest.raises(RecipeError, match="belongs to another run: "):
        train(s, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": 0.1}, "noise is dropout for linear attention"),
        ({"length": 65}, "length 65 is more than the model's 64 positions"),
        ({"batch_size": 10_000}, "one step takes 10000; give more text or lower batch_size"),
        ({"valid_stories": 10_000}, "too few to hold 10000 out"),
        ({"train_data": ["absent.txt"]}, "no such file"),
        ({"model": "absent/folder/x"}, "there is no folder absent/folder/x"),
        ({"attn_implementation": "lineattn"}, "no model can be made of it"),
        ({**LINEAR, "linattn": {"kernal": "linear"}}, "linattn: "),
        ({**LINEAR, "linattn": {"a": -1.0}}, "linattn: "),
        ({"model_config": {"attention_droput": 0.1}}, "no key of a llama config; did you mean 'attention_dropout'?"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, changes, message):
    s = settings(**changes)
    with pytest.raises(RecipeError) as error:
        train(s)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(s.output).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_every": 3, "log_every": 2}, "multiple of log_every"),
        ({"noise": 1.0}, "noise must lie between 0 and 0.999"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number, got nan"),
        ({"warmup": float("nan")}, "warmup: expected a number, got nan"),
        ({"model": None}, "give either model"),
        ({"model_type": "llama"}, "give either model"),
        ({"model": None, "model_type": "llama"}, "needs a tokenizer"),
        ({"train_data": []}, "names no text"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings, changes, message):
    with pytest.raises(RecipeError, match=message):
        settings(**changes)


def damage_by_pickle(folder):
    state = load_model(str(folder)).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


def damage_by_cutting(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def damage_by_a_missing_weight(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state.pop("model.norm.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [damage_by_pickle, damage_by_cutting, damage_by_a_missing_weight])
def test_damaged_or_pickled_checkpoints_are_refused(settings, tiny, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny.model, folder)
    damage(folder)
    s = settings(model=str(folder))
    with pytest.raises(RecipeError, match="weights|no safetensors file"):
        train(s)
    assert not Path(s.output).exists()


def test_a_teacher_with_another_vocabulary_is_refused(settings, tiny, tmp_path):
    model = load_model(str(tiny.model))
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(RecipeError, match="both must use one tokenizer"):
        train(settings(teacher=str(tmp_path / "small")))


def test_a_loss_that_is_no_number_stops_the_run(settings):
    with pytest.raises(RecipeError, match="the (loss|gradient) at step 2 is no finite number; lower learning_rate"):
        train(settings(learning_rate=1e30, clip=1e30, steps=6))


def test_a_disk_that_fills_costs_only_what_came_after_the_last_checkpoint(settings, tmp_path, monkeypatch):
    whole = train(settings(output=str(tmp_path / "whole")))
    s = settings()
    save_state = Accelerator.save_state

    def fail(self, folder):
        save_state(self, folder)
        if "step-00000004" in folder:
            raise RuntimeError("PytorchStreamWriter failed writing file data/2: file write failed")

    with monkeypatch.context() as patch, pytest.raises(RecipeError, match="step-00000004 failed.*free some space"):
        patch.setattr(Accelerator, "save_state", fail)
        train(s)
    folder = Path(s.output)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    with monkeypatch.context() as patch, pytest.raises(RecipeError, match="model failed.*No space left"):
        patch.setattr(PreTrainedModel, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        train(s, resume=True)
    assert not [path for path in folder.iterdir() if "model" in path.name]
    assert train(s, resume=True) == whole


def test_the_command_line_says_what_is_wrong_and_exits_with_2(config_file, tmp_path):
    command = [sys.executable, "-m", "recipes.tinystories.train", "--config", str(config_file()), "--set", "steps=2", "lenght=8"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("unknown key 'lenght'; did you mean 'length'?")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_every_config_that_comes_with_the_recipe_is_valid():
    from recipes.common.config import load_config
    from recipes.tinystories.settings import Settings

    files = sorted((ROOT / "recipes" / "tinystories" / "configs").glob("*.yaml"))
    assert {file.stem for file in files} >= {"pythia-14m", "pythia-1.4b", "tinyllama-1.1b", "stories260k"}
    outputs = [load_config(Settings, file).output for file in files]
    assert len(set(outputs)) == len(files)
    paper = load_config(Settings, ROOT / "recipes" / "tinystories" / "configs" / "pythia-14m.yaml")
    assert (paper.length, paper.batch_size * paper.gradient_accumulation, paper.learning_rate, paper.noise) == (4096, 25, 1e-3, 0.2)


def test_metrics_are_json_without_nan(settings):
    s = settings(steps=1)
    train(s)
    for line in (Path(s.output) / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda x: pytest.fail(x))


def test_runs_are_compared(settings, tmp_path):
    from recipes.tinystories import compare

    one, other = settings(steps=4, eval_every=2), settings(**LINEAR, noise=0.1, steps=4, eval_every=2, output=str(tmp_path / "linear"))
    last = [[r[3] for r in train(s) if r[3] is not None][-1] for s in (one, other)]
    compare.main([f"softmax={one.output}", other.output], tmp_path / "out")
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [run["name"] for run in report] == ["softmax", "linear"]
    assert [run["cross_entropy"] for run in report] == last
    assert [x[0] for x in report[0]["validation"]] == [0, 2, 4]
    assert f"| linear | linattn | 0.1 | 4 | 512 | {last[1]:.4f} |" in (tmp_path / "out" / "comparison.md").read_text()
    assert (tmp_path / "out" / "comparison.png").exists()
    with pytest.raises(RecipeError, match="exists already"):
        compare.main([one.output], tmp_path / "out")
    with pytest.raises(RecipeError, match="not a run's folder"):
        compare.main([str(tmp_path / "out")], tmp_path / "else")
