"""Noise dropout: the stream, its moments, its gradient, and the variance of true dropout that "moment" claims to have."""

import pytest
import torch
from operator_cases import make_inputs

from hf_linattn import linear_attention
from hf_linattn.ops import chunked
from hf_linattn.ops.noise import paper_factor, philox, standard_normal


@pytest.mark.parametrize("counter, key, expected", [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
])  # fmt: skip
def test_philox_known_answers(counter, key, expected):
    """The published vectors of Philox4x32-10 (Random123)."""
    words = philox(tuple(torch.tensor(x) for x in counter), tuple(torch.tensor(x) for x in key))
    assert [word.item() for word in words] == expected


def test_normal_moments_and_independence():
    x = standard_normal(torch.tensor(7), 2, 3, 0, 500, 30).double()
    count = x.numel()
    assert abs(x.mean()) < 5 / count**0.5
    assert abs(x.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / count) ** 0.5
    for other in (x.roll(1, -1), x.roll(1, -2), x.roll(1, 1), x.roll(1, 0)):
        assert abs((x * other).mean()) < 6 / count**0.5
    assert not torch.equal(x, standard_normal(torch.tensor(8), 2, 3, 0, 500, 30).double())


def test_a_value_depends_on_its_position_alone():
    whole = standard_normal(torch.tensor(3), 2, 3, 0, 50, 9)
    assert torch.equal(standard_normal(torch.tensor(3), 2, 3, 20, 31, 9), whole[:, :, 20:31])
    assert not torch.equal(standard_normal(torch.tensor(3 + 2**40), 2, 3, 0, 50, 9), whole)
    far = standard_normal(torch.tensor(3), 1, 1, 2**33, 2**33 + 2, 4)
    assert not torch.equal(far, standard_normal(torch.tensor(3), 1, 1, 0, 2, 4))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("decay", [None, "key_head"])
def test_paper_noise_is_the_factor_it_says_and_differentiates(causal, decay, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 16)
    tensors, options = make_inputs(length=40, decay=decay)
    leaves = [*tensors, *(x for x in options.values() if isinstance(x, torch.Tensor))]
    factor = paper_factor(torch.tensor(0.25), standard_normal(torch.tensor(11), 2, 4, 0, 40, 6)).double()
    plain = linear_attention(*tensors, causal=causal, **options)
    noisy = linear_attention(*tensors, causal=causal, **options, dropout_p=0.25, seed=11)
    torch.testing.assert_close(noisy, plain * factor, rtol=0, atol=1e-6)
    weight = torch.randn_like(plain)
    for grad, expected in zip(
        torch.autograd.grad((noisy * weight).sum(), leaves), torch.autograd.grad((plain * factor * weight).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_seed_and_schedule():
    tensors, _ = make_inputs(length=20, learned=False, dtype=torch.float32)
    call = lambda **k: linear_attention(*tensors, **k)  # noqa: E731
    assert torch.equal(call(dropout_p=0.1, seed=5), call(dropout_p=torch.tensor(0.1), seed=torch.tensor(5)))
    assert not torch.equal(call(dropout_p=0.1, seed=5), call(dropout_p=0.1, seed=6))
    torch.manual_seed(0)
    first = call(dropout_p=0.1)
    assert not torch.equal(first, call(dropout_p=0.1))
    torch.manual_seed(0)
    assert torch.equal(first, call(dropout_p=0.1))
    assert torch.equal(call(dropout_p=torch.tensor(0.0)), call())


def many(tensors, count, **options):
    """`count` independent draws of the noise for one sequence, one a batch entry."""
    return linear_attention(*(x.expand(count, -1, -1, -1) for x in tensors), **{"b": 0.5, "causal": False, "seed": 1} | options)[:, 0]


def dropped(tensors, p, count):
    """True dropout, `count` times: each weight dropped with probability p, the rest divided by what their sum is then."""
    query, key, value = (x[0, 0] for x in tensors)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key))
    kept = (torch.rand(count, len(q), len(q)) >= p) * (1 + 0.5 * q @ k.T)
    return (kept @ value) / kept.sum(-1, keepdim=True)


@pytest.fixture
def sequence():
    torch.manual_seed(0)
    tensors, _ = make_inputs(batch=1, heads=1, key_heads=1, length=80, learned=False, dtype=torch.float32, grad=False)
    return tensors


