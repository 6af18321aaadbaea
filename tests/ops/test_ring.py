"""What a window keeps from call to call: a sequence cut anywhere gives what the whole gives, in pieces and one token at a time."""

import pytest
import torch
from operator_cases import make_segments
from window_cases import make_tensors

from hf_linattn.ops import window, window_attention, window_operator
from hf_linattn.ops.frame import Frame

SIZES = [(1, 0), (1, 2), (5, 0), (6, 3), (4, 9), (100, 4)]


def in_pieces(tensors, cuts, size, sinks, ids=None, rates=None):
    """The outputs of a sequence cut at `cuts`, and the ring behind it; pieces of one token go by `push` and `step`."""
    outs, ring = [], None
    for start, stop in zip([0, *cuts], [*cuts, tensors[0].shape[2]], strict=True):
        query, key, value = (x[:, :, start:stop] for x in tensors)
        real = None if ids is None else ids[:, start:stop]
        rate = None if rates is None else rates[:, :, start:stop]
        if ring is not None and stop == start + 1:
            real = None if real is None else real > 0
            ring.push(key, value, rate, real)
            outs.append(window.step(query, ring, None, real))
            continue
        frame = Frame.of(key, value, window=size, sinks=sinks, segment_ids=real, ring=ring, per_token=rate)
        outs.append(frame.open(window.attend(frame.close(query), frame, None)))
        ring = frame.ring_behind()
    return torch.cat(outs, 2), ring


@pytest.mark.parametrize("size, sinks", SIZES)
@pytest.mark.parametrize("segments", [None, "left", "right", "middle", "mask"])
@pytest.mark.parametrize("cuts", [[1], [20, 21, 40], [3, 30, 31, 45], list(range(1, 53)), list(range(12, 53))], ids=str)
def test_cut_anywhere(cuts, size, sinks, segments):
    tensors = make_tensors(53, grad=False)
    ids = None if segments is None else make_segments(segments, 2, 53)
    whole = window_attention(*tensors, window=size, sinks=sinks, segment_ids=ids)
    out, ring = in_pieces(tensors, cuts, size, sinks, ids)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-12)
    assert ring.seen.tolist() == ([53, 53] if ids is None else (ids > 0).sum(-1).tolist())
    assert ring.key.shape == (2, 2, sinks + size, 8) and ring.value.shape == (2, 2, sinks + size, 6)


@pytest.mark.parametrize("size, sinks", SIZES)
@pytest.mark.parametrize("cuts", [[10], [30], [25, 41], [25, 26, 27], [49, 50, 51, 52]], ids=str)
def test_cut_packed_sequences(cuts, size, sinks):
    """A piece begins with the sequence that the one before ended with."""
    tensors, generator = make_tensors(53, grad=False), torch.Generator().manual_seed(3)
    ids = torch.cat([torch.ones(2, 1), (torch.rand(2, 52, generator=generator) < 0.1).cumsum(-1) + 1], -1).long()
    ids[:, [5, 6, 17]] = 0
    for at in cuts:
        first = ids[:, at : at + 1]
        ids[:, at:] = torch.where(ids[:, at:] > 0, ids[:, at:] - first + ids[:, at - 1 : at], 0)
    whole = window_attention(*tensors, window=size, sinks=sinks, segment_ids=ids)
    pieces, ring = [ids.clone()], None
    out, ring = in_pieces(tensors, cuts, size, sinks, pieces[0])
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-12)
    assert ring.seen.tolist() == [(row == row[-1]).sum().item() for row in ids]


def test_what_leaves_the_window():
    """Token t leaves when token t + W comes, with its rate; padding pushes nothing out."""
    query, key, value = make_tensors(12, grad=False)
    rates = -torch.rand(2, 2, 12, dtype=torch.float64)
    frame = Frame.of(key[:, :, :2], value[:, :, :2], window=4, sinks=1, per_token=rates[:, :, :2])
    ring, left = frame.ring_behind(), [[], []]
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, [3, 7, 8]] = False
    for t in range(2, 12):
        leaving = ring.push(key[:, :, t : t + 1], value[:, :, t : t + 1], rates[:, :, t : t + 1], real[:, t : t + 1])
        for row in range(2):
            if leaving.real[row]:
                left[row].append((leaving.key[row], leaving.value[row], leaving.per_token[row]))
    for row in range(2):
        expected = real[row].nonzero()[:, 0][:-4]
        assert len(left[row]) == len(expected)
        for (k, v, rate), t in zip(left[row], expected.tolist(), strict=True):
            assert (
                torch.equal(k[:, 0], key[row, :, t])
                and torch.equal(v[:, 0], value[row, :, t])
                and torch.equal(rate[:, 0], rates[row, :, t])
            )


def test_push_is_in_place():
    """A compiled step finds its tensors where they were."""
    tensors = make_tensors(20, grad=False)
    _, ring = in_pieces(tensors, [10], 4, 2)
    before = ring.key.data_ptr(), ring.value.data_ptr(), ring.seen.data_ptr()
    ring.push(*(x[:, :, :1] for x in tensors[1:]))
    assert (ring.key.data_ptr(), ring.value.data_ptr(), ring.seen.data_ptr()) == before


def test_padding_before_any_token_gives_zeros():
    tensors = make_tensors(3, grad=False)
    ids = torch.tensor([[0, 0, 1], [1, 1, 1]])
    out, _ = in_pieces(tensors, [1, 2], 4, 2, ids)
    torch.testing.assert_close(out, window_attention(*tensors, window=4, sinks=2, segment_ids=ids), rtol=0, atol=1e-12)
    assert torch.equal(out[0, :, :2], torch.zeros(4, 2, 6, dtype=torch.float64))


@pytest.mark.parametrize("segments", [None, "left"])
@pytest.mark.parametrize("size, sinks", [(5, 0), (6, 3), (100, 4)])
def test_the_operator_of_a_graph_goes_on_from_a_ring(size, sinks, segments):
    """Output and gradients of a later piece, by the one operator that torch.compile sees."""
    tensors = make_tensors(30)
    ids = None if segments is None else make_segments(segments, 2, 30)
    whole = window_attention(*tensors, window=size, sinks=sinks, segment_ids=ids)[:, :, 17:]
    query, key, value = (x[:, :, 17:].detach().requires_grad_() for x in tensors)
    ring = Frame.of(
        *(x[:, :, :17].detach() for x in tensors[1:]), window=size, sinks=sinks, segment_ids=None if ids is None else ids[:, :17]
    )
    frame = Frame.of(key, value, window=size, sinks=sinks, segment_ids=None if ids is None else ids[:, 17:], ring=ring.ring_behind())
    out = frame.open(window_operator.traced(frame.close(query), frame, None))
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    wanted = [grad[:, :, 17:] for grad in torch.autograd.grad((whole * weight).sum(), tensors)]
    for grad, right in zip(torch.autograd.grad((out * weight).sum(), (query, key, value)), wanted, strict=True):
        torch.testing.assert_close(grad, right, rtol=0, atol=1e-12)
