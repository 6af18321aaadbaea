"""Memory is O(N D): what is saved for backward, and what lives at once inside forward and backward."""

import weakref

import pytest
import torch
from operator_cases import make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from hf_linattn import linear_attention
from hf_linattn.ops import chunked
from hf_linattn.ops.call import Call


class PeakBytes(TorchDispatchMode):
    """Follows every storage but those given from its making to its end: the peak of what lives, and the largest single one."""

    def __init__(self, *given):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known = weakref.WeakKeyDictionary({x.untyped_storage(): True for x in given})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.known:
                storage = x.untyped_storage()
                self.known[storage] = True
                size = storage.nbytes()
                self.live += size
                self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
                weakref.finalize(storage, self.release, size)
        return result

    def release(self, size):
        self.live -= size


def peaks(length, head_dim, degree, causal=True, log_decay=None):
    """(peak, largest) bytes of forward and backward, in units of one tensor (B, H, N, D)."""
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(1, 2, length, head_dim) for _ in range(4))
    coefficients = torch.tensor([[1.0], [0.5], [0.5], [1.0]]).expand(4, 2).contiguous()
    call = Call(query, key, value, coefficients, log_decay, degree=degree, causal=causal)
    unit = query.numel() * 4
    with PeakBytes(query, key, value, coefficients) as forward:
        out, mass, _ = chunked.forward(call, False)
    with PeakBytes(query, key, value, coefficients, grad, out, mass) as backward:
        grads = chunked.backward(call, out, mass, grad, None, None)
    assert all(x.isfinite().all() for x in grads if x is not None)
    return [(mode.peak / unit, mode.largest / unit) for mode in (forward, backward)]


@pytest.mark.parametrize("causal", [True, False])
def test_first_degree_holds_little_beside_its_results(causal):
    (forward, largest), (backward, _) = peaks(16384, 64, 1, causal)
    assert forward < 1.2 and largest <= 1  # out and g; a chunk is 1/128 of a tensor
    assert backward < 3.3  # the three gradients


def test_a_decays_gradient_keeps_the_square_root_of_all_states():
    """At N = 32,768 and D = 64 a state is 1/500 of a tensor: all 256 are half of one, and the decay's own sums are float64 (H, N)."""
    plain, decaying = (peaks(32768, 64, 1, log_decay=rate)[1][0] for rate in (None, torch.tensor([-0.1, -0.01])))
    assert decaying < plain + 0.35


def test_second_degree_state_form_holds_its_state_and_a_chunk():
    """At D = 32 a state is 561 x 33: its N x D x D or N x N would be 16 or 256 times what may live."""
    short, long = (peaks(n, 32, 2) for n in (4096, 16384))
    for (peak_short, _), (peak_long, _) in zip(short, long, strict=True):
        assert peak_long < peak_short
    assert long[0][0] < 3 and long[1][0] < 6


def test_second_degree_direct_form_holds_rows_of_pairs():
    """Direct up to D^2 tokens, 128 rows at a time: of order 128 N, not N^2."""
    (forward, _), (backward, _) = peaks(4096, 64, 2)
    assert forward < 14 and backward < 24  # N x N would be 64 units each


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.1}, {"c": 0.5}, {"return_state": True}, {"lag": 7}, {"causal": False}], ids=str)
def test_saved_for_backward(options):
    """q, k, v, out, g and per-head numbers; the noise is not among them."""
    tensors, _ = make_inputs(batch=1, length=400, heads=2, key_heads=2, head_dim=16, value_dim=16, dtype=torch.float32, learned=False)
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        linear_attention(*tensors, **options)
    unit = tensors[0].numel() * 4
    assert sum(saved.values()) <= 4 * unit + unit / 16 + 4096
