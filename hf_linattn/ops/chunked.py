"""Linear attention in time and memory linear in N, in PyTorch, on any device, with its analytic backward.

The sequence is cut into chunks. Inside a chunk the weights are formed pair by pair; all that came before is one running sum, the state
M = sum psi(k) [v, 1]^T (see `features`). The denominator is the value column of ones, so that forward and backward know no special case
for it:

    num_i = sum_n A_in [v_n, 1]       A_in = f(s_in) exp(G_i - G_n)       g_i = last column       o_i = num_i / g_i
    w_i = [W_i / g_i, -(W_i . o_i) / g_i]      W = dL/do      dA_in = w_i . [v_n, 1]
    dq_i = sum_n A'_in dA_in k_n      dk_n = sum_i A'_in dA_in q_i      d[v_n, 1] = sum_i A_in w_i      A' = (b + 2 c s) exp(..)

dq runs forward through the sequence beside M; dk and dv run backward beside R, the gradient of M. Second-degree weights have a state of
about D^2 / 2 rows; below `DIRECT_LENGTH` D^2 tokens it is cheaper to form all their pairs, a chunk of rows at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .call import Call, Forward, Gradients
from .decay_gradient import DecayGradient
from .features import key_features, key_features_backward, query_features, query_features_backward
from .noise import paper_factor, standard_normal
from .unit import unit, unit_backward

CHUNK = 128  # tokens: the pairs inside a chunk then cost about what the state does at D = 64
DIRECT_LENGTH = 1.0  # of D^2 tokens, up to which second-degree weights are formed pair by pair


class Problem:
    """A call cut into chunks. Rows are queries, columns are keys; heads fold to (B, Hs, r), r query heads to a state."""

    def __init__(self, call: Call, stateful: bool) -> None:
        """`stateful`: a state comes in or is asked for."""
        self.query, self.key, self.value, coefficients, self.log_decay, self.query_segments, self.key_segments = call[:7]
        self.initial_state, self.dropout_p, self.seed, self.degree, self.causal, self.normalize_qk = call[7:]
        self.batch, self.heads, self.length, self.head_dim = self.query.shape
        self.key_length, self.value_dim = self.value.shape[2:]
        self.states, self.dtype, self.state_shape = call.state_heads, call.dtype, call.state_shape
        self.group = self.heads // self.states
        self.a, self.b, self.c, self.temperature = coefficients.to(self.dtype).view(4, self.states, self.group, 1, 1).unbind()
        self.direct = self.degree == 2 and not stateful and self.key_length <= DIRECT_LENGTH * self.head_dim**2
        self.state_degree = 1 if self.direct else self.degree  # of the features in use
        self.total_decay = None  # G, in float64: only its differences are used, and they may be small
        if self.log_decay is not None:
            rate = self.log_decay[None, :, None].expand(-1, -1, self.key_length) if self.log_decay.dim() == 1 else self.log_decay
            self.total_decay = rate.double().cumsum(-1)

    # ---- the pieces of a chunk

    def chunks(self, length: int) -> list[slice]:
        return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]

    def columns_for(self, rows: slice) -> Iterator[slice]:
        """The keys whose pairs with these rows are formed one by one."""
        if self.direct:
            yield slice(0, rows.stop if self.causal else self.key_length)
        elif self.causal:
            yield rows

    def rows_for(self, columns: slice) -> Iterator[slice]:
        """The queries whose pairs with these columns are formed one by one."""
        if self.direct:
            yield slice(columns.start if self.causal else 0, self.length)
        elif self.causal:
            yield columns

    def fold(self, x: Tensor) -> Tensor:
        """(B, Hq, C, .) to (B, Hs, r, C, .)."""
        return x.unflatten(1, (self.states, self.group))

    def per_state(self, x: Tensor) -> Tensor:
        """Key heads repeated for the states that share them, within a chunk only."""
        return x if self.states == x.shape[1] else x.repeat_interleave(self.states // x.shape[1], 1)

    def real(self, x: Tensor, segments: Tensor | None, span: slice) -> Tensor:
        """x with padding tokens zeroed, NaN among them too."""
        return x if segments is None else x.masked_fill((segments[:, span] <= 0)[:, None, :, None], 0)

    def queries(self, rows: slice) -> Tensor:
        """tau q (B, Hs, r, C, D), q of unit length where asked for."""
        q = self.real(self.query[:, :, rows].to(self.dtype), self.query_segments, rows)
        return self.fold(unit(q) if self.normalize_qk else q) * self.temperature

    def keys(self, columns: slice) -> Tensor:
        """k (B, Hs, C, D), of unit length where asked for."""
        k = self.real(self.key[:, :, columns].to(self.dtype), self.key_segments, columns)
        return self.per_state(unit(k) if self.normalize_qk else k)

    def values(self, columns: slice) -> Tensor:
        """[v, 1] (B, Hs, C, Dv + 1)."""
        v = self.real(self.value[:, :, columns].to(self.dtype), self.key_segments, columns)
        return self.per_state(torch.cat([v, torch.ones_like(v[..., :1])], -1))

    def products(self, x: Tensor, y: Tensor) -> Tensor:
        """x . y of every row with every column: (B, Hs, r, C, .) and (B, Hs, C', .) to (B, Hs, r, C, C')."""
        return (x.flatten(2, 3) @ y.mT).unflatten(2, x.shape[2:4])

    def sums(self, pairs: Tensor, y: Tensor) -> Tensor:
        """Each row's sum over the columns: (B, Hs, r, C, C') and (B, Hs, C', .) to (B, Hs, r, C, .)."""
        return (pairs.flatten(2, 3) @ y).unflatten(2, pairs.shape[2:4])

    def seen_(self, pairs: Tensor, rows: slice, columns: slice) -> Tensor:
        """`pairs` (B, Hs, r, C, C'), in place, times exp(G_i - G_n) where row i sees column n, and 0 elsewhere."""
        if self.total_decay is not None:
            # never positive where it counts; the clamp keeps unseen pairs from overflowing before they are zeroed
            gap = (self.total_decay[..., rows, None] - self.total_decay[..., None, columns]).clamp_(max=0)
            pairs.mul_(gap.to(self.dtype).exp()[:, :, None])
        if self.query_segments is not None and self.key_segments is not None:
            here = self.query_segments[:, rows, None]
            pairs.mul_(((here == self.key_segments[:, None, columns]) & (here > 0))[:, None, None])
        return pairs.tril_(rows.start - columns.start) if self.causal else pairs

    def weights(self, q: Tensor, phi: Tensor, psi: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """A_in and, for degree 2, s_in. The linear part a + b s is itself a product of features."""
        weights, s = self.products(phi[..., : self.head_dim + 1], psi[..., : self.head_dim + 1]), None
        if self.degree == 2:
            s = self.products(q, psi[..., : self.head_dim])
            weights.add_(self.c * s * s)
        return self.seen_(weights, rows, columns), s

    # ---- the state

    def empty_state(self) -> Tensor:
        return self.query.new_zeros(self.state_shape, dtype=self.dtype)

    def first_state(self) -> Tensor:
        return self.empty_state() if self.initial_state is None else self.initial_state.to(self.dtype)

    def run_before(self, span: slice) -> Tensor:
        """The run of tokens that the state ahead of this chunk holds (B, 1)."""
        assert self.key_segments is not None
        at = max(span.start - 1, 0) if self.causal else 0
        return self.key_segments[:, at : at + 1].abs()

    def carry_in(self, rows: slice) -> Tensor | None:
        """What the state ahead of the chunk weighs for each row; broadcasts against (B, Hs, r, C, 1)."""
        factor = None
        if self.total_decay is not None and self.causal:
            before = self.total_decay[..., rows.start - 1 : rows.start] if rows.start else 0.0
            factor = (self.total_decay[..., rows] - before).to(self.dtype).exp()[:, :, None, :, None]
        if self.query_segments is not None:
            same = (self.query_segments[:, rows] == self.run_before(rows))[:, None, None, :, None]
            factor = same.to(self.dtype) if factor is None else factor * same
        return factor

    def carry_out(self, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        """What weighs in the state behind the chunk: each column (B, Hs, C, 1), and the state ahead (B, Hs, 1, 1)."""
        column = keep = None
        if self.total_decay is not None and self.causal:
            last = self.total_decay[..., columns.stop - 1 : columns.stop]
            before = self.total_decay[..., columns.start - 1 : columns.start] if columns.start else 0.0
            column = (last - self.total_decay[..., columns]).to(self.dtype).exp()[..., None]
            keep = (last - before).to(self.dtype).exp()[..., None]
        if self.key_segments is not None:
            last_run = self.key_segments[:, columns.stop - 1 : columns.stop].abs()
            inside = (self.key_segments[:, columns] == last_run)[:, None, :, None]
            same_run = (last_run == self.run_before(columns))[:, None, :, None]
            column = inside.to(self.dtype) if column is None else column * inside
            keep = same_run.to(self.dtype) if keep is None else keep * same_run
        return column, keep

    def phi(self, q: Tensor) -> Tensor:
        return query_features(q, self.a, self.b, self.c, self.state_degree)

    def psi(self, columns: slice) -> Tensor:
        return key_features(self.keys(columns), self.state_degree)

    def advance(self, state: Tensor, psi: Tensor, values: Tensor, columns: slice) -> Tensor:
        """The state behind the chunk from the state ahead of it."""
        column, keep = self.carry_out(columns)
        return (psi.mT @ scaled(values, column)).add_(scaled(state, keep))

    def state_ahead(self, number: int, states: dict[int, Tensor]) -> Tensor:
        """The state ahead of a chunk, made from the last that `states` holds before it; those on the way stay in `states`, it goes."""
        chunks, at = self.chunks(self.key_length), number
        while at not in states:
            at -= 1
        for missing in range(at, number):
            columns = chunks[missing]
            states[missing + 1] = self.advance(states[missing], self.psi(columns), self.values(columns), columns)
        return states.pop(number)

    def whole_state(self) -> Tensor:
        """The state of all keys: what every row of bidirectional attention reads."""
        state = self.first_state()
        for columns in self.chunks(self.key_length):
            state = self.advance(state, self.psi(columns), self.values(columns), columns)
        return state

    def noise(self, rows: slice) -> Tensor | None:
        """(1 - p) (1 + psi) for each output of these rows (B, Hq, C, Dv)."""
        if self.dropout_p is None or self.seed is None:
            return None
        normal = standard_normal(self.seed, self.batch, self.heads, rows.start, rows.stop, self.value_dim)
        return paper_factor(self.dropout_p.to(self.dtype), normal.to(self.dtype))


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def forward(call: Call, return_state: bool) -> Forward:
    """out (B, Hq, N, Dv), mass g (B, Hq, N) and the state behind the last key, or None where it is not asked for."""
    query, causal = call.query, call.causal
    problem = Problem(call, return_state or call.initial_state is not None)
    out = call.empty_out()
    mass = query.new_empty(query.shape[:3], dtype=problem.dtype)
    state = problem.first_state() if causal or problem.direct else problem.whole_state()
    has_past = call.initial_state is not None or not causal
    for rows in problem.chunks(problem.length):
        q = problem.queries(rows)
        phi, parts = problem.phi(q), []
        if has_past and not problem.direct:
            parts.append(scaled(problem.sums(phi, state), problem.carry_in(rows)))
        for columns in problem.columns_for(rows):
            psi, values = problem.psi(columns), problem.values(columns)
            parts.append(problem.sums(problem.weights(q, phi, psi, rows, columns)[0], values))
        num = (parts[0] if len(parts) == 1 else parts[0].add_(parts[1])).flatten(1, 2)
        g = num[..., -1:]
        o = num[..., :-1] / g.masked_fill(g == 0, 1)
        out[:, :, rows] = scaled(o, problem.noise(rows))
        mass[:, :, rows] = g[..., 0]
        if causal and not problem.direct and (return_state or rows.stop < problem.length):
            state = problem.advance(state, psi, values, rows)
            has_past = True
    return out, mass, state if return_state else None


def backward(call: Call, out: Tensor, mass: Tensor, grad_out: Tensor, grad_mass: Tensor | None, grad_state: Tensor | None) -> Gradients:
    """Gradients of query, key, value, coefficients (4, Hq), log_decay and initial_state; the last two None where the input is."""
    sweeps = Sweeps(call, out, mass, grad_out, grad_mass, grad_state)
    sweeps.forward()
    sweeps.backward()
    grad_log_decay = None
    if call.log_decay is not None and sweeps.rate is not None:
        total = sweeps.rate.total()
        grad_log_decay = (total.sum((0, -1)) if call.log_decay.dim() == 1 else total).to(call.log_decay.dtype)
    grad_coefficients = sweeps.grad_coefficients.flatten(1).to(call.coefficients.dtype)
    grad_initial = None if call.initial_state is None else sweeps.reverse
    return sweeps.grad_query, sweeps.grad_key, sweeps.grad_value, grad_coefficients, grad_log_decay, grad_initial


class Sweeps:
    """Backward, chunk by chunk: through the sequence beside the state for the queries' side, and back beside R for the keys'."""

    def __init__(
        self, call: Call, out: Tensor, mass: Tensor, grad_out: Tensor, grad_mass: Tensor | None, grad_state: Tensor | None
    ) -> None:
        self.call, self.out, self.mass, self.grad_out, self.grad_mass, self.grad_state = call, out, mass, grad_out, grad_mass, grad_state
        self.p = p = Problem(call, grad_state is not None or call.initial_state is not None)
        self.grad_query, self.grad_key, self.grad_value = map(torch.empty_like, (call.query, call.key, call.value))
        self.grad_coefficients = call.coefficients.new_zeros(4, p.states, p.group, dtype=p.dtype)
        self.reverse = p.empty_state()  # R: the gradient of the state; gathered by `forward` where attention is bidirectional
        self.rate = None if call.log_decay is None else DecayGradient(call.query, p.states, p.key_length, len(p.chunks(p.length)))

    def of_rows(self, rows: slice) -> Tensor:
        """w (B, Hs, r, C, Dv + 1)."""
        p = self.p
        upstream = p.real(self.grad_out[:, :, rows].to(p.dtype), p.query_segments, rows)
        g = self.mass[:, :, rows, None]
        inverse = torch.where(g == 0, 0, 1 / g)
        last = -inverse * (upstream * self.out[:, :, rows]).sum(-1, keepdim=True)
        if self.grad_mass is not None:
            last = last + p.real(self.grad_mass[:, :, rows, None].to(p.dtype), p.query_segments, rows)
        return p.fold(torch.cat([inverse * scaled(upstream, p.noise(rows)), last], -1))

    def forward(self) -> None:
        """The gradients of queries and coefficients."""
        p, rate = self.p, self.rate
        state = p.first_state() if p.causal or p.direct else p.whole_state()
        has_past = p.initial_state is not None or not p.causal
        for number, rows in enumerate(p.chunks(p.length)):
            if rate is not None and not p.direct and number % rate.stride == 0:
                rate.states[number] = state
            keys = [(columns, p.psi(columns), p.values(columns)) for columns in p.columns_for(rows)]
            self.queries_side(rows, keys, state if has_past and not p.direct else None)
            if p.causal and not p.direct and (rows.stop < p.length or self.grad_state is not None):
                ((_, psi, values),) = keys
                state = p.advance(state, psi, values, rows)
                has_past = True

    def queries_side(self, rows: slice, keys: list[tuple[slice, Tensor, Tensor]], state: Tensor | None) -> None:
        """The gradients of these queries, from the keys of their pairs and the state ahead of them; None where it is empty."""
        p, q, w = self.p, self.p.queries(rows), self.of_rows(rows)
        phi = p.phi(q)
        grad_phi, grad_q, grad_c = torch.zeros_like(phi), torch.zeros_like(q), torch.zeros_like(q[..., 0])
        if state is not None:
            carried = scaled(w, p.carry_in(rows))
            grad_phi = p.products(carried, state)
            if self.rate is not None:
                self.rate.rows_carried(rows, phi, grad_phi)
            if not p.causal:
                self.reverse += phi.flatten(2, 3).mT @ carried.flatten(2, 3)
        for columns, psi, values in keys:
            grad_weights = p.seen_(p.products(w, values), rows, columns)
            grad_phi[..., : p.head_dim + 1] += p.sums(grad_weights, psi[..., : p.head_dim + 1])
            if p.degree == 2:
                k = psi[..., : p.head_dim]
                grad_s = grad_weights * p.products(q, k)
                grad_q += 2 * p.c * p.sums(grad_s, k)
                grad_c += (grad_s * p.products(q, k)).sum(-1)
        part, *rows_of_coefficients = query_features_backward(grad_phi, q, p.b, p.c, p.state_degree)
        grad_q += part
        rows_of_coefficients[2] = rows_of_coefficients[2] + grad_c
        rows_of_coefficients.append((grad_q * q).sum(-1) / p.temperature[..., 0])
        self.grad_coefficients += torch.stack([x.sum((0, 3)) for x in rows_of_coefficients])
        grad_q = (grad_q * p.temperature).flatten(1, 2)
        if p.normalize_qk:
            grad_q = unit_backward(grad_q, p.real(p.query[:, :, rows].to(p.dtype), p.query_segments, rows))
        self.grad_query[:, :, rows] = p.real(grad_q, p.query_segments, rows)

    def backward(self) -> None:
        """The gradients of keys and values."""
        p = self.p
        if self.grad_state is not None:
            self.reverse = self.reverse + self.grad_state
        has_future = self.grad_state is not None or not p.causal
        for number, columns in reversed(list(enumerate(p.chunks(p.key_length)))):
            self.keys_side(number, columns, has_future and not p.direct)
            has_future = has_future or not p.direct

    def keys_side(self, number: int, columns: slice, has_future: bool) -> None:
        """The gradients of these keys and values; R becomes the gradient of the state ahead of them."""
        p, rate = self.p, self.rate
        psi, values = p.psi(columns), p.values(columns)
        k = psi[..., : p.head_dim]
        grad_psi, grad_k, grad_values = torch.zeros_like(psi), torch.zeros_like(k), torch.zeros_like(values)
        column, keep = p.carry_out(columns)
        if has_future:
            grad_values = scaled(psi @ self.reverse, column)
            grad_psi = scaled(values, column) @ self.reverse.mT
        if rate is not None and not p.direct:
            rate.columns_carry(columns, values, grad_values, p.state_ahead(number, rate.states), scaled(self.reverse, keep))
        for rows in p.rows_for(columns):
            q, w = p.queries(rows), self.of_rows(rows)
            phi = p.phi(q)
            weights, s = p.weights(q, phi, psi, rows, columns)
            grad_weights = p.products(w, values)
            if rate is not None:
                rate.pairs(rows, columns, weights * grad_weights)
            grad_weights = p.seen_(grad_weights, rows, columns)
            grad_values += weights.flatten(2, 3).mT @ w.flatten(2, 3)
            grad_psi[..., : p.head_dim + 1] += grad_weights.flatten(2, 3).mT @ phi[..., : p.head_dim + 1].flatten(2, 3)
            if s is not None:
                grad_k += (grad_weights * s).flatten(2, 3).mT @ (2 * p.c * q).flatten(2, 3)
            if not p.direct:
                carried = scaled(w, p.carry_in(rows))
                self.reverse = scaled(self.reverse, keep) + phi.flatten(2, 3).mT @ carried.flatten(2, 3)
        grad_k += key_features_backward(grad_psi, k, p.state_degree)
        if p.normalize_qk:
            grad_k = unit_backward(grad_k, p.per_state(p.real(p.key[:, :, columns].to(p.dtype), p.key_segments, columns)))
        for grad, found in ((self.grad_key, grad_k), (self.grad_value, grad_values[..., :-1])):
            grad[:, :, columns] = p.real(found.unflatten(1, (p.key.shape[1], -1)).sum(2), p.key_segments, columns)
