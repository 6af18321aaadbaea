"""What layers lose under a window, against the same computed apart, and the order in which they go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from byte_models import byte_model, byte_tokenizer
from no_caches import no_caches

from convert.errors import ConversionError
from convert.evaluation.prompts import Prompt
from convert.evaluation.selection import Damage, Selection, attention_on_keys, choose, evenly_spaced, read_ranking
from convert.evaluation.windows import windowed

GENERATOR = torch.Generator().manual_seed(0)
TEXT = torch.randint(1, 257, (3, 40), generator=GENERATOR)
PROMPTS = [Prompt(torch.randint(1, 257, (30,), generator=GENERATOR).tolist(), answer, 12) for answer in ("12345", "99", "12345")]


def test_damage_against_the_same_computed_apart() -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    with no_caches():
        selection = Selection(model, tokenizer, TEXT, PROMPTS, 6, 2, batch_tokens=80)
        found, under = selection.damage({0, 2}), windowed(model, 6, 2, {0, 2})
    with torch.no_grad():
        p, q = (one(TEXT).logits.double().softmax(-1) for one in (model, under))
        assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
        nats, hits = [], []
        for prompt in PROMPTS:
            answer = tokenizer(f" {prompt.answer}", add_special_tokens=False)["input_ids"]
            log_p = under(torch.tensor([prompt.ids + answer])).logits[0, 29:-1].log_softmax(-1)
            nats.append(-sum(log_p[i, token].item() for i, token in enumerate(answer)) / len(answer))
            hits.append(log_p.argmax(-1).tolist() == answer)
    assert found.key_nats == pytest.approx(sum(nats) / 3, rel=1e-4) and found.hits == pytest.approx(sum(hits) / 3)
    nothing = selection.damage(())
    assert nothing.kl == pytest.approx(0, abs=1e-6) and nothing.key_nats != found.key_nats


def test_hits_are_whole_keys() -> None:
    model, ids = byte_model(), PROMPTS[0].ids
    with torch.no_grad():
        for _ in range(3):
            ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    greedy = ids[len(PROMPTS[0].ids) :]

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": greedy if text == " right" else [*greedy[:2], (greedy[2] + 1) % 257]}

    prompts = [Prompt(PROMPTS[0].ids, answer, 12) for answer in ("right", "wrong")]
    assert Selection(model, tokenizer, TEXT, prompts, 6, 2, 80).damage(()).hits == 0.5


class Known:
    """Four layers of which 2 carries recall, 0 loss, and 1 and 3 do the same: one of the two must stay."""

    layers = [0, 1, 2, 3]

    def damage(self, under_window: object) -> Damage:
        gone = set(under_window)  # type: ignore[call-overload]
        return Damage(0.3 * (0 in gone) + 0.5 * ({1, 3} <= gone) + 0.01 * (1 in gone), 1.0 + 2.0 * (2 in gone), 1.0 - (2 in gone))


def test_layers_go_by_what_they_cost_together() -> None:
    told: list[str] = []
    found = choose(Known(), 3, 4, 1.0, told.append)  # type: ignore[arg-type]
    assert found["chosen"] == [0, 1, 2] and [step["layer"] for step in found["steps"]] == [3] and len(told) == 5
    assert choose(Known(), 2, 4, 1.0)["chosen"] == [1, 2]  # type: ignore[arg-type]  # alone 0 costs more than 1
    assert choose(Known(), 2, 4, 0.0)["chosen"] == [0, 1]  # type: ignore[arg-type]  # without recall
    assert choose(Known(), 2, 1, 1.0)["chosen"] == [0, 2]  # type: ignore[arg-type]  # only those that cost most alone are candidates
    by_name = {one["name"]: one for one in found["sets"]}
    assert by_name["even"]["softmax"] == [0, 2, 3] and by_name["alone"]["softmax"] == [0, 1, 2] and by_name["chosen"]["hits"] == 1
    assert found["layers"][2] == {"layer": 2, "kl": 0.0, "key_nats": 3.0, "hits": 0.0, "cost": 2.0}


def test_evenly_spaced() -> None:
    assert evenly_spaced(range(30), 4) == [3, 11, 18, 26] and evenly_spaced(range(5), 1) == [2] and evenly_spaced(range(3), 2) == [0, 2]
    assert evenly_spaced([3, 7, 11, 15], 2) == [7, 15]  # others have no attention


def test_attention_on_keys_is_that_of_eager_attention() -> None:
    model = byte_model()
    with no_caches():
        found = attention_on_keys(model, PROMPTS, 5, 60)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(torch.tensor([prompt.ids for prompt in PROMPTS]), output_attentions=True).attentions
    for one, layer in zip(found, weights, strict=True):
        assert one["heads"] == pytest.approx(layer[:, :, -1, 7:12].sum(-1).mean(0).tolist(), rel=1e-4)


def test_a_file_that_holds_no_ranking_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    for content in ("[]", "{}", '{"layers": [{"layer": 1}], "teacher": {}, "chosen": []}', '{"attention": [], "chosen": [1]}'):
        path.write_text(content)
        with pytest.raises(ConversionError, match="does not hold what layers lose alone"):
            read_ranking(path)
