"""Every kernel of compute capability 8.0 on the CPU, by the emulator in `tests/emulation`, at the accuracy bar. And the emulator itself:
that what is wrong in a kernel comes out."""

import ctypes
import subprocess
import sys
from pathlib import Path

import accuracy_bar
import pytest
import torch
from accuracy_bar import assert_bars, assert_first_tokens_have_their_values, compare, operator_case, paths_of, run
from emulation import build
from reach_cases import assert_far_tokens_are_met, assert_far_tokens_are_not_met
from step_cases import ALONE, check_step

from hf_linattn.forms import Call, feature_map
from hf_linattn.ops import chunked, cuda, operators
from hf_linattn.ops.known import Launches

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(build.compiler() is None or build.headers() is None, reason="needs g++ or clang++, and CUDA's headers"),
    pytest.mark.timeout(1200),
]


def check(dtype, paths=None, **kind):
    kind = {"length": 130, "batch": 1, "heads": 2, "key_heads": 1, "head_dim": 32, "value_dim": 32, "device": "cpu"} | kind
    if paths:
        assert paths_of(dtype, **kind) == paths
    compare(dtype, **kind)


SLOW_HALF = (torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow))  # the same templates as bfloat16's


def fast(*head_dims):
    """bfloat16 with each head dim, and float16 with the first."""
    of_half = [pytest.param(torch.float16, d, marks=pytest.mark.slow) for d in head_dims[1:]]
    return [*((torch.bfloat16, d) for d in head_dims), (torch.float16, head_dims[0]), *of_half]


@pytest.mark.parametrize("dtype, head_dim", fast(32, 64, 80, 96, 128), ids=str)
@pytest.mark.parametrize("length", [2, 63, 200])
def test_head_dims_and_lengths(kernels, dtype, head_dim, length):
    check(dtype, ("stream", "stream"), head_dim=head_dim, value_dim=head_dim, length=length)


