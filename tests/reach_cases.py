"""Second-degree attention beside a decay that leaves nothing of tokens a few tiles away, of the kernels' own rows of 64 and 128."""

import torch
from accuracy_bar import operator_case, run

from hf_linattn.ops import cuda
from hf_linattn.ops.call import Call


def out_of_reach(numbers=(1.0, 1.0, 0.5, 1.0), rate=-0.6, **kind):
    kind = {"length": 400, "batch": 1, "heads": 2, "key_heads": 1, "head_dim": 64, "value_dim": 64, "decay": "key_head"} | kind
    inputs, upstream = operator_case(torch.bfloat16, degree=2, numbers=numbers, device="cpu", **kind)
    inputs[4] = torch.full_like(inputs[4], rate)
    return inputs, upstream


def assert_far_tokens_are_not_met(**kind):
    """NaN among the first tokens reaches no query far behind them, and NaN among the last ones no key far before."""
    inputs, upstream = out_of_reach(**kind)
    length = inputs[0].shape[2]
    first, last = torch.arange(length)[:, None] < 64, torch.arange(length)[:, None] >= length - 64
    nan = lambda x, where: x.masked_fill(where, float("nan"))  # noqa: E731
    plain = run(cuda, inputs, upstream, False)
    for where, away in ((first, slice(256, None)), (last, slice(0, length - 320))):
        poisoned = [*(nan(x, where) for x in inputs[:3]), *inputs[3:]]
        found = run(cuda, poisoned, (nan(upstream[0], where), nan(upstream[1], where[:, 0]), None), False)
        for name in ("out", "mass", "gradient of query", "gradient of key", "gradient of value"):
            assert torch.equal(found[name][:, :, away], plain[name][:, :, away]), name


def assert_far_tokens_are_met(normalize):
    """By f(s) = s^2 of queries at right angles to all keys but one, and by f(s) = 1 + s^2 of a score without a bound: neither has a least
    weight beside which that of one key would be nothing."""
    inputs, _ = out_of_reach(numbers=(0.0 if normalize else 1.0, 0.0, 1.0, 1.0), rate=-0.1)
    for x in inputs[:2]:
        x.zero_()
    inputs[0][..., 0] = inputs[1][:, :, 3, 0] = 1 if normalize else 1e6
    inputs[1][:, :, torch.arange(400) != 3, 1] = 1
    inputs[-1] = normalize
    out = cuda.forward(Call(*inputs), False)[0]
    expected = inputs[2][:, :, 3:4].expand(-1, 2, 397, -1)
    torch.testing.assert_close(out[:, :, 3:], expected, atol=1e-2, rtol=1e-2)
