"""A softmax checkpoint in, a linear-attention checkpoint out. See ``linattn convert --help``."""
