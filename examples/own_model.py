"""The operator in a model of one's own: parallel in training, one state in generation. python examples/own_model.py"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_linattn

TEXT = "the cat sat on the mat and the dog sat on the log. " * 40
LETTERS = sorted(set(TEXT))
HEADS, WIDTH = 4, 64


class Attention(nn.Module):
    """Heads with a learned decay each."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.log_rate = nn.Parameter(torch.linspace(0, -4, HEADS))

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """x (B, N, WIDTH). With a state N is 1, and the state takes the token in."""
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        decay = -self.log_rate.exp()
        if state is None:
            attended = hf_linattn.linear_attention(query, key, value, log_decay=decay)
        else:
            attended = hf_linattn.linear_attention_step(query, key, value, state, log_decay=decay)
        return self.out(attended.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two layers over letters."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), WIDTH)
        self.attention = nn.ModuleList([Attention(), Attention()])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.head = nn.Linear(WIDTH, len(LETTERS))

    def forward(self, ids: Tensor, states: list[Tensor] | None = None) -> Tensor:
        x = self.letters(ids)
        for number, (attention, norm) in enumerate(zip(self.attention, self.norms, strict=True)):
            x = x + attention(norm(x), None if states is None else states[number])
        return self.head(x)


def main(steps: int = 150) -> str:
    torch.manual_seed(0)
    ids = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 65, (16, 1))
        batch = ids[starts + torch.arange(65)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    states = [hf_linattn.empty_state(1, HEADS, WIDTH // HEADS, WIDTH // HEADS) for _ in model.attention]
    said = "the cat sat"
    with torch.no_grad():
        for letter in said[:-1]:
            model(torch.tensor([[LETTERS.index(letter)]]), states)
        for _ in range(30):
            logits = model(torch.tensor([[LETTERS.index(said[-1])]]), states)
            said += LETTERS[int(logits[0, -1].argmax())]
    print(f"loss {loss.item():.3f}: {said}")
    return said


if __name__ == "__main__":
    main()
