"""f(s) = a + b s + c s^2 of the cosine of query and key, with a decay: the attention that the project is named for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import bounds
from ..ops.checks import MOST_TOKENS
from ..ops.constants import constant
from ..ops.features import feature_count
from ..ops.precision import exact
from . import feature_map, input_gate, output_map, projection
from .form import Call, Form, Numbers, Sizes, State, Tokens
from .kept import Made, once
from .operators import attention, attention_reference, attention_step, per_token
from .options import one_of, require_bool, require_count, require_number
from .parameters import LinAttnParams, refuse_unread
from .seen import Seen

KERNELS = ("linear", "quadratic")
DECAYS = ("none", "head", "key_head", "token")
SHORTEST_TIME_CONSTANT = 1.5
"""Time constant, in tokens, of the fastest head at the start."""
LARGEST_START = 0.98
"""Largest start of what a bound limits, as a share of that bound: the temperature (linear), b (quadratic)."""
CONVERTED_TEMPERATURE = {"linear": LARGEST_START, "quadratic": 2.0}
"""Where a conversion starts the temperature."""
LEARNED = {"linear": ("temperature",), "quadratic": ("b", "temperature")}
"""Options of f that are where learned numbers start."""
DECAY_WORDS = {
    "none": "",
    "head": ", with a {} decay per query head",
    "key_head": ", with a {} decay per key head",
    "token": ", with a {} decay per token and key head",
}

_INSIDE = 0.999  # a logistic function reaches 1 in float32; the bound itself must stay out of reach


@dataclass(frozen=True)
class PolynomialOptions:
    """Weights f(s) = a + b s + c s^2 of s = temperature * cos(q, k), normalised.

    Args:
        kernel: "linear" (c = 0, a state of D + 1 rows a head) or "quadratic" (c > 0, 1 + D + D (D + 1) / 2 rows).
        a, b, c: the coefficients of f, the same for all heads. Bounds: a > 0; "linear" a >= |b| temperature; "quadratic" c > 0
            and b^2 <= 4 a c; then f >= 0. c = None stands for 0 ("linear") or 0.5 ("quadratic").
        temperature: the factor of s, above 0.
        normalize_qk: whether queries and keys are brought to unit length. Without it s = temperature * scaling * q.k is unbounded, and
            f may go below 0 where the kernel is linear.
        decay: weighs a key n tokens back by exp(-n / tau) as well, with one time constant tau a query head ("head") or a key head
            ("key_head": a group of query heads then shares one state). "token", of converted checkpoints: a rate for each token and key
            head, from the hidden states.
        features: of converted checkpoints: f is taken of learned projections of query and key to so many numbers, fewer than D; the
            state has rows by these instead of D.
        input_gate: "token", of converted checkpoints: a key weighs exp(u) as well, u learned for each token and key head from the hidden
            states, from -5 to 5 and 0 at first; "none": it does not.
        feature_map: "hedgehog", of converted checkpoints: in the place of f(s), weights phi(q).phi(k) of phi(x) = softmax([W x, -W x]), W
            learned for each query head and each key head, the identity at first; the state has 2 D + 1 rows. "none": f(s).
        output_map: of converted checkpoints, what the output o of a query head is multiplied by: "norm", exp(s) / rms(o)^m with s and m
            learned per query head, "gate", a number from 0 to 2 learned for each token and query head from the hidden states,
            "norm_gate", both. s and m start at 0 and the gate at 1, so that nothing changes at first; "none": it stays as it is.
    """

    kernel: str = "linear"
    a: float = 1.0
    b: float = 1.0
    c: float | None = None
    temperature: float = 1.0
    normalize_qk: bool = True
    decay: str = "none"
    features: int | None = None
    input_gate: str = "none"
    feature_map: str = "none"
    output_map: str = "none"

    def __post_init__(self) -> None:
        one_of("kernel", self.kernel, KERNELS)
        one_of("decay", self.decay, DECAYS)
        one_of("input_gate", self.input_gate, input_gate.CHOICES)
        one_of("output_map", self.output_map, output_map.CHOICES)
        if self.c is None:
            object.__setattr__(self, "c", 0.5 if self.kernel == "quadratic" else 0.0)
        for name in ("a", "b", "c", "temperature"):
            require_number(name, getattr(self, name))
        require_bool("normalize_qk", self.normalize_qk)
        if self.features is not None:
            require_count("features", self.features, 1)
        one_of("feature_map", self.feature_map, feature_map.CHOICES)
        self._check_bounds()
        if self.feature_map != "none":
            feature_map.refuse_of_f(self)

    def _check_bounds(self) -> None:
        a, b, c, temperature = self.a, self.b, self.c or 0.0, self.temperature
        if a <= 0 or temperature <= 0:
            raise ValueError(f"linattn options a and temperature must be above 0, not a={a}, temperature={temperature}.")
        if self.kernel == "linear" and c != 0:
            raise ValueError(f'linattn option c={c} needs kernel="quadratic"; kernel="linear" has c = 0.')
        if self.kernel == "linear" and self.normalize_qk and temperature > bounds.largest_temperature(a, b):
            raise ValueError(
                f'linattn options a={a}, b={b}, temperature={temperature} let a weight go below 0; kernel="linear" needs '
                "a >= |b| * temperature."
            )
        if self.kernel == "quadratic" and (c <= 0 or abs(b) > bounds.largest_slope(a, c)):
            raise ValueError(
                f'linattn options a={a}, b={b}, c={c} let a weight go below 0; kernel="quadratic" needs c > 0 and b^2 <= 4 a c.'
            )

    @property
    def degree(self) -> int:
        """Of f: what its features, and so the rows of its state, go by."""
        return 2 if self.kernel == "quadratic" else 1

    def width(self, head_dim: int) -> int:
        """How many numbers of a query and of a key f is taken of."""
        return self.features or (2 * head_dim if self.feature_map == "hedgehog" else head_dim)


class PolynomialParameters(LinAttnParams):
    """f and a decay, learned per head and inside their bounds by construction.

    Attention divides by the sum of f, so multiplying a, b and c by one number changes nothing, and neither does trading b and c against
    the temperature. What is left is one number a query head for the linear kernel and two for the quadratic one, and these are learned:

    - linear: the temperature, in (0, a / b), so that f > 0 for every s that unit-length q and k can give; a and b stay as configured;
    - quadratic: the temperature, above 0, and b, in (0, 2 sqrt(a c)), so that f > 0 for every s; a and c stay as configured;
    - with a decay, the time constant T > 0 in tokens, per query head (``decay="head"``) or key head: a token n steps back is weighed by
      exp(-n / T) as well. With ``decay="token"`` 1 / T = softplus(r + w.x) of the hidden state x of each token, w starting at 0;
    - with ``features``, the projections of `projection` and the centre of the keys;
    - with ``input_gate="token"`` the matrix that u = 5 tanh(w.x / 5) of `input_gate` is read off with, w starting at 0;
    - with ``feature_map="hedgehog"`` the matrices of `feature_map`, and neither temperature nor b;
    - with an ``output_map`` the power m = tanh(p) and the log scale s of its norm, per query head, and the matrix of its gate
      2 sigmoid(w.x), all starting at 0.

    Starting values: temperature and b as configured, but at most 0.98 of their bound; T from 1.5 tokens in the first head, growing
    geometrically to ``sizes.longest`` in the last.

    Raises:
        ValueError: no heads; the linear kernel without ``normalize_qk``; a, b, temperature (or c of the quadratic kernel) that is not
            positive; a decay or gate per token, an output map or a projection that is not to be learned, a layer of unknown width,
            features that are no fewer than the head has.
    """

    of_hidden: ClassVar[tuple[str, ...]] = ("rate_weight", "input_weight", output_map.WEIGHT)
    """The matrices that read the hidden states."""

    def __init__(self, sizes: Sizes, options: PolynomialOptions, learnable: bool = True) -> None:
        _refuse_what_cannot_be_learned(sizes, options, learnable)
        self.options, self.longest = options, max(float(sizes.longest), SHORTEST_TIME_CONSTANT)
        numbers, matrices = self.shapes(sizes)
        reads_hidden = any(name in matrices for name in self.of_hidden)
        super().__init__(numbers, matrices, learnable, sizes.hidden_size if reads_hidden else None)
        self.reset_parameters()

    def shapes(self, sizes: Sizes) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
        """How many heads have each number, and the shapes of matrices."""
        options = self.options
        numbers, matrices = dict.fromkeys(self._of_f(), sizes.query_heads), dict[str, tuple[int, ...]]()
        if options.decay in ("head", "key_head"):
            numbers["log_rate"] = sizes.query_heads if options.decay == "head" else sizes.key_heads
        elif options.decay == "token":
            numbers["rate_logit"] = sizes.key_heads
            matrices["rate_weight"] = (sizes.key_heads, int(sizes.hidden_size or 0))
        if options.features is not None:
            matrices |= projection.shapes(sizes, options.features)
        if options.feature_map == "hedgehog":
            matrices |= feature_map.shapes(sizes)
        if options.input_gate == "token":
            matrices["input_weight"] = (sizes.key_heads, int(sizes.hidden_size or 0))
        if output_map.norms(options.output_map):
            numbers |= dict.fromkeys(("output_power_logit", output_map.LOG_SCALE), sizes.query_heads)
        if output_map.gates(options.output_map):
            matrices[output_map.WEIGHT] = (sizes.query_heads, int(sizes.hidden_size or 0))
        return numbers, matrices

    def _of_f(self) -> tuple[str, ...]:
        """The numbers a head that f has."""
        if self.options.feature_map != "none":
            return ()
        return ("temperature_logit",) if self.options.kernel == "linear" else ("log_temperature", "b_logit")

    def forward(self, hidden: Tensor | None = None, made: Made | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The numbers to attend with, as tensors of shape (heads,), which are to be left as they are.

        Args:
            hidden: (B, N, hidden_size), for a decay or a gate per token.
            made: where what tokens have no say in is kept.
            dtype: float32, or float64 beside queries of float64.

        Returns:
            ``a``, ``b``, ``temperature``; with the quadratic kernel ``c``; with a decay ``log_decay`` = -1 / T < 0, for one per token
            (B, Hk, N); with features the matrices of `projection`; with an input gate ``log_input_gate`` (B, Hk, N); with an output map
            ``output_power`` in (-1, 1), ``output_log_scale``, ``output_gate`` (B, Hq, N). With a feature map its matrices in the place of
            ``a``, ``b`` and ``temperature``.

        Raises:
            ValueError: a decay or gate per token without hidden states.
        """
        learned: dict[str, Tensor] = once(made, ("learned", dtype), lambda: self.learned(dtype))
        return once(made, ("same for all tokens", dtype), lambda: self._of_layer(learned)) | self._of_tokens(learned, hidden)

    def _of_layer(self, learned: dict[str, Tensor]) -> dict[str, Tensor]:
        """The numbers that are the same for all tokens."""
        out = self._coefficients(learned) if self._of_f() else {}
        if "log_rate" in learned:
            out["log_decay"] = -torch.exp(learned["log_rate"])
        if output_map.norms(self.options.output_map):
            out[output_map.POWER] = torch.tanh(learned["output_power_logit"])
            out[output_map.LOG_SCALE] = learned[output_map.LOG_SCALE]
        return out | {name: getattr(self, name) for name in self.matrices if name not in self.of_hidden}

    def _coefficients(self, learned: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of f and its temperature."""
        options, like = self.options, learned[self.names[0]]
        if options.kernel == "linear":
            temperature = self._limit() * torch.sigmoid(learned["temperature_logit"])
            return {"a": _constant(options.a, like), "b": _constant(options.b, like), "temperature": temperature}
        return {
            "a": _constant(options.a, like),
            "b": self._limit() * torch.sigmoid(learned["b_logit"]),
            "c": _constant(options.c or 0.0, like),
            "temperature": torch.exp(learned["log_temperature"]),
        }

    def _of_tokens(self, learned: dict[str, Tensor], hidden: Tensor | None) -> dict[str, Tensor]:
        """Those that each token has of its own, (B, heads, N)."""
        out = {}
        if "rate_logit" in learned:
            out["log_decay"] = -F.softplus(learned["rate_logit"][:, None] + self.read_off("rate_weight", hidden, "decay"))
        if self.options.input_gate == "token":
            out[input_gate.NAME] = input_gate.bounded(self.read_off("input_weight", hidden, "input_gate"))
        if output_map.gates(choice := self.options.output_map):
            out[output_map.GATE] = output_map.gate(self.read_off(output_map.WEIGHT, hidden, "output_map", choice))
        return out

    def start(self, name: str) -> Tensor:
        options = self.options
        if name in (*self.of_hidden, "output_power_logit", output_map.LOG_SCALE):
            return torch.zeros_like(getattr(self, name))
        if name in (feature_map.QUERY, feature_map.KEY):
            return feature_map.start(getattr(self, name).shape)
        if name in self.matrices:
            return projection.start(name, getattr(self, name).shape)
        if name in ("log_rate", "rate_logit"):
            exponents = torch.linspace(0, 1, len(getattr(self, name)))
            log_rates = -(math.log(SHORTEST_TIME_CONSTANT) + exponents * math.log(self.longest / SHORTEST_TIME_CONSTANT))
            return log_rates if name == "log_rate" else log_rates.exp().expm1().log()
        heads = len(getattr(self, name))
        if name == "log_temperature":
            return torch.full((heads,), math.log(options.temperature))
        value = options.temperature if name == "temperature_logit" else options.b
        share = min(value * _INSIDE / self._limit(), LARGEST_START) / _INSIDE
        return torch.full((heads,), math.log(share / (1 - share)))

    def _limit(self) -> float:
        a, b, c = self.options.a, self.options.b, self.options.c or 0.0
        return _INSIDE * (bounds.largest_temperature(a, b) if self.options.kernel == "linear" else bounds.largest_slope(a, c))


def _constant(number: float, like: Tensor) -> Tensor:
    """A number for every head."""
    if torch.compiler.is_compiling():
        return torch.full_like(like, number)
    return constant(("number", number, like.shape, like.dtype, like.device), lambda: torch.full_like(like, number))


def _refuse_what_cannot_be_learned(sizes: Sizes, options: PolynomialOptions, learnable: bool) -> None:
    if sizes.query_heads < 1:
        raise ValueError(f"learnable linear attention needs at least one head, got {sizes.query_heads}")
    if options.kernel == "linear" and not options.normalize_qk:
        raise ValueError("the learnable linear kernel is bounded only for unit-length queries and keys: set normalize_qk to true")
    for name in ("a", "b", "temperature"):
        if not getattr(options, name) > 0:
            raise ValueError(f"learnable linear attention needs {name} > 0 to start from, got {getattr(options, name)}")
    if options.features is not None and not learnable:
        raise ValueError("linattn option features is of learned projections, so it needs learnable=true.")
    if options.feature_map != "none" and not learnable:
        raise ValueError(f"linattn option feature_map={options.feature_map!r} is of learned matrices, so it needs learnable=true.")
    if options.features is not None and options.features >= sizes.head_dim:
        raise ValueError(
            f"linattn option features={options.features} must be below the {sizes.head_dim} numbers of a head; give fewer, or leave it out."
        )
    for name in ("decay", "input_gate"):
        if getattr(options, name) == "token":
            refuse_unread(name, learnable, sizes.hidden_size)
    output_map.refuse_unlearned(options.output_map, learnable, sizes.hidden_size)


class Polynomial(Form):
    """One state a head, of sums over all earlier tokens: float32 (Hs, F, Dv + 1), as of `linear_attention`; Dv + 2 with an input gate.

    float32 in a bfloat16 model too: sums that are rounded to bfloat16 after each token stop growing, and after 2,048 tokens outputs are off
    by a seventh of themselves with a time constant of 64 tokens, by all of themselves and more with longer ones or none.
    """

    name: ClassVar[str] = "polynomial"
    Options: ClassVar[type] = PolynomialOptions
    options: PolynomialOptions
    FEW: ClassVar[int] = MOST_TOKENS
    SEARCHED: ClassVar[dict[str, tuple[float, ...]]] = {"log_temperature": (-1.4, -0.7, 0.0, 0.7, 1.4), "b_logit": (-2.0, 0.0, 2.0)}

    def describe(self, learned: bool = False) -> str:
        decays = {"none": "", "head": " with decay", "key_head": " with decay per key head", "token": " with decay per token"}
        usual = PolynomialOptions(kernel=self.options.kernel)
        numbers = {name: getattr(self.options, name) for name in ("a", "b", "c", "temperature", "normalize_qk", "features", "feature_map")}
        moving = LEARNED[self.options.kernel] if learned else ()
        others = [f"{name}{' from ' if name in moving else '='}{value}" for name, value in numbers.items() if value != getattr(usual, name)]
        gate = [] if self.options.input_gate == "none" else [f"input gate per {self.options.input_gate}"]
        after = [] if self.options.output_map == "none" else [f"output {self.options.output_map.replace('_', ' and ')}"]
        return ", ".join((self.options.kernel + decays[self.options.decay], *others, *gate, *after))

    def formula(self, learnable: bool) -> str:
        decay = DECAY_WORDS[self.options.decay].format("learned" if learnable else "fixed")
        gate = ", times an exp(u) learned per token and key head" if self.options.input_gate == "token" else ""
        after = output_map.WORDS[self.options.output_map]
        if self.options.feature_map == "hedgehog":
            features = "phi(x) = softmax([W x, -W x]), W learned per query head and key head"
            return f"phi(q).phi(k), normalised, of {features}{decay}{gate}{after}"
        f = "a + b s" if self.options.kernel == "linear" else "a + b s + c s^2"
        product = "cosine" if self.options.normalize_qk else "scaled product"
        projected = "" if self.options.features is None else f", each projected to {self.options.features} learned features"
        return f"f(s) = {f}, normalised, of s = temperature times the {product} of query and key{projected}{decay}{gate}{after}"

    # ---- what a layer learns

    def parameters(self, sizes: Sizes, learnable: bool) -> PolynomialParameters | None:
        options = self.options
        choices = {options.decay, options.input_gate, options.feature_map, options.output_map}
        if not learnable and choices == {"none"} and options.features is None:
            return None
        return PolynomialParameters(sizes, options, learnable)

    def numbers(self, call: Call, parameters: LinAttnParams | None) -> Numbers:
        if parameters is not None and parameters.hidden_size:  # each token has its own
            return self._numbers(call, parameters)
        return once(call.made, ("numbers", call.scaling, call.query.dtype), lambda: self._numbers(call, parameters))

    def _numbers(self, call: Call, parameters: LinAttnParams | None) -> Numbers:
        options, query = self.options, call.query
        numbers: Numbers = {name: getattr(options, name) for name in ("a", "b", "c", "temperature", "normalize_qk")}
        if parameters is not None:
            numbers.update(parameters(call.hidden, call.made, exact(query.dtype)))
        elif options.features is not None:
            raise ValueError("linattn option features is of learned projections, which only converted checkpoints have: leave it out.")
        elif options.feature_map != "none":
            raise ValueError(
                f"linattn option feature_map={options.feature_map!r} is of learned matrices, which only converted checkpoints have: "
                "leave it out."
            )
        elif options.input_gate == "token":
            raise ValueError('linattn option input_gate="token" is learned, which only converted checkpoints are: leave it out.')
        elif options.output_map != "none":
            raise ValueError(
                f'linattn option output_map="{options.output_map}" is learned, which only converted checkpoints are: leave it out.'
            )
        elif options.decay != "none":
            numbers["log_decay"] = starting_log_decay(self._rates(call.sizes), query.device, exact(query.dtype))
        if not options.normalize_qk:
            numbers["temperature"] = numbers["temperature"] * (query.shape[-1] ** -0.5 if call.scaling is None else call.scaling)
        return numbers

    def _rates(self, sizes: Sizes) -> int:
        """How many rates of decay there are."""
        if self.options.decay == "token":
            raise ValueError('linattn option decay="token" is learned, which only converted checkpoints are: give "head" or "key_head".')
        return sizes.query_heads if self.options.decay == "head" else sizes.key_heads

    # ---- attention

    def keeps_state(self, call: Call, numbers: Numbers) -> bool:
        return call.causal or ("log_decay" not in numbers and not call.is_packed)

    def attend(self, call: Call, numbers: Numbers) -> Tensor:
        return attention(call, numbers)[0]

    def attend_from(self, call: Call, numbers: Numbers, before: State | None) -> tuple[Tensor, State]:
        out, after = attention(call, numbers, initial_state=None if before is None else before["sums"], return_state=True)
        return out, {"sums": after}

    def step(self, call: Call, numbers: Numbers, state: State) -> Tensor:
        return attention_step(call, numbers, state["sums"])

    # ---- the state

    def layout(self, sizes: Sizes, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        heads = sizes.query_heads if self.options.decay == "head" else sizes.key_heads
        rows = feature_count(self.options.width(sizes.head_dim), self.options.degree)
        columns = sizes.value_dim + (2 if self.options.input_gate == "token" else 1)
        return {"sums": ((heads, rows, columns), exact(dtype))}

    def tokens(self, call: Call, numbers: Numbers) -> Tokens:
        return {"key": call.key, "value": call.value, **per_token(numbers)}

    def advance(self, before: State | None, tokens: Tokens, numbers: Numbers, query_heads: int) -> State:
        key = tokens["key"]
        query = key.new_zeros(key.shape[0], query_heads, *key.shape[2:])
        call = Call(query, key, tokens["value"], tokens["real"][:, 0])
        return self.attend_from(call, output_map.without(numbers) | per_token(tokens), before)[1]

    # ---- conversion

    @classmethod
    def converted(cls, options: dict[str, Any]) -> dict[str, Any]:
        kernel = options.get("kernel", PolynomialOptions.kernel)
        given = {name: value for name, value in options.items() if value is not None}
        of_f = given.get("feature_map", "none") == "none"
        start = {"temperature": CONVERTED_TEMPERATURE.get(kernel, PolynomialOptions.temperature)} if of_f else {}
        return {**start, "decay": "head", **given}

    def starting_numbers(self, sizes: Sizes, learnable: bool) -> Numbers:
        options = self.options
        numbers = self._starting_coefficients(learnable) if options.feature_map == "none" else {}
        if options.decay != "none":
            heads = sizes.query_heads if options.decay == "head" else sizes.key_heads
            numbers["log_decay"] = -1 / (1.5 * (sizes.longest / 1.5) ** torch.linspace(0, 1, heads, dtype=torch.float64))
        if options.features is not None:
            shapes = projection.shapes(sizes, options.features)
            numbers |= {name: projection.start(name, shape).double() for name, shape in shapes.items()}
        if options.feature_map == "hedgehog":
            numbers |= {name: torch.eye(shape[-1]).double().expand(shape) for name, shape in feature_map.shapes(sizes).items()}
        if options.input_gate == "token":
            numbers[input_gate.NAME] = torch.zeros(sizes.key_heads, dtype=torch.float64)
        return numbers | output_map.starting_numbers(options.output_map, sizes.query_heads)

    def _starting_coefficients(self, learnable: bool) -> Numbers:
        """Those of f and its temperature."""
        options = self.options
        a, b, c = options.a, options.b, options.c or 0.0
        numbers: Numbers = {"a": a, "b": b, "c": c, "temperature": options.temperature}
        if learnable or options.decay != "none":
            limited, bound = ("temperature", a / b) if options.kernel == "linear" else ("b", 2 * (a * c) ** 0.5)
            numbers[limited] = min(numbers[limited], 0.98 * bound)
        return numbers

    def calibrate(self, parameters: LinAttnParams, seen: Seen, nearest: int = 0) -> None:
        groups = len(seen.query_moment) // len(seen.key_mean)
        if self.options.decay != "none":
            time_constants = seen.reach(nearest).clamp(min=SHORTEST_TIME_CONSTANT)
            if self.options.decay != "head":
                time_constants = time_constants.unflatten(0, (-1, groups)).mean(1)
            if self.options.decay == "token":
                parameters.start_from("rate_logit", (1 / time_constants).expm1().log())
            else:
                parameters.start_from("log_rate", -time_constants.log())
        if self.options.features is not None:
            for name, matrix in projection.fitted(seen, groups, self.options.features).items():
                parameters.start_from(name, matrix)

    def reference(self, call: Call, numbers: Numbers) -> Tensor:
        return attention_reference(call, numbers)

    def alternatives(self) -> Iterator[Polynomial]:
        kept = {name: getattr(self.options, name) for name in ("features", "input_gate", "feature_map", "output_map")}
        for kernel in KERNELS if self.options.feature_map == "none" else KERNELS[:1]:
            for decay in ("none", "head", "key_head"):
                yield Polynomial(PolynomialOptions(kernel, decay=decay, **kept))


def starting_log_decay(heads: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """-1 / tau, (heads,), tau from 1.5 to 512 tokens in equal ratios: the fixed rates of a model without parameters."""
    return -torch.logspace(-math.log10(SHORTEST_TIME_CONSTANT), -math.log10(512.0), heads, device=device, dtype=dtype)
