"""Softmax over the last tokens and the first, exact, beside linear attention over all that lies before them: two outputs mixed by a gate.

What the polynomial cannot weigh, the nearest tokens, softmax does, and what the window cannot see the polynomial does (LoLCATs, arXiv
2410.10254). Each part is normalised by itself: with one denominator the polynomial's mass would grow with the text and drown the window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import window, window_reference, window_step
from ..ops.frame import Frame
from ..ops.functional import cast_for_autocast, is_for_onnx, noisy
from ..ops.mixing import mixed
from ..ops.precision import exact
from ..ops.ring import Ring, along, take
from ..ops.window_token import Token
from . import output_map
from .beside import beside_of
from .form import Call, Form, Numbers, Sizes, State, Tokens
from .operators import attention, attention_reference, per_token
from .options import one_of, require_count
from .parameters import LinAttnParams, refuse_unread
from .polynomial import Polynomial, PolynomialOptions, PolynomialParameters
from .seen import Seen

GATES = ("head", "token")
BESIDE = ("polynomial", "none")
START = 2.0
"""Where the gate's logit starts: 0.88 of the output is the window's."""


@dataclass(frozen=True)
class WindowOptions(PolynomialOptions):
    """The last `window` tokens, the query's own among them, and the first `sinks` by softmax, all at least `window` back by f.

    Args:
        window: how many tokens softmax sees, the query's own among them; at least 1.
        sinks: how many of the first tokens softmax sees besides, from everywhere; at least 0. Beyond the window f sees them too.
        beside: what sees the tokens before the window: "polynomial", whose options are given beside these, or "none", and they are lost.
        gate: what the window's share of the output is learned for: each query head ("head"), or, in converted checkpoints, each token and
            query head, from the hidden states ("token"). Where nothing lies before the window its share is 1.
    """

    window: int = 64
    sinks: int = 4
    beside: str = "polynomial"
    gate: str = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("window", self.window, 1)
        require_count("sinks", self.sinks, 0)
        one_of("beside", self.beside, BESIDE)
        one_of("gate", self.gate, GATES)
        if self.beside == "none":
            for name, unset in asdict(PolynomialOptions()).items():
                if (given := getattr(self, name)) != unset:
                    raise ValueError(
                        f'linattn option {name}={given!r} is of the polynomial beside the window, and beside="none" has none; leave it out.'
                    )


class WindowParameters(PolynomialParameters):
    """Those of the polynomial, and ``gate``, float32: sigmoid(g) per query head (Hq,), or sigmoid(g + w.x) of the hidden state x of each
    token (B, Hq, N), w starting at 0.

    Raises:
        ValueError: as for the polynomial; a gate per token that is not to be learned, or of a layer of unknown width.
    """

    of_hidden = (*PolynomialParameters.of_hidden, "gate_weight")

    def __init__(self, sizes: Sizes, options: WindowOptions, learnable: bool = True) -> None:
        if options.gate == "token":
            refuse_unread("gate", learnable, sizes.hidden_size)
        self.per_token, self.heads = options.gate == "token", sizes.query_heads
        super().__init__(sizes, options, learnable)

    def shapes(self, sizes: Sizes) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
        numbers, matrices = super().shapes(sizes)
        more = {"gate_weight": (sizes.query_heads, int(sizes.hidden_size or 0))} if self.per_token else {}
        return numbers | {"gate_logit": sizes.query_heads}, matrices | more

    def _of_layer(self, learned: dict[str, Tensor]) -> dict[str, Tensor]:
        numbers = super()._of_layer(learned)
        return numbers if self.per_token else numbers | {"gate": torch.sigmoid(learned["gate_logit"])}

    def _of_tokens(self, learned: dict[str, Tensor], hidden: Tensor | None) -> dict[str, Tensor]:
        numbers = super()._of_tokens(learned, hidden)
        if self.per_token:
            numbers["gate"] = torch.sigmoid(learned["gate_logit"][:, None] + self.read_off("gate_weight", hidden, "gate"))
        return numbers

    def start(self, name: str) -> Tensor:
        return torch.full((self.heads,), START) if name == "gate_logit" else super().start(name)


class Window(Form):
    """Keys and values of S + W tokens in a ring, and the polynomial's state of the tokens that have left the window.

    A token enters the state as it leaves the window, so that state and ring hold each token but for the sinks once. Tokens are counted for
    each sequence alone: padding, wherever it lies, takes no place in the window.
    """

    name: ClassVar[str] = "window"
    Options: ClassVar[type] = WindowOptions
    options: WindowOptions
    SEARCHED: ClassVar[dict[str, tuple[float, ...]]] = Polynomial.SEARCHED | {"gate_logit": (-1.0, 0.0, 1.0)}

    def __init__(self, options: WindowOptions) -> None:
        super().__init__(options)
        self.beside = Polynomial(options) if options.beside == "polynomial" else None

    def describe(self, learned: bool = False) -> str:
        size = f"window {self.options.window} + {self.options.sinks}"
        if self.beside is None:
            return size
        return f"{size}, gate per {self.options.gate}, beside {self.beside.describe(learned)}"

    def formula(self, learnable: bool) -> str:
        softmax = f"those of softmax over the last {self.options.window} tokens and the first {self.options.sinks}"
        if self.beside is None:
            return f"{softmax}, and nothing else is seen"
        gate = f"{'learned' if learnable else 'fixed'} gate per {self.options.gate}"
        before = f"over all tokens at least {self.options.window} back"
        return f"{softmax}, mixed by a {gate} with those of a polynomial {before}: {self.beside.formula(learnable)}"

    # ---- what a layer learns

    @property
    def learns(self) -> bool:
        return self.beside is not None

    def parameters(self, sizes: Sizes, learnable: bool) -> WindowParameters | None:
        if self.beside is None or (self.beside.parameters(sizes, learnable) is None and self.options.gate == "head"):
            return None
        return WindowParameters(sizes, self.options, learnable)

    def numbers(self, call: Call, parameters: LinAttnParams | None) -> Numbers:
        if self.beside is None:
            return {}
        if parameters is None and self.options.gate == "token":
            raise ValueError('linattn option gate="token" is learned, which only converted checkpoints are: give "head".')
        return {"gate": 1 / (1 + math.exp(-START)), **self.beside.numbers(call, parameters)}

    # ---- attention

    def keeps_state(self, call: Call, numbers: Numbers) -> bool:
        return call.causal

    def attend(self, call: Call, numbers: Numbers) -> Tensor:
        return self._attend(call, numbers, None, False)[0]

    def attend_from(self, call: Call, numbers: Numbers, before: State | None) -> tuple[Tensor, State]:
        return self._attend(call, numbers, before, True)

    def _attend(self, call: Call, numbers: Numbers, before: State | None, keep: bool) -> tuple[Tensor, State]:
        _refuse_what_a_window_has_not(call)
        call = _cast(call)
        if is_for_onnx(keep or before is not None or bool(call.noise)):
            return self.reference(_in_float32(call), numbers).to(call.query.dtype), {}
        frame = self._frame(call.key, call.value, call.segments, _kept(numbers), before)
        query = frame.close(call.query)
        sums: State = {}
        if self.beside is None:
            out = window.attend(query, frame, call.scaling)
        else:
            closed = output_map.moved(numbers, lambda x: frame.close(x[..., None]).squeeze(-1))
            far, sums = self._far(query, frame, closed, before, keep)
            gate = _as_outputs(numbers["gate"])
            gate = frame.close(gate) if isinstance(gate, Tensor) and gate.shape[2] > 1 else gate
            if isinstance(call.drop, Tensor) or call.drop > 0:
                gate = gate * (torch.rand(*query.shape[:2], 1, 1, device=query.device) >= call.drop)
            out = window.attend_beside(query, frame, call.scaling, far, gate)
        out = frame.open(out)
        if call.noise:
            out = noisy(out, call.noise["dropout_p"])
        return out, self._state(frame.ring_behind()) | sums if keep else {}

    def step(self, call: Call, numbers: Numbers, state: State) -> Tensor:
        call, dtype = _cast(call), state["key"].dtype
        if call.query.dtype == dtype:
            return self._step(call, numbers, state)
        query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))  # under autocast a ring may be wider than a token
        return self._step(call._replace(query=query, key=key, value=value), numbers, state).to(call.query.dtype)

    def _step(self, call: Call, numbers: Numbers, state: State) -> Tensor:
        real = call.segments if call.segments is None or call.segments.dtype == torch.bool else call.segments > 0
        token = Token(call.query, call.key, call.value, real, call.scaling)
        if self.beside is None:
            return window_step.step(token, self._ring(state))
        return window_step.step(token, self._ring(state), beside_of(call, numbers, state["sums"]))

    def _frame(self, key: Tensor, value: Tensor, segments: Tensor | None, kept: Tensor | None, before: State | None) -> Frame:
        ring = None if before is None else self._ring(before)
        options = {"window": self.options.window, "sinks": self.options.sinks}
        return Frame.of(key, value, segment_ids=segments, ring=ring, per_token=kept, **options)

    def _far(self, query: Tensor, frame: Frame, numbers: Numbers, before: State | None, keep: bool) -> tuple[Tensor, State]:
        """The polynomial's output (B, Hq, N, Dv) at the frame's tokens over all before their windows, and its state behind them.

        Outside of graphs, whose lengths may vary, it is that of the tokens alone that may have something before their windows.
        """
        lag = self.options.window
        call, given = Call(query, frame.key, frame.value, frame.runs), _of_the_kept(numbers, frame.per_token)
        if before is None and frame.runs is None and not torch.compiler.is_compiling():
            out, sums = attention(call, given, late=lag, return_state=keep)
        else:
            start = None if before is None else before["sums"]
            out, sums = attention(call, given, lag=lag, initial_state=start, return_state=keep)
        if not keep:
            return out, {}
        if (
            frame.runs is not None and frame.runs.shape[1] > lag
        ):  # of a sequence that ended in the last window's reach the next call sees nothing
            of_state, last = frame.runs[:, -1 - lag], frame.runs[:, -1]
            sums = sums.masked_fill(((of_state != last) & (of_state > 0))[:, None, None, None], 0)
        return out, {"sums": sums}

    # ---- the state

    def layout(self, sizes: Sizes, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        kept = self.options.sinks + self.options.window
        ring = {
            "key": ((sizes.key_heads, kept, sizes.head_dim), dtype),
            "value": ((sizes.key_heads, kept, sizes.value_dim), dtype),
            "seen": ((), torch.int64),
        }
        if self.beside is None:
            return ring
        rows = sizes.key_heads * [self.options.decay, self.options.input_gate].count("token")
        numbers = {"per_token": ((rows, self.options.window), exact(dtype))} if rows else {}
        return ring | numbers | self.beside.layout(sizes, dtype)

    def _ring(self, state: State) -> Ring:
        return Ring(state["key"], state["value"], state["seen"], state.get("per_token"), self.options.window, self.options.sinks)

    def _state(self, ring: Ring) -> State:
        state = {"key": ring.key, "value": ring.value, "seen": ring.seen}
        return state if ring.per_token is None else state | {"per_token": ring.per_token}

    def tokens(self, call: Call, numbers: Numbers) -> Tokens:
        kept = _kept(numbers)
        return {"key": call.key, "value": call.value} | ({} if kept is None else {"per_token": kept})

    def advance(self, before: State | None, tokens: Tokens, numbers: Numbers, query_heads: int) -> State:
        frame = self._frame(tokens["key"], tokens["value"], tokens["real"][:, 0], tokens.get("per_token"), before)
        state = self._state(frame.ring_behind())
        if self.beside is None:
            return state
        key = tokens["key"]
        query, of_state = key.new_zeros(key.shape[0], query_heads, *key.shape[2:]), output_map.without(numbers)
        return state | self._far(query, frame, of_state, before, True)[1]

    # ---- conversion

    @classmethod
    def converted(cls, options: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in options.items() if value is not None}
        return {"gate": "token", **(given if given.get("beside") == "none" else Polynomial.converted(given))}

    def starting_numbers(self, sizes: Sizes, learnable: bool) -> Numbers:
        if self.beside is None:
            return {}
        gate = torch.full((sizes.query_heads,), START, dtype=torch.float64).sigmoid()
        return {**self.beside.starting_numbers(sizes, learnable or self.options.gate == "token"), "gate": gate}

    def reference(self, call: Call, numbers: Numbers) -> Tensor:
        size = self.options.window
        near = window_reference(call.query, call.key, call.value, window=size, sinks=self.options.sinks, scaling=call.scaling,
                                segment_ids=call.segments)  # fmt: skip
        if self.beside is None:
            return near
        far = self._far_reference(call, numbers)
        place = torch.arange(call.query.shape[2], device=near.device)[None]
        if call.segments is not None:
            ids = call.segments.int()
            place = (ids[:, :, None] == ids[:, None, :]).tril().sum(-1) - 1
        return mixed(near, far, _as_outputs(numbers["gate"]), (place >= size)[:, None, :, None])

    def _far_reference(self, call: Call, numbers: Numbers) -> Tensor:
        """The polynomial over all before each token's window. A lag counts columns and a window tokens, so padding is put in front."""
        size = self.options.window
        if call.segments is None:
            return attention_reference(call, _without_gate(numbers), lag=size)
        ids = call.segments.int()
        padding, tokens = (ids <= 0).cumsum(-1), (ids > 0).cumsum(-1)
        place = torch.where(ids > 0, padding[:, -1:] + tokens, padding) - 1  # no sort: ONNX has no stable one
        close = lambda x: x.scatter(2, along(place, x).expand_as(x), x)  # noqa: E731
        query, key, value = (close(x) for x in (call.query, call.key, call.value))
        closed = call._replace(query=query, key=key, value=value, segments=ids.scatter(1, place, ids))
        kept = {name: close(x) for name, x in per_token(numbers).items()}
        return take(attention_reference(closed, _without_gate(output_map.moved(numbers, close)) | kept, lag=size), place)

    def calibrate(self, parameters: LinAttnParams, seen: Seen, nearest: int = 0) -> None:
        if self.beside is None:
            return
        self.beside.calibrate(parameters, seen, self.options.window)
        far = seen.distance_mass[:, self.options.window :].sum(1) / (seen.distance_mass.sum(1) + seen.sink_mass).clamp(min=1e-12)
        parameters.start_from("gate_logit", torch.logit(1 - far, 0.02))

    def reach(self) -> int:
        return self.options.window

    def alternatives(self) -> Iterator[Window]:
        others = [self.options.window, *(size for size in (64, 128, 256) if size != self.options.window)]
        for size in others:
            yield Window(dataclasses.replace(self.options, window=size))


