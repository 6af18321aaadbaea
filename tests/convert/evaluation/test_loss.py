"""Loss, bits a byte, KL and agreement against the same computed the long way."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from byte_models import byte_model
from no_caches import no_caches

from convert.evaluation.loss import measure_loss, standard_error
from convert.evaluation.text import Rows


class Uniform(torch.nn.Module):
    """Finds every token equally likely."""

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 8))


def test_by_hand() -> None:
    rows = Rows("text", torch.randint(8, (3, 6)), [10, 5, 5])
    found = measure_loss(Uniform(), None, rows, 2)
    assert found["nats"] == pytest.approx(math.log(8)) and found["nats_error"] == pytest.approx(0, abs=1e-6)
    assert found["tokens"] == 15 and found["bits_per_byte"] == pytest.approx(15 * 3 / 20)  # three bits a token
    assert "kl" not in found


def test_against_the_models_own_loss_and_a_direct_kl() -> None:
    student, teacher = byte_model(1), byte_model(2)
    ids = torch.randint(257, (5, 80), generator=torch.Generator().manual_seed(0))
    with no_caches():
        found = measure_loss(student, teacher, Rows("text", ids, [100] * 5), 2)
    with torch.no_grad():
        own = student(ids, labels=ids).loss.item()
        p, q = (model(ids).logits[:, :-1].double().softmax(-1) for model in (teacher, student))
    assert found["nats"] == pytest.approx(own, rel=1e-5)
    kl = (p * (p / q).log()).sum(-1)
    assert found["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found["kl_error"] == pytest.approx(kl.mean(1).std().item() / 5**0.5, rel=1e-3)
    assert found["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    spans = found["by_position"]
    assert [(span["from"], span["to"]) for span in spans] == [(0, 64), (64, 80)]
    assert spans[0]["kl"] == pytest.approx(kl[:, :63].mean().item(), rel=1e-4)  # 1 to 63 tokens before the one predicted
    assert spans[1]["kl"] == pytest.approx(kl[:, 63:].mean().item(), rel=1e-4)
    nats = -q.gather(2, ids[:, 1:, None]).log()[..., 0]
    assert found["row_nats"] == pytest.approx(nats.mean(1).tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("length", "spans"),
    [(2, [(0, 2)]), (64, [(0, 64)]), (65, [(0, 64), (64, 65)]), (1024, [(0, 64), (64, 256), (256, 512), (512, 1024)])],
)
def test_spans(length: int, spans: list[tuple[int, int]]) -> None:
    found = measure_loss(Uniform(), None, Rows("text", torch.zeros(1, length, dtype=torch.long), [1]), 1)
    assert [(span["from"], span["to"]) for span in found["by_position"]] == spans
    assert all(math.isfinite(span["nats"]) for span in found["by_position"])


def test_standard_error() -> None:
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx((5 / 3) ** 0.5 / 2) and standard_error([7.0]) == 0
