"""The training stages: what they compute is what a few lines compute, they go on to the same bits, and refuse in a sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from launched import as_fsdp2, finish, launch
from no_caches import no_caches
from safetensors.torch import load_file
from shared_data import require_shared_data
from tiny_softmax import MODEL_TYPES, softmax_model
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.main import get_command

from convert import distill as distill_command
from convert import transfer as transfer_command
from convert.forcing import teacher_forced
from convert.linearize import linearize
from convert.options import LinearizeOptions
from convert.stages import divergence
from convert.stages.distill import Distill
from convert.stages.divergence import Divergence, check_head, head_of
from convert.stages.options import DistillOptions, TransferOptions
from convert.stages.repeats import with_repeats
from convert.stages.stage import spread
from convert.stages.transfer import Transfer
from hf_linattn.models import attention_modules
from recipes.common import cli
from recipes.common.errors import OptionError, RecipeError
from recipes.common.state import read_records


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def given(tiny, tmp_path):
    """A function: changes -> the values of options for a short run."""

    def make(**changes):
        values = {
            "student": str(tiny.student), "output": str(tmp_path / "run"), "teacher": str(tiny.teacher), "data": [str(tiny.text)],
            "length": 32, "batch_size": 4, "tokens": 6 * 4 * 32, "log_every": 1, "validate_every": 3, "save_every": 2, "valid_rows": 6,
        }  # fmt: skip
        return {**values, **changes}

    return make


STAGES = {"transfer": (TransferOptions, Transfer), "distill": (DistillOptions, Distill)}


def mainly(quick: str) -> list:
    """Both stages: what they share is tried with one of them each time, with the other where time does not matter."""
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in STAGES]


def made(name: str, values: dict, resume: bool = False):
    AcceleratorState._reset_state(reset_partial_state=True)
    options, stage = STAGES[name]
    return stage(options(**values), f"convert.{name}", resume, False)


def run(name: str, values: dict, resume: bool = False) -> list[dict]:
    with no_caches():
        made(name, values, resume).run_all()
    records = read_records(Path(values["output"]) / "metrics.jsonl")
    return [{key: value for key, value in record.items() if "second" not in key} for record in records]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


# -- transfer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separate", [False, True])
def test_errors_are_those_of_each_layer_on_the_teachers_hidden_states(given, separate):
    stage = made("transfer", given(separate=separate))
    stage.run.close()
    batch = stage.train_rows.batch(np.arange(4))
    assert ("position_ids" in batch) == separate
    stage.errors(stage.train_rows.batch(np.arange(4, 8)))  # another batch of this shape before it must leave nothing behind
    errors = stage.errors(batch).detach()
    entered, left = {}, {}
    teachers = dict(attention_modules(stage.teacher))

    def keep(name):
        def hook(module, args, kwargs, output):
            entered[name], left[name] = kwargs["hidden_states"], output[0]

        return hook

    for name, module in teachers.items():
        module.register_forward_hook(keep(name), with_kwargs=True)
    stage.teacher(**batch)
    assert stage.names == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    student = stage.student.eval()
    for column, name in enumerate(stage.names):
        if separate:
            forced = []
            module = dict(attention_modules(student))[name]
            hooks = [
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, name=name: (args, kwargs | {"hidden_states": entered[name]}), with_kwargs=True
                ),
                module.register_forward_hook(lambda m, args, out, forced=forced: forced.append(out[0])),
            ]
            student(**batch)
            [hook.remove() for hook in hooks]
            output = forced[0]
        else:
            rows = [teacher_forced(student, {name: entered[name][row : row + 1]}, batch["input_ids"][row : row + 1], (32,), torch.float32)
                    for row in range(4)]  # fmt: skip
            output = torch.cat([row[name] for row in rows])
        wanted = (output - left[name]).square().mean((1, 2)) / left[name].square().mean((1, 2))
        torch.testing.assert_close(errors[:, column], wanted, rtol=1e-4, atol=1e-6)


def test_transfer_brings_linear_layers_near_and_leaves_all_else(given, tiny):
    records = run("transfer", given(tokens=30 * 4 * 32, learning_rate=5e-3, head_learning_rate=0.05))
    first, *_, last = [record for record in records if "valid_error" in record]
    assert all(after < before for before, after in zip(first["valid_layer_errors"], last["valid_layer_errors"], strict=True))
    assert last["valid_error"] == pytest.approx(np.mean(last["valid_layer_errors"]), rel=1e-5)
    folder = Path(given()["output"])
    before, after = weights(tiny.student), weights(folder / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".layers.0.self_attn." in name or ".layers.2.self_attn." in name for name in changed)
    assert any("q_proj" in name for name in changed) and any(name.endswith("_offset") for name in changed)
    for picture in ("loss.png", "layers.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_only_what_is_new_learns_where_that_is_asked_for(given, tiny):
    run("transfer", given(train="new"))
    before, after = weights(tiny.student), weights(Path(given()["output"]) / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith("_offset") for name in changed)


def test_a_layer_whose_error_is_no_number_is_named(given, tiny, tmp_path):
    shutil.copytree(tiny.student, tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "student")
    with pytest.raises(OptionError, match=r"the loss at step 1 in model\.layers\.2\.self_attn is no finite number") as caught:
        run("transfer", given(student=str(tmp_path / "student")))
    assert "; lower --learning_rate or --head_learning_rate and start anew" in caught.value.told("--{}".format)


# -- distill ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(("kl", "text"), [(1.0, 0.0), (0.7, 0.3), (0.0, 1.0)])
def test_loss_and_gradients_are_those_of_all_logits_at_once(model_type, kl, text, monkeypatch):
    student, teacher = (softmax_model(model_type, seed).double() for seed in (0, 1))
    tokens = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(0))
    check_head("student", student, tokens)
    monkeypatch.setattr(divergence, "NUMBERS_AT_ONCE", 97 * 5)  # pieces of five tokens
    of = Divergence(student, teacher, kl, text)
    with torch.no_grad():
        target = teacher(tokens).logits[:, :-1].log_softmax(-1)
        teachers = teacher.base_model(tokens).last_hidden_state[:, :-1]
    logits = student(tokens).logits[:, :-1].log_softmax(-1)
    wanted_kl = F.kl_div(logits, target, log_target=True, reduction="none").sum(-1)
    wanted_text = F.nll_loss(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    (3 * (kl * wanted_kl + text * wanted_text).mean()).backward()
    wanted = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()
    loss, found_kl, found_text = of.loss(student.base_model(tokens).last_hidden_state[:, :-1], teachers, tokens[:, 1:])
    (3 * loss).backward()
    # Sums over words are float32.
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(torch.stack([found_kl, found_text]), torch.stack([wanted_kl.mean(), wanted_text.mean()]).float(), **close)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5 * float(wanted[name].abs().max()), msg=name)
    measured = of.measure(student.base_model(tokens).last_hidden_state[:, :-1], teachers, tokens[:, 1:])
    torch.testing.assert_close(measured["kl"], wanted_kl.detach().mean(1).float(), **close)
    torch.testing.assert_close(measured["loss"], wanted_text.detach().mean(1).float(), **close)
    assert torch.equal(measured["top1"], (logits.argmax(-1) == target.argmax(-1)).float().mean(1))


def test_autocast_rounds_logits_and_no_divergence():
    """Of a student near its teacher, where factors rounded to bfloat16 leave little of it."""
    teacher = softmax_model("llama")
    student = softmax_model("llama")
    with torch.no_grad():
        student.lm_head.weight.add_(0.02 * torch.randn(student.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)))
    tokens = torch.randint(3, 90, (4, 40), generator=torch.Generator().manual_seed(0))
    hidden = teacher.base_model(tokens).last_hidden_state.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits, target = (head_of(model)(hidden).double().log_softmax(-1) for model in (student, teacher))
        _, found, _ = Divergence(student, teacher, 1.0, 0.0).loss(hidden, hidden.detach(), tokens)
    wanted = F.kl_div(logits, target, log_target=True, reduction="none").sum(-1).mean()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_a_head_that_is_not_known_is_refused():
    model = softmax_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out if out.shape[0] == 1 and out.shape[1] == 1 else out)
    forward = model.forward
    model.forward = lambda *args, **kwargs: SimpleNamespace(logits=2 * forward(*args, **kwargs).logits)
    with pytest.raises(RecipeError, match="a llama makes its logits in a way that convert.distill does not know"):
        check_head("model", model, torch.arange(8)[None])
    assert head_of(model) is not None


@pytest.mark.parametrize(("model_type", "changes"), [
    ("cohere", {"logit_scale": 0.25}), ("granite", {"logits_scaling": 4.0}), ("gemma2", {"final_logit_softcapping": 0.5}),
])  # fmt: skip
def test_heads_that_scale_or_cap_are_known(model_type, changes):
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes, **more, **changes)).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        given, plain = head_of(model)(model.base_model(tokens).last_hidden_state), model.get_output_embeddings()
        torch.testing.assert_close(given, model(tokens).logits)
        assert not torch.allclose(given, plain(model.base_model(tokens).last_hidden_state), rtol=0.05)
    check_head("model", model.train(), tokens)
    assert model.training


def test_distilling_learns_and_what_it_leaves_loads_generates_and_goes_on(given, tiny, tmp_path):
    records = run("distill", given(tokens=40 * 4 * 32, learning_rate=3e-3, warmup=0.0, validate_every=20))
    first, *_, last = [record for record in records if "valid_kl" in record]
    assert last["valid_kl"] < 0.8 * first["valid_kl"] and last["valid_above_teacher"] < first["valid_above_teacher"]
    assert last["valid_above_teacher"] == pytest.approx(last["valid_loss"] - last["valid_teacher_loss"], abs=1e-5)
    folder = Path(given()["output"]) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.use_cache and model.config._attn_implementation == "linattn" and model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The dog", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] == ids.shape[1] + 3
    report = json.loads((folder / "conversion.json").read_text())
    assert report["source"] == str(tiny.teacher)
    (stage,) = report["stages"]
    assert (stage["stage"], stage["steps"], stage["tokens"]) == ("convert.distill", 40, 40 * 128)
    assert stage["after"]["valid_kl"] == last["valid_kl"] and stage["before"]["valid_kl"] == first["valid_kl"]
    card = (folder / "README.md").read_text()
    assert "has not been trained since" not in card and "| `convert.distill` | teacher | 5,120 | 40 |" in card
    # A run's folder is a student for the next stage.
    again = given(student=str(Path(given()["output"])), output=str(tmp_path / "next"), tokens=128)
    options = DistillOptions(**again)
    options.check_paths()
    assert options.student == str(folder)
    run("distill", {**again, "student": options.student})
    report = json.loads((tmp_path / "next" / "model" / "conversion.json").read_text())
    assert [stage["steps"] for stage in report["stages"]] == [40, 1]
    card = (tmp_path / "next" / "model" / "README.md").read_text()
    assert card.count("| stage |") == 1 and card.count("| `convert.distill` |") == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_stored_in_less_and_what_attention_starts_from_is_not(given, dtype):
    run("distill", given(tokens=128, dtype=dtype))
    stored = load_file(Path(given()["output"]) / "model" / "model.safetensors")  # loading it as a model would cast it
    kinds = {name: value.dtype for name, value in stored.items()}
    starts = {name for name in kinds if ".linattn." in name and not name.endswith("_offset")}
    assert starts and {kinds[name] for name in starts} == {torch.float32}
    assert {kinds[name] for name in set(kinds) - starts} == {getattr(torch, dtype)}


def test_lora_is_merged(given, tiny):
    values = given(lora=2, learning_rate=1e-2)
    stage = made("distill", values)
    learning = {name for name, parameter in stage.student.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "_offset" in name for name in learning)
    assert any("q_proj.lora_A" in name for name in learning) and not any("gate_proj" in name for name in learning)
    stage.run_all()
    batch = stage.valid_rows.batch(np.arange(2))
    model = AutoModelForCausalLM.from_pretrained(Path(values["output"]) / "model").eval()
    stage.student.config.use_cache = False
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, use_cache=False).logits, stage.student.eval()(**batch).logits, rtol=1e-4, atol=1e-4)
    before, after = weights(tiny.student), weights(Path(values["output"]) / "model")
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed) and all("self_attn" in name for name in changed)


def test_the_last_steps_have_long_rows_and_none_of_them_holds_what_is_kept_out(given):
    stage = made("distill", given(long_length=64, long_share=0.5, valid_rows=2))
    stage.run.close()
    shapes = [tuple(batch["input_ids"].shape) for _, batch in zip(range(6), stage.batches(0), strict=False)]
    assert shapes == [(4, 32)] * 3 + [(2, 64)] * 3
    for step in (1, 4):
        whole = [batch["input_ids"] for _, batch in zip(range(6), stage.batches(0), strict=False)][step:]
        again = [batch["input_ids"] for _, batch in zip(range(6 - step), stage.batches(step), strict=False)]
        assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    kept = stage.valid_rows.chosen
    assert not set(kept // 2) & set(stage.long_rows.chosen) and not set(kept) & set(stage.train_rows.chosen)
    assert len(stage.long_rows) + len(set(kept // 2)) == len(stage.train_rows.tokens) // 64


def test_repeats_come_from_the_row_itself_in_so_many_of_sixteen_rows():
    rows = np.arange(16 * 256).reshape(16, 256)
    changed = with_repeats(rows, 3, seed=0, number=0)
    different = [index for index in range(16) if not np.array_equal(rows[index], changed[index])]
    assert different == [0, 1, 2] and np.array_equal(rows, np.arange(16 * 256).reshape(16, 256))
    for index in different:
        assert set(changed[index]) <= set(rows[index])
        moved = np.flatnonzero(changed[index] != rows[index])
        assert len(moved) >= 24 and (changed[index][moved] < rows[index][moved]).all()  # each from an earlier place
    assert np.array_equal(with_repeats(rows, 3, seed=0, number=0), changed)
    assert not np.array_equal(with_repeats(rows, 3, seed=0, number=16), changed)
    drawn = with_repeats(rows, 5, seed=1, number=2)  # the same in every version, so that one goes on with another's run
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "bfd6165ae1c572cf"
    assert [index for index in range(4) if (with_repeats(rows[:4], 2, 0, 4)[index] != rows[index]).any()] == [0, 1]
    assert not (with_repeats(rows[:4], 2, 0, 1) != rows[:4]).any()  # rows 4 to 7 of the run
    assert (with_repeats(rows[:, :48], 1, 0, 0)[0] == [*range(24), *range(24)]).all()
    with pytest.raises(ValueError, match="too short"):
        with_repeats(rows[:, :47], 1, 0, 0)


def test_rows_that_are_kept_out_are_spread():
    assert spread(100, 4).tolist() == [12, 37, 62, 87]
    assert spread(3, 3).tolist() == [0, 1, 2]


# -- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mainly("distill"))
def test_a_window_is_dropped_ever_less_and_a_resume_draws_the_same(given, tiny, tmp_path, name, monkeypatch):
    linearize(tiny.teacher, tmp_path / "student", LinearizeOptions(form="window", window=8, sinks=2, keep_softmax=(1,), check=False))
    shared = {"student": str(tmp_path / "student"), "window_drop": 0.8, "tokens": 10 * 4 * 32}
    expected = run(name, given(output=str(tmp_path / "whole"), **shared))
    drops = [record["window_drop"] for record in expected if "window_drop" in record]
    assert drops == pytest.approx([0.8 * max(0, 1 - step / 7) for step in range(10)])
    values = given(output=str(tmp_path / "killed"), **shared)
    stage, before_step = STAGES[name][1], STAGES[name][1].before_step

    def die(self):
        before_step(self)
        if self.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "before_step", die)
        run(name, values)
    assert run(name, values, resume=True) == expected
    with pytest.raises(RecipeError, match="--window-drop: .* has no window beside another attention"):
        run(name, given(output=str(tmp_path / "none"), window_drop=0.5))


LONGER = {"transfer": {}, "distill": {"repeat": 8, "length": 48, "tokens": 6 * 4 * 48, "gradient_accumulation": 2, "batch_size": 2}}


@pytest.mark.parametrize("at", [1, 5])  # before the first checkpoint, behind the second
@pytest.mark.parametrize("name", mainly("distill"))
def test_killed_it_goes_on_to_the_same_bits(given, tmp_path, name, at, monkeypatch):
    expected = run(name, given(output=str(tmp_path / "whole"), **LONGER[name]))
    stage = STAGES[name][1]

    def die(self):
        if self.step == at:
            raise KeyboardInterrupt

    values = given(output=str(tmp_path / "killed"), **LONGER[name])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "before_step", die)
        run(name, values)
    assert run(name, values, resume=True) == expected
    one, other = (weights(tmp_path / which / "model") for which in ("whole", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert run(name, values, resume=True) == expected  # a finished run is left alone


@pytest.mark.parametrize("name", mainly("transfer"))
def test_two_processes_learn_what_one_does(given, tmp_path, name):
    expected = run(name, given(output=str(tmp_path / "one")))
    values = given(output=str(tmp_path / "two"), batch_size=2)
    command = {"transfer": transfer_command.transfer, "distill": distill_command.distill}[name]
    finish(launch(command, STAGES[name][0](**values)))
    found = [{k: v for k, v in r.items() if "second" not in k} for r in read_records(tmp_path / "two" / "metrics.jsonl")]
    assert len(found) == len(expected)
    for one, two in zip(expected, found, strict=True):
        assert {k: v for k, v in two.items() if not isinstance(v, list)} == pytest.approx(
            {k: v for k, v in one.items() if not isinstance(v, list)}, rel=2e-3, abs=1e-4
        )


def distill_by_shards(options: DistillOptions) -> None:
    """`convert.distill` that insists on a shard for each layer and one for the rest."""
    stage = Distill(options, "convert.distill", False, False)
    shards = sum(isinstance(module, FSDPModule) for module in stage.model.modules())
    assert shards == 1 + stage.student.config.num_hidden_layers
    stage.run_all()


@pytest.mark.parametrize("state_dict", ["FULL_STATE_DICT", pytest.param("SHARDED_STATE_DICT", marks=pytest.mark.slow)])
def test_two_processes_that_share_the_weights_learn_what_one_does(given, tmp_path, state_dict):
    expected = run("distill", given(output=str(tmp_path / "one")))
    values = given(output=str(tmp_path / "two"), batch_size=2)
    finish(launch(as_fsdp2, distill_by_shards, state_dict, DistillOptions(**values)))
    found = list(read_records(tmp_path / "two" / "metrics.jsonl"))
    for key in ("loss", "gradient_norm", "valid_kl"):
        one, two = ([record[key] for record in records if key in record] for records in (expected, found))
        assert len(one) > 2 and two == pytest.approx(one, rel=2e-3)
    one, two = (weights(tmp_path / name / "model") for name in ("one", "two"))
    assert one.keys() == two.keys()
    torch.testing.assert_close(two, one, atol=2e-3, rtol=0)


def test_shared_weights_in_half_precision_round_no_measurement(given, tmp_path):
    half = {"mixed_precision": "bf16", "tokens": 4 * 32}
    expected = run("distill", given(output=str(tmp_path / "one"), **half))
    values = given(output=str(tmp_path / "two"), batch_size=2, **half)
    finish(launch(as_fsdp2, distill_command.distill, "SHARDED_STATE_DICT", DistillOptions(**values)))
    one, two = (
        [record["valid_teacher_loss"] for record in records if "valid_kl" in record]
        for records in (expected, read_records(tmp_path / "two" / "metrics.jsonl"))
    )
    assert len(one) == 2 and two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("name", mainly("transfer"))
def test_bfloat16_and_checkpointed_gradients(given, name, tmp_path):
    plain = run(name, given())
    half = run(name, given(output=str(tmp_path / "half"), mixed_precision="bf16", gradient_checkpointing=True))
    for one, other in zip(plain, half, strict=True):
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], rel=0.03) and other["loss"] != one["loss"]


OTHERS = {
    "narrow": {"hidden_size": 16},
    "heads": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "weights": {"use_cache": True},
    "words": {"vocab_size": 260},
    "other": {},
}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("transfer", {"student": "teacher"}, r"is not converted \(model_type llama\): give what linattn convert wrote"),
        ("transfer", {"length": 65}, "length 65 is more than the 64 positions of .*; give --length 64 or less"),
        ("transfer", {"batch_size": 10_000}, "one step takes 10000; give more text"),
        ("transfer", {"data": ["absent.txt"]}, "no such file"),
        ("transfer", {"data": ["short.txt"], "length": 48}, "shorter than one sequence of 48"),
        ("transfer", {"data": ["short.txt"], "length": 8}, "the text is one row of 8 tokens"),
        (
            "transfer",
            {"teacher": "narrow"},
            "its hidden_size is 16 and not [0-9]+; convert.transfer needs the teacher it was converted from",
        ),
        ("transfer", {"teacher": "heads"}, "its num_attention_heads is 1 and not [0-9]+; convert.transfer needs"),
        (
            "transfer",
            {"teacher": "weights"},
            "was not converted from weights: its embeddings of tokens are others; convert.transfer needs",
        ),
        ("distill", {"teacher": "words"}, "has 257 tokens and the teacher 260"),
        ("distill", {"teacher": "other"}, "the tokenizer of .* is not the teacher's"),
        ("distill", {"repeat": 4, "length": 40}, "too short to repeat stretches of 24"),
        ("distill", {"long_length": 128}, "long_length 128 is more than the 64 positions of .*; give --long-length 64 or less"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(given, tiny, tmp_path, monkeypatch, name, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("The dog.")
    for other, edit in OTHERS.items():
        if changes.get("teacher") == other:
            shutil.copytree(tiny.teacher, tmp_path / other)
            config = LlamaConfig.from_pretrained(tiny.teacher)
            for key, value in edit.items():
                setattr(config, key, value)
            if edit:
                LlamaForCausalLM(config).save_pretrained(tmp_path / other)
            else:
                text = (tmp_path / other / "tokenizer.json").read_text()
                (tmp_path / other / "tokenizer.json").write_text(text.replace('"A":', '"AA":'))
    if changes.get("student") == "teacher":
        changes = {"student": str(tiny.teacher)}
    with pytest.raises(RecipeError, match=message) as error:
        run(name, given(**changes))
    assert "\n" not in str(error.value) and not Path(given()["output"]).exists()


def test_a_teacher_that_the_student_was_not_converted_from_is_told(given, tiny, tmp_path, monkeypatch, capsys):
    """It may be a better one of the same words."""
    monkeypatch.chdir(tmp_path)
    run("distill", given())
    assert "was not converted from" not in capsys.readouterr().out
    shutil.copytree(tiny.teacher, tmp_path / "better")
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny.teacher)).save_pretrained(tmp_path / "better")
    run("distill", given(output="out", teacher="better"))
    assert "was not converted from better (its embeddings of tokens are others)" in " ".join(capsys.readouterr().out.split())


def test_a_run_of_other_options_and_a_run_that_has_not_ended_are_refused(given, monkeypatch):
    values = given()
    run("transfer", values)
    with pytest.raises(RecipeError, match="belongs to another run: learning_rate was 0.0005 and is now 0.1"):
        run("transfer", {**values, "learning_rate": 0.1}, resume=True)
    shutil.rmtree(Path(values["output"]) / "model")
    with pytest.raises(RecipeError, match="the run of a stage that has not come to its end"):
        DistillOptions(**given(student=values["output"])).check_paths()


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (TransferOptions, {"length": 1}, "length is 1; expected at least 2"),
        (TransferOptions, {"warmup": 0.9}, "warmup is 0.9; expected 0 to 0.5"),
        (TransferOptions, {"learning_rate": 0.0}, "learning_rate is 0.0; expected a number above 0"),
        (TransferOptions, {"clip": float("nan")}, "clip is nan"),
        (TransferOptions, {"save_every": 3, "log_every": 2}, "must be a multiple of log_every"),
        (TransferOptions, {"teacher": ""}, "no teacher is given"),
        (TransferOptions, {"data": []}, "no text is given"),
        (TransferOptions, {"mixed_precision": "int8"}, "expected no, bf16 or fp16"),
        (DistillOptions, {"kl_weight": 0.0}, "nothing would be learned"),
        (DistillOptions, {"long_length": 48}, "must be more than length"),
    ],
)
def test_options_out_of_bounds_are_refused(given, options, changes, message):
    with pytest.raises(ValueError, match=message):
        options(**given(**changes))


@pytest.mark.parametrize("options", [TransferOptions, DistillOptions])
def test_the_bounds_themselves_are_allowed(given, options):
    for one in fields(options):
        bounds = {} if one.name == "kl_weight" else one.metadata.get("bounds", {})  # with which nothing would be left to learn
        for end, value in bounds.items():
            fitting = {"log_every": 1} if one.name == "save_every" else {}
            options(**given(**{one.name: value, **fitting}))
            beyond = value - 1e-3 if end == "min" else value + 1e-3
            with pytest.raises(ValueError, match=f"{one.name} is .*; expected "):
                options(**given(**{one.name: beyond, **fitting}))
    if options is DistillOptions:
        options(**given(kl_weight=0.0, text_weight=0.1)), options(**given(long_length=64)), options(**given(kl_weight=0.1))
        with pytest.raises(ValueError, match="long_length 32 must be more than length"):
            options(**given(long_length=32))


def test_a_run_says_what_is_ahead_that_it_goes_on_and_where_it_wrote(given, capsys):
    stage = made("transfer", given())
    rows, learning = len(stage.train_rows), sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    stage.run.close()
    shutil.rmtree(given()["output"])
    capsys.readouterr()
    run("transfer", given())
    said = " ".join(capsys.readouterr().out.split())
    assert f"6 steps of 128 tokens, {rows:,} rows, {learning:,} numbers learn" in said
    assert said.endswith(f"written to {given()['output']}/model")
    with open(Path(given()["output"]) / "model" / "README.md", "a") as card:
        card.write("Mine.")  # what its owner wrote into a finished run is nobody else's business
    run("transfer", given(), resume=True)
    assert f"{given()['output']} is finished; its model is in" in " ".join(capsys.readouterr().out.split())


def test_text_to_validate_on_of_its_own(given, tiny, tmp_path):
    words = tiny.text.read_text().split()
    (tmp_path / "own.txt").write_text(" ".join(words[:200]))
    stage = made("distill", given(valid_data=[str(tmp_path / "own.txt")], valid_rows=3, long_length=64))
    stage.run.close()
    assert stage.valid_rows.chosen.tolist() == [0, 1, 2] and len(stage.train_rows) == len(stage.train_rows.tokens) // 32
    assert len(stage.long_rows) == len(stage.train_rows.tokens) // 64


def test_as_much_as_there_is_may_be_asked_for(given):
    """Rows as long as the models have positions, and all of the rows in one step."""
    whole = made("transfer", given(length=64))
    whole.run.close()
    shutil.rmtree(given()["output"])
    most = made("transfer", given(length=64, batch_size=len(whole.train_rows)))
    most.run.close()
    assert most.pace.steps == 1 and len(most.train_rows) == most.rows_per_step
    shutil.rmtree(given()["output"])
    with pytest.raises(RecipeError, match=f"one step takes {len(whole.train_rows) + 1}"):
        made("transfer", given(length=64, batch_size=len(whole.train_rows) + 1))


def test_rates_rise_before_they_fall(given):
    """By default over the first twentieth of the steps: the first learns at a small part of the rate that the last of these has."""
    stage, rates = made("transfer", given(tokens=40 * 4 * 32)), []
    stage.run.close()
    for _ in range(40):
        rates.append(stage.optimizer.param_groups[0]["lr"])
        stage.optimizer.step()
        stage.schedule.step()
    assert rates[:3] == pytest.approx([0, 5e-4 / 2, 5e-4])
    assert all(0 < after < before for before, after in zip(rates[2:], rates[3:], strict=False))


def test_a_teacher_learns_the_same_text_as_a_control(given, tiny, tmp_path):
    control = {"student": str(tiny.teacher), "control": True, "kl_weight": 0.0, "text_weight": 1.0}
    records = run("distill", given(**control, tokens=20 * 4 * 32, validate_every=20, save_every=20))
    first, *_, last = [record for record in records if "valid_kl" in record]
    assert first["valid_kl"] == pytest.approx(0, abs=1e-6) and last["valid_above_teacher"] < first["valid_above_teacher"] - 0.01
    folder = tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM and json.loads((folder / "conversion.json").read_text())["stages"][0]["tokens"] == 20 * 4 * 32
    card = (folder / "README.md").read_text()
    assert "fine-tuned by `hf_linattn` as a control" in card and "converted" not in card and "| `convert.distill` |" in card


@pytest.mark.parametrize("module", [transfer_command, distill_command])
def test_the_command_line_takes_every_option(module, given, tmp_path, capsys):
    name = module.COMMAND.removeprefix("convert.")
    values = given(tokens=128, data=["text.txt", "more.txt"])
    flags = [f"--{key.replace('_', '-')}={item}" for key, value in values.items() if key not in ("student", "output")
             for item in (value if isinstance(value, list) else [value])]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        cli.app(module.main)([values["student"], values["output"], *flags])
    assert end.value.code == 2 and "text.txt: no such file" in capsys.readouterr().err
    options = {option for parameter in get_command(cli.app(module.main)).params for option in parameter.opts}
    named = {f"--{one.name.replace('_', '-')}" for one in fields(STAGES[name][0]) if one.name not in ("student", "output")}
    assert named | {"--resume", "--overwrite", "--debug"} <= options


def test_a_disk_that_fills_keeps_the_checkpoint(given, monkeypatch):
    values = given(tokens=2 * 128)
    with monkeypatch.context() as patch, pytest.raises(RecipeError, match="model failed .*No space left on device.*free some space"):
        patch.setattr(LlamaForCausalLM, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        run("distill", values)
    assert not (Path(values["output"]) / "model").exists()
    assert [record["step"] for record in run("distill", values, resume=True)][-1] == 2


def test_stories260k_comes_nearer_to_its_teacher_by_both_stages(tmp_path, given):
    teacher, text = require_shared_data("checkpoints", "stories260K"), require_shared_data("tinystories", "train_v2_head.txt")
    linearize(teacher, tmp_path / "student", LinearizeOptions(check=False))
    shared = {"teacher": str(teacher), "data": [str(text)], "length": 64, "batch_size": 4, "tokens": 20 * 256, "validate_every": 100,
              "save_every": 100, "mixed_precision": ""}  # fmt: skip
    errors = [r["valid_error"] for r in run("transfer", given(student=str(tmp_path / "student"), **shared)) if "valid_error" in r]
    assert errors[1] < 0.9 * errors[0]
    student = str(tmp_path / "run" / "model")
    kl = [r["valid_kl"] for r in run("distill", given(student=student, output=str(tmp_path / "next"), **shared)) if "valid_kl" in r]
    assert kl[1] < 0.8 * kl[0]


# -- compiled layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["option", "accelerate"])
def test_compiled_layers_learn_and_save_what_plain_ones_do(given, tmp_path, monkeypatch, by):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **told: compiled.append((type(module).__name__, told)))
    plain = run("distill", given(output=str(tmp_path / "plain")))
    assert not compiled
    if by == "accelerate":
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
        monkeypatch.setattr(torch, "compile", None)  # accelerate's own way of compiling, which renames weights
    told = {"backend": "eager"} if by == "accelerate" else {}
    values = given(output=str(tmp_path / "compiled"), compile=by == "option")
    assert run("distill", values) == plain
    layers = 2 * LlamaConfig.from_pretrained(values["teacher"]).num_hidden_layers
    assert [given for _, given in compiled] == [told] * layers
    assert {name for name, _ in compiled} == {"LlamaDecoderLayer"}
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "compiled"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_no_layer_is_left_uncompiled(given, tmp_path, monkeypatch):
    """Student and teacher, in training and validation, the last of whose batches is smaller, and longer rows in the end."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        run("distill", given(long_length=64, long_share=0.5))
    assert not counters["unimplemented"] and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_compiled_by_inductor(given, tmp_path, monkeypatch, name):
    plain = run(name, given(output=str(tmp_path / "plain")))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    compiled = run(name, given(output=str(tmp_path / "compiled")))
    assert [record["loss"] for record in compiled if "loss" in record] == pytest.approx([r["loss"] for r in plain if "loss" in r], rel=1e-4)
    weights(tmp_path / "compiled" / "model")
