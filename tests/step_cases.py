"""A few new tokens on a state: inputs of every kind, and the compiled kernels held against float64 at the accuracy bar."""

import accuracy_bar
import torch

from hf_linattn.ops import chunked, cuda, one_token
from hf_linattn.ops.call import Call
from hf_linattn.ops.decay import without_padding
from hf_linattn.ops.features import feature_count


def step_case(dtype, *, degree=1, decay=None, padded=False, batch=2, heads=4, key_heads=2, state_heads=None, head_dim=64, value_dim=64,
              normalize_qk=True, seed=0, device="cpu", length=1):  # fmt: skip
    """The call and the state that some tokens left. decay: None, "head" or "token"."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    state_heads = state_heads or key_heads
    query, key = normal(batch, heads, length, head_dim), normal(batch, key_heads, length, head_dim)
    value = normal(batch, key_heads, length, value_dim)
    uniform = torch.rand(4, heads, generator=generator).to(device)
    coefficients = torch.stack([1.2 + uniform[0], 0.2 + 0.5 * uniform[1], (0.5 + uniform[2]) * (degree == 2), 0.5 + 0.5 * uniform[3]])
    if not normalize_qk:
        coefficients[3] *= head_dim**-0.5
    rate = None
    if decay:
        rate = -torch.rand(*((batch, state_heads, length) if decay == "token" else (state_heads,)), generator=generator).to(device)
    segments = None
    if padded:  # every other sequence is all padding, the others end with it
        real = (torch.arange(batch) % 2 == 0)[:, None] & (torch.arange(length) < max(1, length - length // 4))
        segments = torch.where(real, 1, -1).to(device, torch.int32)
    if padded and decay:
        rate = without_padding(rate, segments)  # as the operator is given it: padding takes no time
    past_key, past_value = normal(batch, state_heads, 40, head_dim), normal(batch, state_heads, 40, value_dim)
    state = torch.zeros(batch, state_heads, feature_count(head_dim, degree), value_dim + 1, device=device)
    for t in range(40):
        token = past_key[:, :, t : t + 1], past_key[:, :, t : t + 1], past_value[:, :, t : t + 1]
        one_token.step(Call(*token, coefficients[:, :state_heads].contiguous(), degree=degree), state)
    rows = query.to(dtype), key.to(dtype), value.to(dtype)
    return Call(*rows, coefficients, rate, segments, segments, degree=degree, normalize_qk=normalize_qk), state


def cancelling_case(dtype, degree, dim, *, length=4, device="cpu"):
    """Keys that lie together, and queries that face away: f(s) = (1 + s)^degree is a difference of what the state says."""
    call, state = step_case(dtype, length=length, head_dim=dim, value_dim=dim, degree=degree, device=device)
    generator = torch.Generator().manual_seed(0)
    spread = lambda *shape: (torch.randn(*shape, dim, generator=generator) * dim**-0.5).to(device)  # noqa: E731
    numbers = torch.tensor([1.0, degree, degree - 1.0, 1.0], device=device)[:, None].expand(-1, 4).contiguous()
    middle = spread() / spread().norm()
    past = Call(spread(2, 4, 200), middle + 0.3 * spread(2, 2, 200), 6 * spread(2, 2, 200), numbers, degree=degree)
    state.copy_(chunked.forward(past, True)[2])
    query, key = (0.3 * spread(2, 4, length) - middle).to(dtype), (middle + 0.3 * spread(2, 2, length)).to(dtype)
    return call._replace(query=query, key=key, coefficients=numbers, initial_state=state)


def check_step(dtype, **kind):
    """Output and state: at most twice the error of the PyTorch form in the same dtypes."""
    call, state = step_case(dtype, **kind)
    double, plain = state.double(), state.clone()
    exactly = Call(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in call))
    exact_out, plain_out, out = one_token.step(exactly, double), one_token.step(call, plain), cuda.step(call, state)
    accuracy_bar.assert_bar("out", out, plain_out, exact_out, 2, dtype)
    accuracy_bar.assert_bar("state", state, plain, double, 2, torch.float32)
    if call.key_segments is not None:
        padding = call.key_segments <= 0
        assert not out.masked_select(padding[:, None, :, None]).any()
        assert torch.equal(state[padding.all(1)], plain[padding.all(1)])


KINDS = [
    {}, {"decay": "head"}, {"decay": "token", "padded": True}, {"degree": 2, "decay": "head"}, {"degree": 2, "padded": True, "batch": 1},
    {"heads": 9, "key_heads": 3, "decay": "head", "state_heads": 9},
    {"heads": 9, "key_heads": 3, "decay": "head", "degree": 2, "head_dim": 32, "value_dim": 32},
    {"heads": 12, "key_heads": 1, "head_dim": 24, "value_dim": 40}, {"head_dim": 256, "value_dim": 256, "heads": 2, "key_heads": 1},
    {"head_dim": 7, "value_dim": 3, "degree": 2}, {"head_dim": 80, "value_dim": 80, "normalize_qk": False, "degree": 2, "batch": 1},
]  # fmt: skip
ALONE = [
    *KINDS, {"heads": 12, "key_heads": 1, "degree": 2, "decay": "token"}, {"head_dim": 64, "value_dim": 32, "degree": 2},
    {"head_dim": 40, "value_dim": 64},
    {"batch": 140, "heads": 8, "key_heads": 4, "head_dim": 32, "value_dim": 32, "decay": "head"},
    {"batch": 280, "heads": 6, "key_heads": 2, "head_dim": 20, "value_dim": 36, "padded": True},
]  # fmt: skip
"""Of single tokens also: heads in rounds, dims that differ, and small states that are many."""
SEVERAL = [dict(kind, length=length) for kind, length in zip(KINDS, (2, 3, 4, 5, 9, 7, 10, 16, 3, 12, 5), strict=True)]
"""Of every kind, with numbers of tokens that engines take together and others."""
