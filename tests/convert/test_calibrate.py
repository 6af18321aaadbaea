"""Calibration: what is seen of a teacher's attention is what it does, and what starts from it is nearer to the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from byte_models import START, byte_model, byte_tokenizer
from no_caches import no_caches
from sweep.tiny import tiny_config
from transformers import AutoModelForCausalLM

from convert.errors import ConversionError
from convert.linearize import LinearizeOptions, linearize
from convert.stages.calibrate import Calibrate
from convert.stages.options import CalibrateOptions
from convert.stages.watching import _by_distance, watched_attention
from hf_linattn.forms import projection
from hf_linattn.forms.seen import SINKS, Seen
from recipes.quickstart.corpus import stories

FORM = {"kernel": "quadratic", "decay": "key_head", "features": 4}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny softmax Llama whose keys lie about a mean, with a tokenizer of bytes and a text, and the model converted."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "text.txt").write_text(f"\n{START}\n".join(stories(60, seed=1)), encoding="utf-8")
    byte_tokenizer().save_pretrained(folder / "teacher")
    teacher = byte_model(max_position_embeddings=64, num_hidden_layers=2, attention_bias=True)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            parameter.fill_(0.8) if name.endswith("k_proj.bias") else None
    teacher.save_pretrained(folder / "teacher")
    linearize(folder / "teacher", folder / "student", LinearizeOptions(**FORM))
    return SimpleNamespace(folder=folder, text=folder / "text.txt", teacher=folder / "teacher", student=folder / "student")


def options(tiny: SimpleNamespace, output: Path, **changes: object) -> CalibrateOptions:
    values = {"length": 32, "batch_size": 4, "tokens": 3 * 4 * 32, "valid_rows": 6, "log_every": 1, "save_every": 1}
    return CalibrateOptions(
        student=str(tiny.student), output=str(output), teacher=str(tiny.teacher), data=[str(tiny.text)], **(values | changes)
    )


def test_weights_are_summed_by_distance() -> None:
    mass = torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(0)).tril()
    expected = torch.stack([mass.diagonal(-n, 1, 2).sum(-1) for n in range(7)], 1)
    torch.testing.assert_close(_by_distance(mass), expected)


def test_what_is_seen_is_what_the_teacher_attends_to(tiny: SimpleNamespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.teacher, attn_implementation="sdpa").eval()
    ids = torch.randint(1, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), watched_attention(model) as found:
        model(ids[:1]), model(ids[1:])
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    for layer, sums in found.items():
        seen, mass = sums.seen(), weights[layer].double()
        torch.testing.assert_close(seen.sink_mass, mass[..., :SINKS].sum((0, 2, 3)) / 40, atol=1e-6, rtol=1e-5)
        assert (seen.sink_mass + seen.distance_mass.sum(1)).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
        steps = torch.arange(20)[:, None] - torch.arange(20)
        far = mass * ((steps >= 3) & (torch.arange(20) >= SINKS))
        expected = (far * (steps - 3).clamp(min=0)).sum((0, 2, 3)) / far.sum((0, 2, 3))
        torch.testing.assert_close(seen.reach(3), expected.clamp(min=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gpt_oss"])
def test_windows_softcaps_and_sinks_of_the_teacher_have_their_say(model_type: str) -> None:
    """What it sees through SDPA, which knows of no softcap and of no sinks, were another model's hidden states."""
    config = tiny_config(model_type)
    config.layer_types = ["sliding_attention", "full_attention"] * (config.num_hidden_layers // 2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.dim() > 1 else parameter.add_(0.5)
        ids = torch.randint(5, 80, (2, 20), generator=torch.Generator().manual_seed(0))
        expected = model(ids, output_attentions=True)
        with watched_attention(model) as found:
            logits = model(ids).logits
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
    for layer, sums in found.items():
        seen, mass = sums.seen(), expected.attentions[layer].double()
        mass = mass / mass.sum(-1, keepdim=True)  # what sinks take, no token gets
        mass[..., :SINKS] = 0
        distances = torch.stack([mass.diagonal(-n, 2, 3).sum((0, 2)) for n in range(20)], 1) / 40
        torch.testing.assert_close(seen.distance_mass, distances, atol=1e-5, rtol=1e-4)


def test_documents_that_do_not_see_one_another_are_looked_at_alone() -> None:
    model = byte_model()
    ids = torch.randint(1, 200, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), watched_attention(model) as found:
        model(ids, position_ids=torch.arange(20)[None] % 10, use_cache=False)
    assert all(sums.seen().distance_mass[:, 10:].abs().max() == 0 for sums in found.values())


def test_the_projection_is_the_best_of_its_rank() -> None:
    """No other pair of matrices of rank r that was tried keeps q.k better; with all features nothing is lost."""
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(500, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, generator=generator).double() for _ in "qk"
    )
    key = key + 2
    center = key.mean(0)
    seen = Seen(
        (query.mT @ query / 500)[None], center[None], ((key - center).mT @ (key - center) / 500)[None], torch.ones(1, 9), torch.zeros(1)
    )

    def lost(a: torch.Tensor, b: torch.Tensor) -> float:
        kept = torch.eye(6, dtype=torch.float64) - a @ b.mT
        return torch.einsum("ij,jk,kl,il->", seen.query_moment[0], kept, seen.key_moment[0], kept).item()

    found = projection.fitted(seen, 1, 3)
    best = lost(found[projection.QUERY][0], found[projection.KEY][0])
    torch.testing.assert_close(found[projection.CENTER], seen.key_mean)
    for _ in range(20):
        a, b = (found[name][0] + 0.1 * torch.randn(6, 3, generator=generator) for name in (projection.QUERY, projection.KEY))
        assert lost(a, b) > best
    whole = projection.fitted(seen, 1, 6)
    assert lost(whole[projection.QUERY][0], whole[projection.KEY][0]) == pytest.approx(0, abs=1e-9)


