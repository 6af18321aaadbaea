"""A softmax checkpoint in, a linear-attention checkpoint out. Run from a checkout: ``python -m convert.linearize --help``."""
