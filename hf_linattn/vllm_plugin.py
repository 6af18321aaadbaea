"""What vLLM finds of this package: the entry point `vllm.general_plugins`.

vLLM imports it in each of its processes before it reads a model's config. That alone makes converted checkpoints known there without
`trust_remote_code`; its Transformers backend then builds one, which refuses in a sentence (`models.py`), before any weight is read.
"""

from hf_linattn import models  # noqa: F401  (registers the Auto classes of converted checkpoints)


def register() -> None:
    """Does nothing more: vLLM asks for a function, and may call it several times."""