def _as_outputs(gate: float | Tensor) -> float | Tensor:
    """(Hq,) or (B, Hq, N) as (1, Hq, 1, 1) or (B, Hq, N, 1)."""
    if not isinstance(gate, Tensor):
        return gate
    return gate[..., None] if gate.dim() == 3 else gate[None, :, None, None]


def _kept(numbers: Numbers) -> Tensor | None:
    """What the polynomial needs of each token beside its key and value, (B, n Hk, N), None where it needs nothing."""
    kept = per_token(numbers)
    return torch.cat(list(kept.values()), 1) if kept else None


def _of_the_kept(numbers: Numbers, kept: Tensor | None) -> Numbers:
    """The polynomial's numbers with those of other tokens, as `_kept` gave them, in place of the call's."""
    names = list(per_token(numbers))
    return _without_gate(numbers) | (dict(zip(names, kept.chunk(len(names), 1), strict=True)) if kept is not None else {})


def _without_gate(numbers: Numbers) -> Numbers:
    return {name: number for name, number in numbers.items() if name != "gate"}


def _cast(call: Call) -> Call:
    query, key, value = cast_for_autocast(call.query, call.key, call.value)
    if query is call.query and key is call.key and value is call.value:
        return call
    return call._replace(query=query, key=key, value=value)


def _in_float32(call: Call) -> Call:
    """The call in at least float32."""
    query, key, value = (x if x.dtype == torch.float64 else x.float() for x in (call.query, call.key, call.value))
    return call._replace(query=query, key=key, value=value)


def _refuse_what_a_window_has_not(call: Call) -> None:
    if not call.causal:
        raise ValueError('linattn option form="window" is causal, and this layer sees ahead; give form="polynomial".')
    if call.noise and call.noise["dropout_kind"] != "paper":
        raise ValueError(f'linattn option dropout_kind={call.noise["dropout_kind"]!r} is of form="polynomial"; form="window" has "paper".')
