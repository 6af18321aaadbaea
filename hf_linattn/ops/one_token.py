"""A few new tokens a sequence, in PyTorch, on any device: the state takes them in; of a single one it is read once."""

import torch
from torch import Tensor

from . import chunked
from .call import Call
from .features import key_features, query_features
from .unit import unit


def step(call: Call, state: Tensor) -> Tensor:
    """out (B, Hq, N, Dv); `state` (B, Hs, F, Dv + 1) is changed in place."""
    if call.query.shape[2] > 1:
        out, _, after = chunked.forward(call._replace(initial_state=state), True)
        assert after is not None
        state.copy_(after)
        return out
    query, key, value, coefficients, log_decay, _, segments, *_ = call
    dtype, heads, groups = state.dtype, state.shape[1], query.shape[1] // state.shape[1]
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    padding = None if segments is None else (segments <= 0)[:, :, None, None]
    if call.normalize_qk:
        q, k = unit(q), unit(k)
    a, b, c, temperature = coefficients.to(dtype).view(4, heads, groups, 1).unbind()
    features = key_features(k, call.degree)
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if padding is not None:  # both, for 0 times what is no number would be none
        features, values = features.masked_fill(padding, 0), values.masked_fill(padding, 0)
    new = features.mT @ values  # an outer product a key head
    if heads != key.shape[1]:
        new = new.repeat_interleave(heads // key.shape[1], 1)
    if log_decay is not None:
        rate = log_decay[:, None] if log_decay.dim() == 1 else log_decay
        if padding is not None:  # takes no time
            rate = rate.masked_fill(padding[..., 0], 0)
        state.mul_(rate.to(dtype).exp()[..., None])
    state.add_(new)
    q = q.view(q.shape[0], heads, groups, q.shape[-1]) * temperature
    num = query_features(q, a, b, c, call.degree) @ state
    mass = num[..., -1:]
    out = num[..., :-1] / mass.masked_fill(mass == 0, 1)
    if padding is not None:
        out = out.masked_fill(padding, 0)
    return out.reshape(*query.shape[:3], value.shape[-1]).to(query.dtype)