def test_paper_variance(sequence):
    """var(out~) = (1 - p)^2 p out^2, and the mean (1 - p) out."""
    plain = many(sequence, 1)[0]
    samples = many(sequence, 2000, dropout_p=0.3)
    torch.testing.assert_close(samples.mean(0), 0.7 * plain, rtol=0.1, atol=1e-9)
    torch.testing.assert_close(samples.var(0), 0.49 * 0.3 * plain**2, rtol=0.2, atol=1e-9)


@pytest.mark.parametrize("rate", [0.0, -0.02, -0.2])
@pytest.mark.parametrize("causal", [True, False])
def test_moment_variance_is_its_formula_over_the_whole_matrix(sequence, causal, rate):
    """p / (1 - p) sum_n a_in^2 (v_n - out)^2, the weights a written out."""
    query, key, value = (x[0, 0].double() for x in sequence)
    steps = torch.arange(80)
    weights = 1.5 + 0.7 * 0.8 * torch.nn.functional.normalize(query, dim=-1) @ torch.nn.functional.normalize(key, dim=-1).T
    weights = weights * (rate * (steps[:, None] - steps).abs()).exp()
    weights = weights.tril() if causal else weights
    weights = weights / weights.sum(-1, keepdim=True)
    variance = 0.25 * (weights[..., None] ** 2 * (value - (weights @ value)[:, None]) ** 2).sum(1)
    noisy = many(sequence, 1000, a=1.5, b=0.7, temperature=0.8, causal=causal, dropout_p=0.2, dropout_kind="moment",
                 log_decay=torch.tensor([rate]))  # fmt: skip
    varied = variance > 1e-6  # the first token of a causal row has one weight
    assert varied.sum() >= 79 * 6 and noisy.var(0)[~varied].max().item() < 1e-9 if causal else varied.all()
    ratio = (noisy.var(0) / variance)[varied]
    assert abs(ratio.mean() - 1) < 0.01 and ratio.min() > 0.75 and ratio.max() < 1.25


def test_moment_variance_is_that_of_true_dropout(sequence):
    true, noisy = dropped(sequence, 0.1, 2000), many(sequence, 2000, dropout_p=0.1, dropout_kind="moment")
    assert 0.95 < noisy.var(0).mean() / true.var(0).mean() < 1.05
    ratio = noisy.var(0) / true.var(0)
    assert ratio.quantile(0.01) > 0.8 and ratio.quantile(0.99) < 1.25
    torch.testing.assert_close(noisy.mean(0), many(sequence, 1)[0], rtol=0, atol=6 * (true.var(0).max() / 2000).sqrt().item())


def test_paper_variance_is_that_of_true_dropout_for_values_of_mean_zero_only(sequence):
    """What the derivation leaves out: the noise grows with the output, and dropping weights of a constant value changes nothing."""
    query, key, value = sequence

    def ratio(value):
        tensors = query, key, value
        return (many(tensors, 500, dropout_p=0.1).var(0).mean() / dropped(tensors, 0.1, 500).var(0).mean()).item()

    assert 0.5 < ratio(value) < 2
    assert ratio(value + 3) > 100


def test_moment_noise_of_half_precision_has_the_variance_of_float32(sequence):
    """The variance is a difference of large numbers: here 1 % of the square of what it is taken from."""
    query, key, value = (x.bfloat16() for x in sequence)
    moment = {"dropout_p": 0.1, "dropout_kind": "moment"}
    half = [query, key, value + 3]
    single = [x.float() for x in half]
    noise = many(single, 1, **moment) - many(single, 1)
    assert (many(half, 1, **moment) - many(single, 1) - noise).norm() < 0.15 * noise.norm()


@pytest.mark.parametrize("causal, decay, segments", [(True, "query_head", None), (False, "key_token", None), (True, None, "packed")])
def test_moment_noise_differentiates(causal, decay, segments):
    """The chain through the variance: against float64 autograd of the same formula on the reference's weights."""
    tensors, options = make_inputs(batch=1, length=14, decay=decay, segments=segments)
    call = lambda: linear_attention(*tensors, causal=causal, **options, dropout_p=0.2, dropout_kind="moment", seed=4)  # noqa: E731
    weight = torch.randn(1, 4, 14, 6, dtype=torch.float64)
    grads = torch.autograd.grad((call() * weight).sum(), tensors)
    for x, grad in zip(tensors, grads, strict=True):
        direction, step = torch.randn_like(x), 1e-5
        with torch.no_grad():
            x += step * direction
            high = (call() * weight).sum()
            x -= 2 * step * direction
            low = (call() * weight).sum()
            x += step * direction
        torch.testing.assert_close((grad * direction).sum(), (high - low) / (2 * step), rtol=2e-3, atol=1e-4)
