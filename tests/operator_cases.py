"""Inputs of every kind for tests of the operator, as one function."""

import torch


def make_inputs(batch=2, heads=4, key_heads=2, length=37, head_dim=8, value_dim=6, *, dtype=torch.float64, device="cpu", seed=0, decay=None,
                segments=None, quadratic=False, learned=True, grad=True):  # fmt: skip
    """(tensors, options): query, key, value; the keyword arguments of linear_attention, tensors among them requiring gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    query, key = normal(batch, heads, length, head_dim), normal(batch, key_heads, length, head_dim)
    value = normal(batch, key_heads, length, value_dim)
    options = {"b": 0.5}  # f stays well above 0: at its bound a lone token's mass can vanish, and with it every digit
    if learned:
        options = {"a": 1.2 + uniform(heads), "b": 0.2 + 0.5 * uniform(heads), "temperature": 0.5 + 0.5 * uniform(heads)}
    if quadratic:
        options["c"] = 0.5 + uniform(heads) if learned else 0.5
    if decay in ("key_head", "query_head"):
        options["log_decay"] = -uniform(key_heads if decay == "key_head" else heads)
    elif decay in ("key_token", "query_token"):
        options["log_decay"] = -uniform(batch, key_heads if decay == "key_token" else heads, length)
    move = lambda x: x.to(device, dtype).requires_grad_(grad)  # noqa: E731
    options = {name: move(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    if segments is not None:
        options["segment_ids"] = make_segments(segments, batch, length).to(device)
    return [move(x) for x in (query, key, value)], options


def make_segments(kind, batch, length):
    """Rows of packed sequences and padding: "left", "right", "middle", "packed", or "mask" (bool)."""
    steps = torch.arange(length).expand(batch, -1)
    shift = torch.arange(batch)[:, None]
    if kind == "left":
        return (steps >= length // 3 + shift).long()
    if kind == "right":
        return (steps < length - length // 4 - shift).long()
    if kind == "middle":
        return ((steps < length // 4) | (steps >= length // 2 + shift)).long()
    if kind == "mask":
        return steps < length - length // 4 - shift
    ids = 1 + (steps * 4 + shift) // max(length, 1)
    ids = torch.where(steps >= length - length // 6, 0, ids)
    return torch.where(steps == length // 2, 0, ids)


def gradients(function, tensors, options, seed=1):
    """The output and the gradients of a fixed random projection of it, by name."""
    out = function(*tensors, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out)
    leaves = dict(zip(("query", "key", "value"), tensors, strict=True))
    leaves |= {name: x for name, x in options.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    grads = torch.autograd.grad((out * weight).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return out, dict(zip(leaves, grads, strict=True))
