"""An encoder with linear attention learns to classify sentences of several lengths: python examples/encoder.py [MODEL]."""

import argparse

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_linattn  # noqa: F401  (registers "linattn")

GOOD = ["a lovely day", "what a kind and clever friend", "the best of all stories", "warm bread, good company", "she laughed and sang"]
BAD = ["a dreadful day", "what a rude and dull neighbour", "the worst of all stories", "cold soup, bad company", "she wept and shouted"]


def main(name: str, steps: int = 30) -> float:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2, attn_implementation="linattn")
    batch = tokenizer(GOOD + BAD, padding=True, return_tensors="pt")  # a padded sentence gets what it gets alone
    labels = torch.tensor([1] * len(GOOD) + [0] * len(BAD))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        right = (model(**batch).logits.argmax(-1) == labels).float().mean().item()
    print(f"loss {loss.item():.3f}, {100 * right:.0f}% of the training sentences right")
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("MODEL", nargs="?", default="google-bert/bert-base-uncased")
    main(*vars(parser.parse_args()).values())