@pytest.mark.parametrize("dtype, head_dim", fast(32, 64, 80, 128), ids=str)
@pytest.mark.parametrize("kind", [
    {"decay": "key_head", "stateful": True, "heads": 4, "key_heads": 4},
    {"decay": "query_token", "segments": "packed", "heads": 4, "key_heads": 2},
    {"segments": "left"}, {"segments": "mask", "causal": False}, {"causal": False, "stateful": True}, {"noisy": True},
    {"noisy": True, "decay": "key_token"},
], ids=str)  # fmt: skip
def test_what_multiplies_the_weights(kernels, dtype, head_dim, kind):
    check(dtype, head_dim=head_dim, value_dim=head_dim, **kind)


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1), (torch.bfloat16, 8), (torch.float16, 3)], ids=str)
def test_features_of_a_map(kernels, dtype, scale):
    """Positive features without unit length, no constant beside their products, twice as many as values have."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 130, 32, generator=generator) for heads in (2, 1, 1))
    eye = {name: torch.eye(32).expand(heads, 32, 32) for name, heads in ((feature_map.QUERY, 2), (feature_map.KEY, 1))}
    call, _ = feature_map.mapped(Call((scale * query).to(dtype), (scale * key).to(dtype), value.to(dtype)), eye)
    f = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None].expand(4, 2).contiguous()
    inputs = [call.query, call.key, call.value, f, torch.tensor([-0.02, -0.1]), *[None] * 5, 1, True, False]
    upstream = torch.randn(1, 2, 130, 32, generator=generator).to(dtype), None, None
    exact = run(chunked, inputs, upstream, False, torch.float64)
    plain, ours = (run(module, inputs, upstream, False) for module in (chunked, cuda))
    names = ("out", "gradient of query", "gradient of key", "gradient of value")
    assert_bars(*({name: results[name] for name in names} for results in (ours, plain, exact)), dtype)


@pytest.mark.parametrize("kind", [{}, {"decay": "key_token", "segments": "packed", "stateful": True}], ids=str)
def test_rows_where_shared_memory_is_small(kernels, monkeypatch, kind):
    monkeypatch.setenv("EMULATED_SHARED_KB", "99")
    check(torch.bfloat16, ("stream", "stream") if kind == {} else None, head_dim=64, value_dim=64, length=200, **kind)


@pytest.mark.parametrize("head_dim", [32, 64, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [
    {}, {"heads": 2, "stateful": True}, {"decay": "key_token", "segments": "packed", "stateful": True},
    {"decay": "query_head", "strengths": (0.02,), "heads": 2},
    {"decay": "key_token", "strengths": (0.02, 1.0), "segments": "left", "heads": 2},
], ids=str)  # fmt: skip
def test_sequences_cut_into_segments(kernels, kind, head_dim):
    """The rows of the gradient sum queries and upstream gradients beside, for the columns of earlier segments."""
    kind = {"heads": 1, "length": 900} | kind
    check(torch.bfloat16, head_dim=head_dim, value_dim=head_dim, **kind)


@pytest.mark.parametrize("kind, segments", [
    ({"head_dim": 64, "decay": "key_token", "segments": "packed", "stateful": True, "heads": 2, "length": 1300}, 4),
    ({"head_dim": 64, "decay": "query_head", "strengths": (0.02,), "heads": 2, "length": 1600, "processors": 3}, 6),
    ({"head_dim": 128, "length": 1100}, 4), ({"head_dim": 128, "decay": "key_head", "stateful": True, "length": 1100}, 4),
    ({"head_dim": 80, "length": 1300}, 4), ({"head_dim": 128, "causal": False, "stateful": True, "length": 1100}, 4),
], ids=str)  # fmt: skip
def test_tiles_cut_into_segments(kernels, monkeypatch, kind, segments):
    """On a card of two multiprocessors, or of more than heads: several segments to each tile of rows, the last of them short or empty."""
    kind = dict(kind)
    monkeypatch.setenv("EMULATED_PROCESSORS", str(kind.pop("processors", 2)))
    kind = {"heads": 1, "key_heads": 1, "batch": 1, "device": "cpu", "value_dim": kind["head_dim"]} | kind
    query, key, value, _, log_decay, runs, *_ = operator_case(torch.bfloat16, **kind)[0]
    plans = cuda.plans(query, key, value, causal=kind.get("causal", True), log_decay=log_decay, segments=runs)
    assert [(plan.engine, plan.segments) for plan in plans] == [("stream", segments)] * 2
    check(torch.bfloat16, **kind)


@pytest.mark.parametrize("kind", [
    {"length": 1000}, {"length": 1024, "stateful": True}, {"decay": "query_head", "strengths": (0.02, 1.0), "length": 700},
    {"decay": "key_token", "segments": "packed", "stateful": True, "length": 900},
    {"decay": "key_token", "strengths": (0.02, 1.0), "segments": "left", "length": 600}, {"noisy": True, "length": 530},
], ids=str)  # fmt: skip
def test_whole_heads_to_a_block(kernels, monkeypatch, kind):
    """As many heads as multiprocessors: several chunks at once, the last round short, and the states that backward takes over."""
    monkeypatch.setenv("EMULATED_PROCESSORS", "2")
    kind = {"heads": 2, "key_heads": 2, "batch": 1, "device": "cpu", "head_dim": 64, "value_dim": 64} | kind
    inputs, upstream = operator_case(torch.bfloat16, **kind)
    call = operators.Call(*inputs)
    plan, _ = cuda.plans(call.query, call.key, call.value, log_decay=call.log_decay, segments=call.key_segments)
    assert plan.shared_bytes > 160 << 10  # more than tiles of rows take
    check(torch.bfloat16, **kind)

    (out, mass, _), kept = cuda.forward_keeping(call, kind.get("stateful", False))
    taken, remade = (cuda.backward(call, out, mass, *upstream, states) for states in (kept, None))
    for some, others in zip(taken, remade, strict=True):  # summed in another order
        assert some is None or accuracy_bar.distance(some, others.double()) < 1e-4


@pytest.mark.parametrize("kind", [
    {}, {"causal": False, "stateful": True}, {"noisy": True}, {"head_dim": 24, "value_dim": 24},
    {"decay": "key_token", "segments": "packed", "stateful": True},
    {"decay": "query_head", "heads": 2, "head_dim": 64, "value_dim": 64, "length": 1600, "processors": 3},
], ids=str)  # fmt: skip
def test_backward_takes_over_the_states_of_segments(kernels, monkeypatch, kind):
    """Those that forward made: the same bits as from states made again, and not read where they are of another cut."""
    kind = dict(kind)
    if processors := kind.pop("processors", None):  # several segments to a tile
        monkeypatch.setenv("EMULATED_PROCESSORS", str(processors))
    kind = {"length": 900, "batch": 1, "heads": 1, "key_heads": 1, "head_dim": 32, "value_dim": 32, "device": "cpu"} | kind
    inputs, upstream = operator_case(torch.bfloat16, **kind)
    call, stateful = operators.Call(*inputs), kind.get("stateful", False)
    (out, mass, _), kept = cuda.forward_keeping(call, stateful)

    def gradients(kept=None):
        return [x for x in cuda.backward(call, out, mass, *upstream, kept) if x is not None]

    def same(some, others):
        return all(torch.equal(x, y) for x, y in zip(some, others, strict=True))

    remade = gradients()
    assert same(gradients(kept), remade)
    kept.states.zero_()
    assert not same(gradients(kept), remade)
    assert same(gradients(kept._replace(segment_length=kept.segment_length + 64)), remade)


@pytest.mark.parametrize("kind", [
    {}, {"decay": "key_token", "segments": "packed", "stateful": True}, {"degree": 2}, {"dtype": torch.float32},
    {"head_dim": 24, "value_dim": 24},
], ids=str)  # fmt: skip
def test_a_known_launch_gives_what_the_first_one_gives(kernels, kind, monkeypatch):
    """Of other tensors in the same layout, bit by bit; what is padded is known in its padded form."""
    kind = {
        "length": 130,
        "batch": 1,
        "heads": 2,
        "key_heads": 1,
        "head_dim": 32,
        "value_dim": 32,
        "device": "cpu",
        "dtype": torch.bfloat16,
    } | kind
    cases = [operator_case(kind["dtype"], **{name: x for name, x in kind.items() if name != "dtype"}, seed=seed) for seed in range(2)]

    def results(inputs, upstream):
        call = operators.Call(*inputs)
        (out, mass, state), kept = cuda.forward_keeping(call, kind.get("stateful", False))
        return [x for x in (out, mass, state, *cuda.backward(call, out, mass, *upstream, kept)) if x is not None]

    anew = []
    for case in cases:
        for name in ("_forwards", "_backwards"):
            monkeypatch.setattr(cuda, name, Launches())
        anew.append(results(*case))
    known = [results(*case) for case in cases]
    assert len(cuda._forwards) == len(cuda._backwards) == 1
    assert all(torch.equal(x, y) for some, others in zip(anew, known, strict=True) for x, y in zip(some, others, strict=True))


def test_autograd_keeps_the_states_of_segments(kernels, monkeypatch):
    inputs, upstream = operator_case(torch.bfloat16, batch=1, heads=1, key_heads=1, value_dim=32, length=900, device="cpu")
    call, taken = operators.Call(*inputs), []
    call = call._replace(query=call.query.requires_grad_())
    monkeypatch.setitem(operators._KEEPING, "cpu", cuda.forward_keeping)
    monkeypatch.setitem(operators._BACKWARD, "cpu", lambda *x: taken.append(x[-1]) or cuda.backward(*x))
    (found,) = torch.autograd.grad(operators.forward(call)[0], call.query, upstream[0])
    out, mass, _ = cuda.forward(call, False)
    assert isinstance(taken[0], cuda.Kept) and torch.equal(found, cuda.backward(call, out, mass, upstream[0], None, None)[0])


def test_states_large_beside_the_tokens_are_not_kept(kernels):
    inputs, _ = operator_case(torch.bfloat16, batch=1, heads=1, key_heads=1, head_dim=128, value_dim=128, length=1000, device="cpu")
    assert cuda.forward_keeping(operators.Call(*inputs), False)[1] is None


def assert_order_of_warps_does_not_matter(dtype, **kind):
    kind = {"length": 130, "batch": 1, "heads": 2, "key_heads": 1, "device": "cpu"} | kind
    inputs, upstream = operator_case(dtype, **kind)
    first, *others = (run(cuda, inputs, upstream, kind.get("stateful", False)) for _ in range(4))
    for other in others:
        assert [name for name, x in first.items() if not torch.equal(x, other[name])] == []


@pytest.mark.parametrize("dtype, head_dim", fast(32, 128), ids=str)
@pytest.mark.parametrize("kind", [
    {"decay": "key_token", "strengths": (0.015,), "stateful": True}, {"decay": "key_token", "strengths": (0.05,), "segments": "packed"},
    {"decay": "query_token", "strengths": (0.05, 0.0, 50.0, 0.05, 1.0), "heads": 4, "key_heads": 2},
    {"decay": "query_token", "strengths": (0.05, 0.05, 1.0, 0.05), "segments": "left", "stateful": True},
    {"decay": "query_head", "strengths": (0.03, 0.0, 0.3, 50.0), "heads": 4, "key_heads": 2, "stateful": True},
    {"decay": "key_head", "strengths": (0.03,), "heads": 4, "key_heads": 1, "segments": "packed", "noisy": True},
], ids=str)  # fmt: skip
def test_decays_of_every_strength(kernels, dtype, head_dim, kind):
    """Chunks whose decay is made of a row's and a key's factor beside chunks whose decay no factor could hold, or none."""
    check(dtype, ("stream", "stream"), head_dim=head_dim, value_dim=head_dim, **{"length": 290} | kind)


@pytest.mark.parametrize("kind", [
    {"decay": "key_token", "segments": "mask"}, {"decay": "key_token", "strengths": (0.05,), "segments": "packed", "length": 290},
    {"segments": "middle", "length": 290},
], ids=str)  # fmt: skip
def test_the_stream_reads_no_padding(kernels, kind):
    kind = {"length": 150, "head_dim": 32, "value_dim": 32, "device": "cpu"} | kind
    assert paths_of(torch.bfloat16, **kind) == ("stream", "stream")
    assert_no_padding_is_read(kind)


@pytest.mark.parametrize("dtype", SLOW_HALF, ids=str)
@pytest.mark.parametrize("kind", [
    {"decay": "key_token", "stateful": True, "key_heads": 2}, {"decay": "key_token", "stateful": True, "segments": "packed", "noisy": True},
    {"decay": "query_head", "segments": "left", "heads": 4, "key_heads": 2}, {"causal": False, "stateful": True, "segments": "mask"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("head_dim", [32, pytest.param(80, marks=pytest.mark.slow)])
def test_the_order_of_warps_does_not_matter(kernels, dtype, kind, head_dim):
    assert_order_of_warps_does_not_matter(dtype, head_dim=head_dim, value_dim=head_dim, **kind)


@pytest.mark.parametrize("dtype, head_dim, heads", [
    (torch.float32, 32, 2),
    *(pytest.param(*kind, marks=pytest.mark.slow) for kind in ((torch.float32, 64, 2), (torch.float32, 128, 2), (torch.bfloat16, 192, 1))),
], ids=str)  # fmt: skip
def test_the_order_of_warps_does_not_matter_to_chunks(kernels, dtype, head_dim, heads):
    assert_order_of_warps_does_not_matter(dtype, head_dim=head_dim, value_dim=head_dim, heads=heads, stateful=True, length=270)


@pytest.mark.parametrize("dtype, head_dim", fast(32, 64, 80, 128), ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_pairs(kernels, dtype, head_dim, causal):
    backward = "pairs" if dtype == torch.bfloat16 else "generic"
    check(dtype, ("pairs", backward), degree=2, causal=causal, head_dim=head_dim, value_dim=head_dim, length=150)


@pytest.mark.parametrize("kind", [
    {"numbers": (0.0, 0.0, 1.0, 1.0), "length": 65}, {"numbers": (0.0, 0.0, 1.0, 1.0), "length": 65, "segments": "packed"},
    {"decay": "key_head", "segments": "left", "stateful": True}, {"noisy": True}, {"head_dim": 24, "value_dim": 40},
], ids=str)  # fmt: skip
def test_gradients_of_the_second_degree_in_float16(kernels, kind):
    """Of few tokens and a weight that nearly vanishes, too."""
    check(torch.float16, degree=2, **kind)


@pytest.mark.parametrize("kind", [
    {"length": 33}, {"length": 300, "heads": 3, "batch": 2}, {"length": 129, "head_dim": 96, "value_dim": 96},
], ids=str)  # fmt: skip
def test_gradients_of_pairs(kernels, kind):
    check(torch.bfloat16, ("pairs", "pairs"), degree=2, **kind)


@pytest.mark.parametrize("kind", [
    {}, {"decay": "query_head", "segments": "left"}, {"decay": "query_token", "head_dim": 32, "value_dim": 64},
    {"length": 4096, "heads": 1, "head_dim": 32, "value_dim": 32},
], ids=str)  # fmt: skip
def test_what_a_decay_leaves_nothing_of_is_not_met(kernels, kind):
    assert_far_tokens_are_not_met(**kind)


@pytest.mark.parametrize("normalize", [True, False])
def test_where_weights_may_vanish_every_key_is_met(kernels, normalize):
    assert_far_tokens_are_met(normalize)


LONG = {"length": 3600, "head_dim": 32, "value_dim": 32, "heads": 1}  # eight chunks, the last one ragged


@pytest.mark.parametrize("kind", [
    {"heads": 2}, {"decay": "key_token", "strengths": (0.01, 0.1), "segments": "mask", "head_dim": 24, "value_dim": 64},
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in (
        {"length": 7200, "head_dim": 64, "value_dim": 64}, {"segments": "packed", "heads": 2},
        {"segments": "left", "head_dim": 16, "value_dim": 128},
        {"decay": "key_head", "strengths": (0.003, 0.01), "heads": 2, "head_dim": 24, "value_dim": 128},
    )),
], ids=str)  # fmt: skip
def test_gradients_of_long_sequences(kernels, monkeypatch, kind):
    """Pairs inside chunks, and states of what lies outside, which add to results that nobody wrote before."""
    kind = LONG | {"batch": 1, "key_heads": 1, "degree": 2, "device": "cpu"} | kind
    inputs, _ = operator_case(torch.bfloat16, **kind)
    plan = cuda.plans(*inputs[:3], degree=2, log_decay=inputs[4], segments=inputs[5])[1]
    assert plan.engine == "pairs" and plan.segments > 3 and plan.chunk * plan.segments > kind["length"]
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: torch.full_like(x, float("nan"), **options))
    compare(torch.bfloat16, **kind)


def test_the_rate_of_a_decay_that_forgets_at_once(kernels):
    """Its gradient counts every token's small difference of sums, rounded each for itself, as often as tokens lie before."""
    kind = LONG | {"length": 2600, "head_dim": 16, "value_dim": 64, "heads": 2, "key_heads": 2, "batch": 1}
    inputs, upstream = operator_case(torch.bfloat16, **kind, degree=2, decay="key_head", device="cpu")
    exact = run(chunked, inputs, upstream, False, torch.float64)["gradient of log_decay"]
    assert accuracy_bar.distance(run(cuda, inputs, upstream, False)["gradient of log_decay"], exact) < 0.01


