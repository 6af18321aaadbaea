"""Train and evaluate causal language models on short stories."""
