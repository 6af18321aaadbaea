"""How wrong outputs become where the state is rounded to bfloat16 after each token: why states are float32, whatever the model's dtype.

    python benchmarks/state_precision.py [--degree 2] [--heads 2] [--tokens 2048]

Queries, keys and values (1, H, N, 32), normal and about a mean of each head; the arithmetic is float32 in both. Printed is the norm of
the difference over the norm of the output, at tokens so far along. `results/notes.md` has the figures.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from hf_linattn import linear_attention_step
from hf_linattn.ops.features import feature_count

HEAD_DIM = 32
AT = (64, 256, 512, 1024, 2048, 4096)
TIME_CONSTANTS = (None, 64.0, 256.0, 2048.0)


@torch.no_grad()
def errors(degree: int, heads: int, tokens: int, time_constant: float | None) -> list[float]:
    """At each of AT that is no more than `tokens`."""
    torch.manual_seed(0)
    shape, mean = (1, heads, tokens, HEAD_DIM), (1, heads, 1, HEAD_DIM)
    query, key = (torch.randn(shape) + 0.7 * torch.randn(mean) for _ in range(2))
    value = torch.randn(shape) + 0.5 * torch.randn(mean)
    options: dict[str, Any] = {"temperature": 0.98} if degree == 1 else {"c": 0.5, "temperature": 2.0}
    if time_constant is not None:
        options["log_decay"] = torch.full((heads,), -1 / time_constant)
    exact = torch.zeros(1, heads, feature_count(HEAD_DIM, degree), HEAD_DIM + 1)
    kept, found = exact.bfloat16(), []
    for number in range(tokens):
        q, k, v = (x[:, :, number : number + 1] for x in (query, key, value))
        right, widened = linear_attention_step(q, k, v, exact, **options), kept.float()
        out = linear_attention_step(q, k, v, widened, **options)
        kept = widened.bfloat16()
        if number + 1 in AT:
            found.append(((out - right).norm() / right.norm()).item())
    return found


def main(
    degree: Annotated[int, typer.Option(help="Of f.")] = 1,
    heads: Annotated[int, typer.Option(help="Each with a state of its own.")] = 8,
    tokens: Annotated[int, typer.Option(help="How many.")] = 4096,
) -> None:
    """Print a table."""
    print("| time constant, tokens | " + " | ".join(f"{at:,}" for at in AT if at <= tokens) + " |")
    print("|---" * (1 + sum(at <= tokens for at in AT)) + "|")
    for time_constant in TIME_CONSTANTS:
        cells = [f"{error:.3f}" for error in errors(degree, heads, tokens, time_constant)]
        print(f"| {'no decay' if time_constant is None else f'{time_constant:,.0f}'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
