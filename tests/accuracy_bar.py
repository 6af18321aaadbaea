"""The kernels' accuracy against float64, beside the error of the same formula in the same dtype in plain PyTorch.

The bar is twice that error, three times for gradients. What the reference cannot say (states, masses, noise) is held against the chunked
PyTorch form, in float64 for the truth and in the dtype at hand for the bar; but the gradient of the decay, which that form sums more
carefully than any formula in its dtype could, has for its bar autograd's through the matrix of all pairs.
"""

import math

import pytest
import torch
from operator_cases import gradients, make_inputs

from hf_linattn import linear_attention
from hf_linattn.ops import chunked, cuda, reference
from hf_linattn.ops.call import Call
from hf_linattn.ops.features import feature_count, key_features, query_features
from hf_linattn.ops.noise import paper_factor, standard_normal
from hf_linattn.ops.segments import canonical_segments
from hf_linattn.ops.unit import unit

SEEDS = range(3)
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # where the plain form is exact by luck
SMALLEST = 2**-24  # of float16


def distance(x, exact):
    return ((x.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def exactly(x):
    return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_bar(name, ours, plain, exact, factor, dtype):
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    beside = distance(plain, exact)
    if not math.isfinite(beside):  # the plain form has left float16's range: the floor alone is the bar
        beside = 0.0
    error, allowed = distance(ours, exact), factor * beside + FLOOR[dtype] * (1 if factor == 2 else 5)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def pooled(results):
    """Results by name, those of all seeds in one row: the error of a single number, as a head's sum over tokens is, is a matter of luck."""
    return {name: torch.cat([result[name].flatten() for result in results]) for name in results[0]}


def check(dtype, causal=True, lag=0, normalize_qk=True, **kind):
    fixed = {"causal": causal, "lag": lag, "normalize_qk": normalize_qk}

    def results(function, tensors, options):
        out, grads = gradients(lambda *x, **k: function(*x, **k, **fixed), tensors, options)
        return {"out": out} | {f"gradient of {name}": grad for name, grad in grads.items()}

    exact, plain, ours = [], [], []
    for seed in SEEDS:
        tensors, options = make_inputs(dtype=torch.float32, device="cuda", seed=seed, **kind)
        tensors = [x.detach().to(dtype).requires_grad_() for x in tensors]
        exact.append(results(reference, [exactly(x) for x in tensors], {n: exactly(x) for n, x in options.items()}))
        plain.append(results(reference, tensors, options))
        ours.append(results(linear_attention, tensors, options))
        if not all(torch.isfinite(x).all() for x in plain[-1].values()):  # the reference has left float16's range
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HF_LINATTN_BACKEND", "torch")
                plain[-1] = results(linear_attention, tensors, options)
    assert ours[0]["out"].dtype == dtype
    assert_bars(pooled(ours), pooled(plain), pooled(exact), dtype)


def assert_bars(ours, plain, exact, dtype):
    assert ours.keys() == exact.keys()
    for name, x in ours.items():
        if dtype == torch.float16 and name == "state" and exact[name].norm() < SMALLEST:
            assert x.norm() < SMALLEST, name  # decayed to nothing that float16 could weigh
        elif exact[name].norm() < 1e-9:  # nothing is left of it, as where a lone token's weight cancels: no more than rounding may be
            assert x.norm() < 1e-2, name
        else:
            assert_bar(name, x, plain[name], exact[name], 3 if name.startswith("gradient") else 2, dtype)


def operator_case(dtype, *, degree=1, causal=True, decay=None, strengths=(), numbers=(), segments=None, stateful=False, noisy=False,
                  batch=2, heads=4, key_heads=2, length=700, head_dim=32, value_dim=24, seed=0, device="cuda"):  # fmt: skip
    quadratic = degree == 2
    tensors, options = make_inputs(batch, heads, key_heads, length, head_dim, value_dim, dtype=torch.float32, device=device, seed=seed,
                                   decay=decay, segments=segments, quadratic=quadratic, grad=False)  # fmt: skip
    coefficients = torch.stack([options["a"], options["b"], options.get("c", torch.zeros_like(options["a"])), options["temperature"]])
    if numbers:  # of f, the same in every head
        coefficients = torch.tensor(numbers, device=device)[:, None].expand(-1, heads).contiguous()
    log_decay = options.get("log_decay")
    if strengths:  # of the decay: from head to head, or from 48 tokens to the next
        turns = torch.tensor(strengths).repeat_interleave(1 if log_decay.dim() == 1 else 48)
        log_decay = log_decay * turns[torch.arange(log_decay.shape[-1]) % len(turns)].to(device)
    runs = canonical_segments(options["segment_ids"], batch, length) if segments else None
    state_heads = Call(*tensors, coefficients, log_decay).state_heads
    shape = batch, state_heads, feature_count(head_dim, degree), value_dim + 1
    generator = torch.Generator(device).manual_seed(seed)
    random = lambda *s: torch.randn(*s, generator=generator, device=device)  # noqa: E731
    initial = None
    if stateful:
        before = {"length": 50, "head_dim": head_dim, "value_dim": value_dim, "dtype": torch.float32, "device": device, "seed": seed + 1}
        past, _ = make_inputs(batch, heads, key_heads, grad=False, **before)
        rate = None if log_decay is None else (log_decay if log_decay.dim() == 1 else log_decay[..., :1].expand(-1, -1, 50).contiguous())
        initial = chunked.forward(Call(*past, coefficients, rate, degree=degree, causal=causal), True)[2]
        assert initial.shape == shape
    p, noise_seed = (torch.tensor(0.2, device=device), torch.tensor(2**40 + 7, device=device)) if noisy else (None, None)
    inputs = [*(x.to(dtype) for x in tensors), coefficients, log_decay, runs, runs, initial, p, noise_seed, degree, causal, True]
    upstream = random(batch, heads, length, value_dim).to(dtype), random(batch, heads, length), random(*shape) if stateful else None
    return inputs, upstream


def paths_of(dtype, stateful=False, **kind):
    """How `cuda` does such a case, forward and backward."""
    query, key, value, _, log_decay, segments, _, initial, dropout_p, _, degree, causal, _ = operator_case(
        dtype, stateful=stateful, **kind
    )[0]
    options = {"log_decay": log_decay, "segments": segments, "dropout_p": dropout_p, "initial_state": initial, "return_state": stateful}
    return cuda.paths(query, key, value, degree=degree, causal=causal, **options)


def run(module, inputs, upstream, stateful, dtype=None):
    cast = lambda x: x.to(dtype) if dtype is not None and isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    inputs, upstream = [cast(x) for x in inputs], [cast(x) for x in upstream]
    call = Call(*inputs)
    out, mass, state = module.forward(call, stateful)
    grads = module.backward(call, out, mass, *upstream)
    names = ("query", "key", "value", "coefficients", "log_decay", "initial_state")
    results = {"out": out, "mass": mass, "state": state} | {f"gradient of {name}": x for name, x in zip(names, grads, strict=True)}
    return {name: x for name, x in results.items() if x is not None}


def assert_first_tokens_have_their_values(**kind):
    """The outputs of f(s) = s^2, causal, at the first token of every run."""
    inputs, _ = operator_case(torch.bfloat16, degree=2, numbers=(0.0, 0.0, 1.0, 1.0), batch=1, length=150, device="cpu", **kind)
    value, runs = inputs[2], torch.ones(150) if inputs[5] is None else inputs[5][0]
    is_first = (runs > 0) & (runs != torch.cat([torch.zeros_like(runs[:1]), runs[:-1]]))
    out = cuda.forward(Call(*inputs), False)[0]
    assert torch.equal(out[:, :, is_first], value.repeat_interleave(out.shape[1] // value.shape[1], 1)[:, :, is_first])


def rate_gradient(inputs, upstream):
    """Autograd's gradient of log_decay through all pairs, the tokens of the state ahead and of the state behind, all in query's dtype."""
    query, key, value, coefficients, log_decay, runs, _, initial, p, seed, degree, _, _ = inputs
    dtype, (batch, heads, length, _), state_heads = query.dtype, query.shape, Call(*inputs).state_heads
    leaf = log_decay.detach().clone().requires_grad_()
    rate = leaf[None, :, None].expand(batch, -1, length) if leaf.dim() == 1 else leaf
    total = rate.to(dtype).cumsum(-1).repeat_interleave(heads // state_heads, 1)
    per_query_head = lambda x: x.repeat_interleave(heads // x.shape[1], 1)  # noqa: E731
    a, b, c, temperature = coefficients.to(dtype)[..., None, None].unbind()
    q, k, v = unit(query) * temperature, per_query_head(unit(key)), per_query_head(value)
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    s = q @ k.mT
    steps = torch.arange(length, device=query.device)
    seen = (steps <= steps[:, None]).expand(batch, 1, -1, -1)
    first = last = torch.ones(batch, 1, length, dtype=torch.bool, device=query.device)  # tokens of the first run and of the last
    if runs is not None:
        seen = seen & ((runs[:, :, None] == runs[:, None, :]) & (runs > 0)[:, :, None])[:, None]
        first, last = ((runs == runs[:, at, None].abs())[:, None] for at in (0, -1))
    weights = ((a + b * s + c * s * s) * (-(total[..., None] - total[..., None, :]).abs()).exp()).masked_fill(~seen, 0)
    numerator = weights @ values
    if initial is not None:
        carried = query_features(q, a, b, c, degree) @ per_query_head(initial.to(dtype))
        numerator = numerator + carried * (total.exp() * first)[..., None]
    mass = numerator[..., -1]
    out = numerator[..., :-1] / mass.masked_fill(mass == 0, 1)[..., None]
    if p is not None:
        out = out * paper_factor(p, standard_normal(seed, batch, heads, 0, length, value.shape[-1])).to(dtype)
    loss = (out * upstream[0]).sum()
    if upstream[1] is not None:
        loss = loss + (mass * upstream[1].to(dtype)).sum()
    if upstream[2] is not None:
        each = heads // state_heads  # one query head of each state
        weight = ((total[..., -1:] - total).exp() * last)[:, ::each, :, None]
        state = (key_features(k[:, ::each], degree) * weight).mT @ values[:, ::each]
        if initial is not None:
            state = state + (total[:, ::each, -1].exp() * (first & last)[..., -1])[..., None, None] * initial.to(dtype)
        loss = loss + (state * upstream[2].to(dtype)).sum()
    return torch.autograd.grad(loss, leaf)[0]


def compare(dtype, **kind):
    exact, plain, ours = [], [], []
    for seed in SEEDS:
        inputs, upstream = operator_case(dtype, seed=seed, **kind)
        stateful = kind.get("stateful", False)
        exact.append(run(chunked, inputs, upstream, stateful, torch.float64))
        plain.append(run(chunked, inputs, upstream, stateful))
        if inputs[4] is not None:
            plain[-1]["gradient of log_decay"] = rate_gradient(inputs, upstream)
        ours.append(run(cuda, inputs, upstream, stateful))
        assert {name: x.shape for name, x in ours[-1].items()} == {name: x.shape for name, x in exact[-1].items()}
    assert_bars(pooled(ours), pooled(plain), pooled(exact), dtype)
