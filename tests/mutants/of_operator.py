"""Slips in the operator."""

from .mutant import OPERATOR, named

CHUNKED, CHECKS, FUNCTIONAL = (f"hf_linattn/ops/{name}.py" for name in ("chunked", "checks", "functional"))
DECAY, NOISE, STEP = (f"hf_linattn/ops/{name}.py" for name in ("decay_gradient", "noise", "one_token"))

MUTANTS = [
    *named(
        OPERATOR,
        # bits that are lost over long sequences only
        ("a running decay in float32", CHUNKED, "rate.double().cumsum(-1)", "rate.cumsum(-1)",
         "ops/test_precision.py::test_what_was_forgotten_costs_no_digits"),
        ("differences of a decay rounded before they are taken, ahead", CHUNKED,
         "(self.total_decay[..., rows] - before).to(self.dtype)", "(self.total_decay[..., rows].to(self.dtype) - before).to(self.dtype)",
         "ops/test_precision.py::test_what_was_forgotten_costs_no_digits"),
        ("differences of a decay rounded before they are taken, behind", CHUNKED,
         "(last - self.total_decay[..., columns]).to(self.dtype)", "(last.to(self.dtype) - self.total_decay[..., columns].to(self.dtype))",
         "ops/test_precision.py::test_what_was_forgotten_costs_no_digits"),
        ("what goes across a chunk left out of the decay's gradient", DECAY, " - given + across[..., None]", " - given"),
        ("sums of half precision in half precision", CHUNKED,
         "self.dtype = torch.float64 if self.query.dtype == torch.float64 else torch.float32", "self.dtype = self.query.dtype",
         "ops/test_precision.py"),
        # memory
        ("every state kept for the decay's gradient", DECAY, "self.stride = max(1, int(chunks**0.5))", "self.stride = 1",
         "ops/test_memory.py"),
        ("pairs formed one by one however long the text", CHUNKED, "DIRECT_LENGTH = 1.0", "DIRECT_LENGTH = 1e9",
         "ops/test_memory.py"),
        ("constants never forgotten", FUNCTIONAL, "if len(_constants) >= 256:", "if len(_constants) >= 2**60:",
         "ops/test_operators.py"),
        ("constants of other heads", FUNCTIONAL, "signature = (*map(float, given), heads, dtype,",
         "signature = (*map(float, given), dtype,",
         "ops/test_operators.py"),
        # noise
        ("the variance of paper noise p squared", NOISE, "dropout_p.sqrt() * normal", "dropout_p * normal"),
        ("moment noise with the decay once", FUNCTIONAL, "None if decay is None else 2 * decay, 2, False, None)",
         "None if decay is None else decay, 2, False, None)",
         "ops/test_noise.py"),
        ("moment noise with half of the cross term", FUNCTIONAL, "2 * a * b, b * b, temperature]", "a * b, b * b, temperature]",
         "ops/test_noise.py"),
        ("moment noise not renormalised", FUNCTIONAL, "(p / (1 - p) * share", "(p * share",
         "ops/test_noise.py"),
        ("moment noise with a slope at rounding", FUNCTIONAL, "spread > 64 * torch.finfo(spread.dtype).eps * second", "spread > 0",
         "ops/test_noise.py"),
        ("moment noise of half precision in half precision", FUNCTIONAL,
         "query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)", "pass",
         "ops/test_noise.py"),
        ("noise alike in every sequence of a batch", NOISE, "row = torch.arange(batch * heads, device=device)[:, None, None]",
         "row = torch.arange(heads, device=device).repeat(batch)[:, None, None]"),
        ("noise that repeats after 2^32 tokens", NOISE, "token >> 32, row)", "token * 0, row)"),
        ("the upper half of a seed left out", NOISE, "(seed >> 32) & _WORD", "seed & 0"),
        ("a gradient without the noise, of composed calls", "hf_linattn/ops/operators.py",
         "(torch.ops.linattn.noise(grad, *ctx.saved_tensors), None, None)", "(grad, None, None)",
         "ops/test_noise.py"),
        # bounds
        ("a bound of f below 0 with room of 0.01", CHECKS, "least < -1e-6 * max(abs(a), 1)", "least < -1e-2 * max(abs(a), 1)"),
        ("a bound of f for positive b alone", CHECKS, "least = min(a - abs(b) * temperature", "least = min(a - b * temperature"),
        ("the vertex of f looked for within half the reach", CHECKS, "abs(b) > 2 * c * reach", "abs(b) > c * reach"),
        ("a discriminant with room of a tenth", CHECKS, "4 * a * c * (1 + 1e-6)", "4 * a * c * (1 + 1e-1)"),
        ("a negative dropout allowed", CHECKS, "not 0 <= float(dropout_p) < 1", "not float(dropout_p) < 1"),
        ("a decay of 0 refused", CHECKS, "bool((log_decay <= 0).all())", "bool((log_decay < 0).all())"),
        ("any number of keys behind a lag", CHECKS, "key.shape[2] == length + lag)", "key.shape[2] >= length + lag)"),
        ("c below 0 allowed without unit length", CHECKS, "elif c < 0 or (c > 0", "elif (c > 0"),
        ("vectors of a millionth without direction", "hf_linattn/ops/unit.py", "SMALLEST_SQUARE = 1e-24", "SMALLEST_SQUARE = 1e-12"),
        # state, packing, padding
        ("a state carried into the next run", CHUNKED, "same_run = (last_run == self.run_before(columns))",
         "same_run = (last_run >= self.run_before(columns))"),
        ("the temperature's gradient without the temperature", CHUNKED, "(grad_q * q).sum(-1) / p.temperature[..., 0]",
         "(grad_q * q).sum(-1)"),
        ("padding counted by a step", STEP, "features = features.masked_fill(padding, 0)", "pass"),
        ("an empty state divided by", STEP, "num[..., :-1] / mass.masked_fill(mass == 0, 1)", "num[..., :-1] / mass"),
        ("segments that fall below 0", "hf_linattn/ops/segments.py", "(is_token & (ids < highest)).any() | (ids < 0).any()",
         "(is_token & (ids < highest)).any()"),
        ("float64 rounded by autocast", FUNCTIONAL, "x if x.dtype == torch.float64 else x.to(dtype)", "x.to(dtype)",
         "ops/test_operators.py"),
        ("the row's own factor not given back, both ways", FUNCTIONAL, "next_rate = F.pad(rate[..., 1:], (0, 1)).exp()",
         "next_rate = F.pad(rate[..., 1:], (0, 1)) * 0 + 1"),
    ),
]  # fmt: skip
