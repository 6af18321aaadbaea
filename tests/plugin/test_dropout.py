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
    assert [cosine(step) for step in (0, 5, 10, 99)] == pytest.approx([0.2, 0.1, 0, 0])
    assert cosine(1) > DropoutSchedule("linear", 0.2, 10)(1)


@pytest.mark.parametrize("arguments, words", [
    (("step", 0.1, 3), "constant, linear, cosine"),
    (("linear", 1.0, 3), "below 1"),
    (("linear", float("nan"), 3), "below 1"),
    (("linear", 0.1), "number of steps"),
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


def test_set_dropout_refuses():
    with pytest.raises(ValueError, match="below 1"):
        set_dropout(tiny_llama(), 1.5)
    with pytest.raises(ValueError, match="no attention module"):
        set_dropout(torch.nn.Linear(2, 2), 0.1)


def test_callback_lowers_p_to_0_under_a_trainer(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(hf_linattn.dropout, "set_dropout", lambda model, p: (seen.append(p), set_dropout(model, p)))
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    arguments = TrainingArguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
                                  disable_tqdm=True)  # fmt: skip
    Trainer(tiny_llama(), arguments, train_dataset=data, callbacks=[DropoutCallback("linear", 0.4)]).train()
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1])
