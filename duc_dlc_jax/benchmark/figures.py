"""The JSON of a benchmark: each figure is in it as soon as it is measured, and is measured once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections

import duc_dlc_jax
from duc_dlc_jax import config as config_lib
from duc_dlc_jax import storage

# Seconds that a row may take on a GPU with nothing compiled, by its name or its section's, until
# one of the section says what they take. "peer" is PyTorch's start, and that both compute the same.
EXPECTED = {
    "train": 70, "infer": 50, "profile": 30, "peer": 90, "eager": 40, "compile": 110,
    "networks": 60, "memory": 200, "layers": 15, "losses": 15, "layers_torch": 60, "fed": 50,
}  # fmt: skip


def conditions(config: ml_collections.ConfigDict | None, **options: Any) -> dict[str, Any]:
    """What figures are of; config: where it counts; options: others that JSON can hold."""
    text = config_lib.to_json(config) if config else ""
    return {
        "config": hashlib.sha256(text.encode()).hexdigest()[:16],
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "version": duc_dlc_jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **options,
    }


class Figures:
    """What --json holds, with what it held before: `values`, by sections and their rows.

    A row says in `of` the `conditions` it was measured in, and in took_seconds how long that was,
    compilation and all. One that failed is a row too. A command that is cut off loses no row, and
    goes on with those that are missing.

    Attributes:
      left: names of the rows that were not begun for want of time.
    """

    def __init__(self, path: str = "", again: bool = False, seconds: float = 0.0):
        """again: rows that are there are measured again. seconds: begin no row that might end later
        than this from now; 0: no limit. Raises ConfigError for a file not ours.
        """
        self._path, self._again = Path(path) if path else None, again
        self._end = time.perf_counter() + seconds if seconds else float("inf")
        self.left: list[str] = []
        self.values: dict[str, Any] = {}
        if self._path and self._path.is_file():
            try:
                self.values = dict(json.loads(self._path.read_text()))
            except (ValueError, TypeError) as error:
                raise config_lib.ConfigError(
                    f"--json={path} is there and holds no figures ({error}); name another file"
                ) from error

    def once(
        self, where: tuple[str, ...], of: dict[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """The row at `where` (section, name), measured unless it is there with the same `of`.

        None where there is no time for it.
        """
        if row := self.found(where, of):
            print(f"{', '.join(where)}: in {self._path} already; --again measures it again")
            return row
        if not self.time_for(*where):
            return None
        start = time.perf_counter()
        row = measure()
        return self.keep(where, row | {"of": of, "took_seconds": time.perf_counter() - start})

    def time_for(self, *where: str) -> bool:
        """Whether a row may begin; if not it is in `left`."""
        rows = self.values.get(where[0], {}).values() if len(where) == 2 else ()
        took = [r["took_seconds"] for r in rows if isinstance(r, dict) and "took_seconds" in r]
        name = where[-1].removesuffix("-nchw")
        expected = max(took, default=EXPECTED.get(name, EXPECTED.get(where[0], 0)))
        if time.perf_counter() + expected <= self._end:
            return True
        self.left.append(" ".join(where))
        return False

    def found(self, where: tuple[str, ...], of: dict[str, Any]) -> dict[str, Any] | None:
        """The row at `where` if it was measured in these conditions, or None."""
        row: Any = self.values
        for name in where:
            row = row.get(name, {}) if isinstance(row, dict) else {}
        same = isinstance(row, dict) and row.get("of") == json.loads(json.dumps(of))
        return row if same and not self._again else None

    def keep(self, where: tuple[str, ...], row: dict[str, Any]) -> dict[str, Any]:
        """Writes a row; one without `of`, such as half of one, will be measured again."""
        section = self.values
        for name in where[:-1]:
            section = section.setdefault(name, {})
        section[where[-1]] = row
        self.write()
        return row

    def update(self, values: dict[str, Any]) -> None:
        """Writes figures that are always measured, and what concerns all rows."""
        self.values |= values
        self.write()

    def write(self) -> None:
        """Replaces the file in one step: a command that is cut off leaves the former one."""
        if self._path:
            storage.write_whole(self._path, json.dumps(self.values, indent=1) + "\n")