def test_a_calibrated_student_is_nearer_to_its_teacher(tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with no_caches():
        Calibrate(options(tiny, tmp_path / "run"), "convert.calibrate", False, False).run_all()
    said = capsys.readouterr().out
    assert "tokens to look at" in said and "numbers learn" not in said
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (record["valid_error"] for record in records if "valid_error" in record)
    assert after < 0.9 * before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    teacher = AutoModelForCausalLM.from_pretrained(tiny.teacher)
    for name, weight in teacher.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight)
    layer = model.model.layers[0].self_attn.linattn
    assert layer.key_center.abs().mean() > 0.3 and layer.number("log_rate").exp().max() <= 1 / 1.5 + 1e-6
    stages = json.loads((tmp_path / "run" / "model" / "conversion.json").read_text())["stages"]
    assert [one["stage"] for one in stages] == ["convert.calibrate"]


def test_a_killed_run_goes_on_and_a_finished_one_stays(tiny: SimpleNamespace, tmp_path: Path) -> None:
    Calibrate(options(tiny, tmp_path / "run"), "convert.calibrate", False, False).run_all()
    written = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    for path in sorted((tmp_path / "run" / "model").iterdir()):
        path.unlink()
    (tmp_path / "run" / "model").rmdir()
    AcceleratorState._reset_state(reset_partial_state=True)
    Calibrate(options(tiny, tmp_path / "run"), "convert.calibrate", True, False).run_all()
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == written


def test_a_student_without_new_numbers_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    linearize(tiny.teacher, tmp_path / "fixed", LinearizeOptions(decay="none", learnable=False))
    given = options(tiny, tmp_path / "run")
    given.student = str(tmp_path / "fixed")
    with pytest.raises(ConversionError, match="no new parameters"):
        Calibrate(given, "convert.calibrate", False, False).run_all()


def test_an_attention_that_serves_several_layers_is_refused(tmp_path: Path, tiny: SimpleNamespace) -> None:
    config = tiny_config("zamba2")
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = 257, 0, 0, 0
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    linearize(tmp_path / "source", tmp_path / "student", LinearizeOptions(check=False))
    given = options(tiny, tmp_path / "run")
    given.student, given.teacher = str(tmp_path / "student"), str(tmp_path / "source")
    with pytest.raises(ConversionError, match="one attention serves several layers, and convert.calibrate takes each by itself"):
        Calibrate(given, "convert.calibrate", False, False)
