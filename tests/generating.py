"""Generating the same way every time, so that what differs is what a test is about."""

import torch

NEW = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}


def generate(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{"do_sample": False, **NEW, **kwargs})


def left_padded(ids):
    """Two sequences of 23 and 19 tokens, padded on the left to 28."""
    padded = torch.zeros(2, 28, dtype=torch.long)
    padded[0, 5:], padded[1, 9:] = ids[0], ids[1, :19]
    return padded, (padded != 0).long()
