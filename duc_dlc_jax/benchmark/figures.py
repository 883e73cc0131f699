"""The JSON of a benchmark: each figure is in it as soon as it is measured, and is measured once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections

import duc_dlc_jax
from duc_dlc_jax import config as config_lib
from duc_dlc_jax import storage


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

    A row says in `of` the `conditions` it was measured in. One that failed is a row too. A command
    that is cut off loses no row, and goes on with those that are missing.
    """

    def __init__(self, path: str = "", again: bool = False):
        """again: rows that are there are measured again. Raises ConfigError for a file not ours."""
        self._path, self._again = Path(path) if path else None, again
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
    ) -> dict[str, Any]:
        """The row at `where` (section, name), measured unless it is there with the same `of`."""
        row = self.found(where, of)
        if row is None:
            row = self.keep(where, measure() | {"of": of})
        else:
            print(f"{', '.join(where)}: in {self._path} already; --again measures it again")
        return row

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
