"""Schedules of the noise, the setter, and the callback under a real Trainer."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_linattn
from hf_linattn import DropoutCallback, DropoutSchedule, set_dropout


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation="linattn")


def test_schedules():
    assert [DropoutSchedule("constant", 0.2)(step) for step in (0, 10**6)] == [0.2, 0.2]
    assert [DropoutSchedule("linear", 0.2, 10)(step) for step in (0, 5, 10, 11)] == pytest.approx([0.2, 0.1, 0, 0])
    cosine = DropoutSchedule("cosine", 0.2, 10)
    wave = [0.2, 0.1951057, 0.1809017, 0.1587785, 0.1309017, 0.1, 0.0690983, 0.0412215, 0.0190983, 0.0048943, 0, 0]
    assert [cosine(step) for step in (*range(11), 99)] == pytest.approx(wave, abs=1e-7)


def test_the_bounds_of_schedules_are_allowed():
    assert DropoutSchedule("linear", 0.0, 1)(0) == 0 and DropoutSchedule("cosine", 0.99999, 1)(0) == 0.99999
    assert DropoutSchedule("linear", 0.4, 4)(-1) == 0.4
    model = tiny_llama()
    for p in (0.0, 0.99999):
        set_dropout(model, p)
        assert model.model.layers[1].self_attn.linattn_dropout_p == pytest.approx(p)


@pytest.mark.parametrize("arguments, words", [
    (("step", 0.1, 3), "constant, linear, cosine"),
    (("linear", 1.0, 3), "below 1"),
    (("linear", float("nan"), 3), "below 1"),
    (("linear", 0.1), "number of steps"),
    (("cosine", 0.1, 0), "number of steps"),
    (("cosine", 0.1, -1), "number of steps"),
])  # fmt: skip
def test_bad_schedules(arguments, words):
    with pytest.raises(ValueError, match=words):
        DropoutSchedule(*arguments)


def test_set_dropout_rules_training_only_and_keeps_its_tensor():
    model, ids = tiny_llama(), torch.arange(20)[None]
    plain = model.eval()(ids).logits
    set_dropout(model, 0.5)
    tensor = model.model.layers[0].self_attn.linattn_dropout_p
    assert torch.equal(model(ids).logits, plain)
    assert not torch.allclose(model.train()(ids).logits, plain)
    set_dropout(model, 0.0)
    assert model.model.layers[0].self_attn.linattn_dropout_p is tensor
    torch.testing.assert_close(model(ids).logits, plain)
    assert not any("dropout_p" in name for name in model.state_dict())


@pytest.mark.parametrize("p", [1.0, 1.5, -0.00001, float("nan")])
def test_set_dropout_refuses(p):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        set_dropout(tiny_llama(), p)
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        DropoutSchedule("constant", p)
    with pytest.raises(ValueError, match="no attention module"):
        set_dropout(torch.nn.Linear(2, 2), 0.1)


def train(folder, callback, steps, resume=False):
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    arguments = TrainingArguments(str(folder), max_steps=steps, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=2,
                                  disable_tqdm=True)  # fmt: skip
    model = tiny_llama()
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train(resume_from_checkpoint=resume)
    return model


@pytest.fixture
def seen(monkeypatch):
    """The probability at each step, as the last layer's attention is given it."""
    values, noise = [], hf_linattn.attention.noise

    def watched(module, options, dropout):
        given = noise(module, options, dropout)
        if module.layer_idx == 1:
            values.append(float(given.get("dropout_p", 0.0)))
        return given

    monkeypatch.setattr(hf_linattn.attention, "noise", watched)
    return values


def test_callback_lowers_p_to_0_under_a_trainer(tmp_path, seen):
    model = train(tmp_path, DropoutCallback("linear", 0.4), 4)
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert model.model.layers[1].self_attn.linattn_dropout_p == pytest.approx(0.1)


def test_each_training_with_one_callback_has_its_own_schedule(tmp_path, seen):
    callback = DropoutCallback("linear", 0.4)
    train(tmp_path / "short", callback, 2)
    train(tmp_path / "longer", callback, 4)
    train(tmp_path / "shorter", callback, 1)
    assert seen == pytest.approx([0.4, 0.2, 0.4, 0.3, 0.2, 0.1, 0.4])


def test_a_training_taken_up_again_goes_on_where_it_was(tmp_path, seen):
    callback = DropoutCallback("cosine", 0.4)
    train(tmp_path, callback, 2)
    train(tmp_path, callback, 4, resume=True)
    cosine = DropoutSchedule("cosine", 0.4, 4)
    assert seen == pytest.approx([0.4, 0.2, cosine(2), cosine(3)])


def test_a_schedule_of_ones_own_is_kept(tmp_path, seen):
    callback = DropoutCallback(DropoutSchedule("linear", 0.4, 4))
    train(tmp_path / "once", callback, 2)
    train(tmp_path / "again", callback, 3)
    assert seen == pytest.approx([0.4, 0.3, 0.4, 0.3, 0.2])
