"""The folder of an evaluation: every measurement in a file of its own, written as soon as it is made, so that a later call goes on.

    measured/MODEL/MEASUREMENT.json   what was asked, what was found, on what, in how many seconds
    report/                           the page, made anew at the end of each call

What was asked is compared on resume: figures of another question never stand in a table as if they answered this one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from convert.errors import ConversionError
from recipes.common.files import clear_up, hold, output_path, staged_directory, write_json
from recipes.common.lock import Lock
from recipes.common.place import check_run
from recipes.common.reading import read_json

COMMAND = "convert.evaluate"
GROWS = ("measured/*/*.json", "report/*")


class Store:
    """An evaluation's folder. It is made with the first measurement, so that what is refused before costs nothing, and then held by this
    process until ``close``.

    Args:
        folder: where it is, or will be.
        inputs: what is read; none of it may be in the folder, nor the folder in it.
        resume, overwrite: what to do where the folder is there.

    Raises:
        ConversionError: the folder is there and neither is given, or is not this command's, or another process writes in it.
    """

    def __init__(self, folder: str | Path, inputs: list[str], resume: bool, overwrite: bool) -> None:
        self.folder, self.inputs, self.overwrite = output_path(folder), inputs, overwrite
        self._held: Lock | None = None
        check_run(self.folder, COMMAND, inputs=inputs, resume=resume, overwrite=overwrite)
        if resume and self.folder.exists():
            self._hold()

    def close(self) -> None:
        """Lets go of the folder."""
        if self._held:
            self._held.release()

    def find(self, subject: str, measurement: str) -> dict[str, Any] | None:
        """What was measured, None where it was not."""
        path = self._path(subject, measurement)
        if self._held is None or not path.is_file():
            return None
        stored = read_json(path)
        if not isinstance(stored, dict) or not {"asked", "found", "seconds"} <= set(stored):
            raise ConversionError(f"{path} is not as it was written; remove it to have it measured again")
        return stored

    def measure(self, subject: str, measurement: str, asked: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was found when this was asked before, or what ``work`` finds now.

        Raises:
            ConversionError: it was measured, and something else was asked.
        """
        stored = self.find(subject, measurement)
        if stored is None:
            began = time.perf_counter()
            found = work()
            stored = {"subject": subject, "asked": asked, "found": found, "seconds": round(time.perf_counter() - began, 2)}
            self._make()
            write_json(self._path(subject, measurement), stored)
        for key in asked:
            if stored["asked"].get(key) != asked[key]:
                raise ConversionError(
                    f"{measurement} of {subject} was measured with {key} = {stored['asked'].get(key)!r:.200}, and now it is "
                    f"{asked[key]!r:.200}; resume with the same, or choose another output"
                )
        return dict(stored["found"])

    def _make(self) -> None:
        if self._held is None:
            with staged_directory(self.folder, COMMAND, overwrite=self.overwrite, inputs=self.inputs, grows=GROWS) as aside:
                write_json(aside / "format.json", {"format": 1})
            self._hold()

    def _hold(self) -> None:
        self._held = hold(self.folder)
        for place in (self.folder, *self.folder.glob("measured/*"), self.folder / "report"):
            clear_up(place)

    def _path(self, subject: str, measurement: str) -> Path:
        plain = re.sub(r"[^\w.-]+", "_", subject).strip("._")[:60]
        return self.folder / "measured" / f"{plain}-{blake2b(subject.encode(), digest_size=3).hexdigest()}" / f"{measurement}.json"
