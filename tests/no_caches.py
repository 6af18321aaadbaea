"""What is measured or learned in one pass keeps nothing of it: a cache made on the way would hold every layer's keys for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from transformers import DynamicCache


@contextmanager
def no_caches() -> Iterator[None]:
    """Fails where a cache is made inside."""

    def made(*args: object, **kwargs: object) -> None:
        pytest.fail("a cache was made where none is read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicCache, "__init__", made)
        yield