def test_gradients_of_long_sequences_in_any_order_of_warps(kernels):
    inputs, upstream = operator_case(
        torch.bfloat16, **LONG | {"length": 2700}, batch=1, key_heads=1, degree=2, decay="key_token", strengths=(0.01,), device="cpu"
    )
    call = chunked.Call(*inputs)
    out, mass, _ = chunked.forward(call, False)
    first, second = (cuda.backward(call, out, mass, *upstream) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True) if x is not None)


@pytest.mark.parametrize("kind", [{}, {"decay": "key_head", "segments": "packed"}], ids=str)
def test_the_first_token_has_its_own_value(kernels, kind):
    """However little it weighs: gradients by its mass would count what rounding takes from the weight."""
    assert_first_tokens_have_their_values(head_dim=64, value_dim=64, **kind)


GATED_DIMS = [(32, 32), (64, 64), (16, 64), (24, 128), pytest.param(128, 128, marks=pytest.mark.slow)]


@pytest.mark.parametrize("head_dim, value_dim", GATED_DIMS)
@pytest.mark.parametrize("kind", [
    {"decay": "key_head", "length": 300, "heads": 4, "key_heads": 2},
    {"decay": "query_token", "segments": "packed", "heads": 4, "key_heads": 2},
    {"decay": "key_token", "segments": "left", "batch": 2}, {"segments": "mask", "causal": False, "length": 200}, {"length": 33},
], ids=str)  # fmt: skip
def test_gated_pairs(kernels, kind, head_dim, value_dim):
    kind = {"length": 150, "batch": 1, "heads": 2, "key_heads": 1} | kind | {"head_dim": head_dim, "value_dim": value_dim, "degree": 2}
    inputs = operator_case(torch.bfloat16, device="cpu", **kind)[0]
    causal = kind.get("causal", True)
    assert cuda.paths(*inputs[:3], degree=2, causal=causal, log_decay=inputs[4], segments=inputs[5]) == ("pairs", "pairs")
    compare(torch.bfloat16, device="cpu", **kind)


