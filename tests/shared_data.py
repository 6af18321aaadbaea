"""Where real checkpoints and text lie, for tests that use them: a folder beside the checkout, which a fresh clone does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(*parts: str) -> Path | None:
    """The path of ``parts`` under the data folder, or None where it is absent."""
    path = _FOLDER.joinpath(*parts)
    return path if path.exists() else None


def require_shared_data(*parts: str) -> Path:
    """As :func:`shared_data`, but skips the test that calls it where the data is absent."""
    path = shared_data(*parts)
    if path is None:
        pytest.skip(f"needs {'/'.join(('shared', 'data', *parts))} beside the checkout, which is not part of the project")
    return path