def test_gated_pairs_read_no_padding(kernels):
    assert_no_padding_is_read(
        {"degree": 2, "decay": "key_token", "segments": "mask", "length": 150, "head_dim": 16, "value_dim": 64, "device": "cpu"}
    )


def assert_no_padding_is_read(kind):
    """NaN there reaches nothing, and what comes out there is 0."""
    inputs, upstream = operator_case(torch.bfloat16, **kind)
    plain = run(cuda, inputs, upstream, False)
    padding = (inputs[5] <= 0)[:, None, :, None]
    assert padding.any()
    poisoned = [x.masked_fill(padding, float("nan")) for x in inputs[:3]]
    upstream = [upstream[0].masked_fill(padding, float("nan")), upstream[1].masked_fill(padding[..., 0], float("nan")), None]
    for name, x in run(cuda, [*poisoned, *inputs[3:]], upstream, False).items():
        assert torch.equal(x, plain[name]), name
    assert (plain["out"].masked_select(padding) == 0).all() and (plain["gradient of key"].masked_select(padding) == 0).all()


@pytest.mark.parametrize("dtype, head_dim", [
    (torch.float32, 32), (torch.float32, 80), (torch.bfloat16, 192),
    *(pytest.param(torch.float32, d, marks=pytest.mark.slow) for d in (64, 96, 128)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("length", [1, 140])
def test_chunks(kernels, dtype, head_dim, length):
    check(dtype, ("chunks", "chunks"), head_dim=head_dim, value_dim=head_dim, length=length)


@pytest.mark.parametrize("segments, kind", [
    (1, {"length": 330, "key_heads": 2}), (1, {"length": 330, "batch": 2, "stateful": True}),
    (1, {"length": 200, "batch": 2, "causal": False}),
    (4, {"length": 900, "heads": 1}), (4, {"length": 900, "stateful": True}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("head_dim", [32, *(pytest.param(d, marks=pytest.mark.slow) for d in (64, 128))])
def test_chunks_one_after_the_other(kernels, monkeypatch, segments, kind, head_dim):
    """On a card of so few processors blocks walk over several chunks of a segment, and take the state with them."""
    monkeypatch.setenv("EMULATED_PROCESSORS", str((1 if segments == 1 else 2) * (1 if head_dim <= 64 else 2)))
    shape = {"batch": 1, "heads": 2, "key_heads": 1, "length": 330, "causal": True} | kind
    query, key = (torch.empty(shape["batch"], shape[heads], shape["length"], head_dim) for heads in ("heads", "key_heads"))
    plan = cuda.plans(query, key, key, causal=shape["causal"])[0]
    assert plan.segments == segments and plan.chunk * segments < shape["length"]
    check(torch.float32, ("chunks", "chunks"), head_dim=head_dim, value_dim=head_dim, **kind)


@pytest.mark.parametrize("gradient, value", [(1e-24, 1.0), (1e-12, 1e-12), (1.0, 1e-20), (1e12, 1e12)], ids=str)
def test_chunks_of_any_size(kernels, gradient, value):
    """As a mean over many tokens makes gradients: nothing falls below what a part of a factor can hold."""
    inputs, upstream = operator_case(torch.float32, value_dim=32, length=140, batch=1, heads=2, key_heads=1, device="cpu")
    inputs[2] = inputs[2] * value
    upstream = [None if x is None else x * gradient * (1 if i == 0 else value) for i, x in enumerate(upstream)]
    exact, plain = run(chunked, inputs, upstream, False, torch.float64), run(chunked, inputs, upstream, False)
    for name, x in run(cuda, inputs, upstream, False).items():
        accuracy_bar.assert_bar(name, x, plain[name], exact[name], 3 if name.startswith("gradient") else 2, torch.float32)


@pytest.mark.parametrize("kind", [
    {"length": 300, "stateful": True}, {"length": 70, "stateful": True}, {"causal": False, "stateful": True},
    {"heads": 4, "key_heads": 2, "batch": 2, "length": 150},
    {"dtype": torch.bfloat16, "length": 260, "head_dim": 256, "value_dim": 256, "heads": 1},
], ids=str)  # fmt: skip
def test_chunks_of_every_kind(kernels, kind):
    check(**{"dtype": torch.float32, "paths": ("chunks", "chunks")} | kind)


@pytest.mark.parametrize("dtype", [torch.float32, *SLOW_HALF], ids=str)
@pytest.mark.parametrize("kind", [
    {"head_dim": 24, "value_dim": 40, "length": 63}, {"head_dim": 136, "value_dim": 7, "length": 70},
    {"head_dim": 24, "value_dim": 24, "degree": 2, "causal": False, "length": 63},
    {"head_dim": 24, "value_dim": 136, "decay": "query_token", "segments": "packed", "heads": 4, "key_heads": 2},
    {"head_dim": 24, "value_dim": 136, "causal": False, "segments": "mask"},
    {"head_dim": 24, "value_dim": 136, "decay": "key_head", "stateful": True, "noisy": True},
    {"head_dim": 10, "value_dim": 12, "degree": 2, "decay": "key_head", "segments": "left", "stateful": True},
], ids=str)  # fmt: skip
def test_generic(kernels, dtype, kind):
    """Dims that no engine is near enough to, and calls too short to be padded."""
    check(dtype, ("generic", "generic"), **kind)


def test_generic_states_end_with_their_run(kernels):
    """Several chunks, and runs that end inside them."""
    check(torch.float32, ("generic", "generic"), head_dim=24, value_dim=8, length=400, segments="packed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ALONE, ids=str)
def test_one_token(kernels, dtype, kind):
    check_step(dtype, **kind)


# ---- cards with less shared memory: of compute capability 8.6 and 8.9 (99 KB), and 8.0 (163 KB)

CARDS = (99, 163, 227)  # KB
DIMS = (24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256)


def engines(dtype, head_dim, **kind):
    """Those of a causal call of 500 tokens, and the head dims they run at: one, or two where backward has another than forward."""
    x = torch.empty(1, 2, 500, head_dim, dtype=dtype)
    forward, backward = cuda.paths(x, x, x, **kind)
    return forward if forward == backward else f"{forward} · {backward}"


def test_the_table_of_what_runs_where(kernels, monkeypatch):
    """That of kernels/README.md, word for word."""
    rows = []
    for words, dtype, degree in (("first degree, bfloat16", torch.bfloat16, 1), ("first degree, float32", torch.float32, 1),
                                 ("second degree, bfloat16", torch.bfloat16, 2)):  # fmt: skip
        for head_dim in DIMS:
            cells = []
            for kilobytes in CARDS:
                monkeypatch.setenv("EMULATED_SHARED_KB", str(kilobytes))
                cells.append(engines(dtype, head_dim, degree=degree))
            rows.append(f"| {words} | {head_dim} | {' | '.join(cells)} |")
    assert "\n".join(rows) in (ROOT / "kernels" / "README.md").read_text()


@pytest.mark.parametrize("kilobytes", CARDS)
def test_what_a_plan_says_fits_the_card(kernels, monkeypatch, kilobytes):
    """The emulated card refuses a launch with more shared memory than it has, and a plan takes no more."""
    monkeypatch.setenv("EMULATED_SHARED_KB", str(kilobytes))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in DIMS:
            for kind in ({}, {"decay": "query_token"}, {"degree": 2}):
                fixed = {"value_dim": head_dim, "length": 70, "batch": 1, "heads": 2, "key_heads": 1, "device": "cpu"}
                inputs = operator_case(dtype, head_dim=head_dim, **fixed, **kind)[0]
                for plan in cuda.plans(*inputs[:3], degree=inputs[10], log_decay=inputs[4]):
                    assert plan.engine != "none" and plan.shared_bytes <= kilobytes * 1024, (dtype, head_dim, kind, plan)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("length", [1, 1000, 100_000])
def test_workspace_is_linear_in_length(kernels, degree, length):
    """A few numbers a token and head dimension; nothing is computed."""
    query, key = torch.empty(2, 4, length, 64, dtype=torch.bfloat16), torch.empty(2, 2, length, 64, dtype=torch.bfloat16)
    state = 2 * 2 * (65 if degree == 1 else 2145) * 65 * 4
    tensors = 1 if degree == 1 else 3  # of float32, as large as the query
    for plan in cuda.plans(query, key, key, degree=degree):
        assert plan.engine != "none" and 0 <= plan.workspace_bytes <= tensors * 4 * query.numel() + 4 * state + 65536


@pytest.mark.parametrize("kilobytes", CARDS[:2])
@pytest.mark.parametrize("dtype, head_dim, kind", [
    (torch.bfloat16, 64, {}), (torch.bfloat16, 64, {"decay": "key_token", "segments": "packed"}), (torch.bfloat16, 80, {}),
    (torch.bfloat16, 128, {}),
    (torch.bfloat16, 128, {"decay": "key_head"}), (torch.float16, 96, {}), (torch.float32, 64, {}),
    (torch.bfloat16, 256, {"length": 70}), (torch.bfloat16, 128, {"degree": 2}),
    *(pytest.param(torch.float32, *kind, marks=pytest.mark.slow) for kind in ((128, {}), (256, {"decay": "key_head", "length": 70}))),
], ids=str)  # fmt: skip
def test_smaller_cards(kernels, monkeypatch, kilobytes, dtype, head_dim, kind):
    monkeypatch.setenv("EMULATED_SHARED_KB", str(kilobytes))
    check(dtype, head_dim=head_dim, value_dim=head_dim, **kind)


# ---- the emulator


KERNEL = """
#include "tile/instructions.cuh"
namespace {{
__global__ void kernel(const float *from, float *to) {{
  extern __shared__ float shared[];
  {body}
}}
}}
extern "C" void run(const float *from, float *to) {{ kernel<<<2, 64, 256, nullptr>>>(from, to); }}
"""
REVERSED = "shared[threadIdx.x] = from[threadIdx.x]; {barrier} to[64 * blockIdx.x + threadIdx.x] = shared[63 - threadIdx.x];"
COPIED = """linattn_tile::copy_async(linattn_tile::shared_address(shared + threadIdx.x / 4 * 4), from + threadIdx.x / 4 * 4, true);
  linattn_tile::copy_commit(); {wait} __syncthreads(); to[64 * blockIdx.x + threadIdx.x] = shared[threadIdx.x];"""
SUMMED = "to[64 * blockIdx.x + threadIdx.x] = from[threadIdx.x] + __shfl_xor_sync(0xffffffffu, from[threadIdx.x], 1);"
STUCK = "if (threadIdx.x < 32) __syncthreads(); linattn_tile::barrier_sync<linattn_tile::kStateRead, 96>();"


def made(folder: Path, body: str) -> Path:
    (folder / "kernel.cpp").write_text(build.translated(KERNEL.format(body=body)))
    (folder / "tile").mkdir(exist_ok=True)
    for name in ("emulator.h", "tile/instructions.cuh"):
        (folder / name).write_bytes((build.HERE / name.rpartition("/")[2]).read_bytes())
    build.compile_library([folder / "kernel.cpp"], folder / "kernel.so", folder)
    return folder / "kernel.so"


def result(folder: Path, body: str) -> torch.Tensor:
    numbers, results = torch.arange(64.0), torch.zeros(2, 64)
    ctypes.CDLL(str(made(folder, body))).run(ctypes.c_void_p(numbers.data_ptr()), ctypes.c_void_p(results.data_ptr()))
    return results


def test_threads_exchange_what_a_barrier_orders(tmp_path):
    assert torch.equal(result(tmp_path, REVERSED.format(barrier="__syncthreads();")), torch.arange(63.0, -1, -1).expand(2, -1))


def test_without_a_barrier_something_is_read_too_early(tmp_path):
    assert result(tmp_path, REVERSED.format(barrier="")).isnan().any()


def test_a_copy_arrives_when_it_is_waited_for(tmp_path):
    assert torch.equal(result(tmp_path, COPIED.format(wait="linattn_tile::copy_wait<0>();")), torch.arange(64.0).expand(2, -1))


def test_a_copy_that_is_not_waited_for_is_not_there(tmp_path):
    assert result(tmp_path, COPIED.format(wait="")).isnan().all()


def test_lanes_exchange(tmp_path):
    assert result(tmp_path, SUMMED)[1, :6].tolist() == [1, 1, 5, 5, 9, 9]


def test_threads_that_wait_for_ever_end_the_process(tmp_path):
    call = f"import ctypes; ctypes.CDLL({str(made(tmp_path, STUCK))!r}).run(None, None)"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "wait for one another for ever" in done.stderr


def test_a_copy_out_of_bounds_ends_the_process(tmp_path):
    body = "linattn_tile::copy_async(1 << 20, from, true);"
    call = f"import ctypes; ctypes.CDLL({str(made(tmp_path, body))!r}).run(None, None)"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "a copy goes outside of shared memory" in done.stderr


def test_no_kernel_says_anything_in_ptx_but_by_instructions():
    for name, text in build.kernel_sources().items():
        assert name == "tile/warpgroup.cuh" or "asm" not in text.replace("assert", ""), name
