"""What a bundle is on disk: a folder that is read and checked without this package, too.

bundle.json  what goes in and comes out, classes, scores, origin, versions, the gate's figures
model.stablehlo, model.onnx   the network, in the formats that were asked for
check.npz    drawn images and what the trained network said of them, for `--verify`
SHA256SUMS   of every other file, as `sha256sum -c SHA256SUMS` reads it
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

from duc_dlc_jax import storage
from duc_dlc_jax.data.labels import DataError, LabelSpec

VERSION = 1  # of the layout
FILES = {"stablehlo": "model.stablehlo", "onnx": "model.onnx"}
MANIFEST, CHECK, SUMS = "bundle.json", "check.npz", "SHA256SUMS"


@dataclasses.dataclass(frozen=True)
class Bundle:
    path: Path
    manifest: dict[str, Any]

    @functools.cached_property
    def spec(self) -> LabelSpec:
        return LabelSpec.from_json(json.dumps(self.manifest["labels"]))

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(self.manifest["formats"])

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that images must have; None: any."""
        sides = self.manifest["input"]["height"], self.manifest["input"]["width"]
        return None if "any" in sides else sides

    @property
    def kind(self) -> str:
        return self.manifest["output"]["name"]

    def file(self, form: str) -> Path:
        return self.path / self.manifest["formats"][form]


def is_bundle(path: str | os.PathLike) -> bool:
    return (Path(path) / MANIFEST).is_file()


def read(path: str | os.PathLike) -> Bundle:
    """Raises FileNotFoundError for a folder that is no bundle, DataError for one of another layout.

    Reads the manifest alone; `check_sums` looks at every byte.
    """
    path = Path(path)
    if not is_bundle(path):
        raise FileNotFoundError(f"{path} is not a bundle: {path / MANIFEST} is missing")
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        version = manifest["bundle_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / MANIFEST}: damaged: {error!r}") from error
    if version != VERSION:
        raise DataError(
            f"{path / MANIFEST}: layout {version}; this version of the package reads {VERSION}"
        )
    return Bundle(path, manifest)


def write(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, and the sums of all files that are there."""
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    names = sorted(file.name for file in path.iterdir() if file.name != SUMS)
    (path / SUMS).write_text("".join(f"{storage.sha256(path / name)}  {name}\n" for name in names))


def check_sums(path: str | os.PathLike) -> None:
    """Raises DataError that names every file of a bundle that is missing, changed or not listed."""
    path = Path(path)
    if not (path / SUMS).is_file():
        raise DataError(f"{path}: {SUMS} is missing")
    lines = (path / SUMS).read_bytes().decode("utf-8", "replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    present = {file.name for file in path.iterdir()} - {SUMS}
    bad = [f"{name}: not in {SUMS}" for name in sorted(present - set(sums))]
    for name, digest in sums.items():
        if name not in present:
            bad.append(f"{name}: missing")
        elif storage.sha256(path / name) != digest:
            bad.append(f"{name}: its SHA-256 is not {digest}")
    if bad or not {MANIFEST, CHECK} <= set(sums):
        raise DataError(f"{path} is damaged:\n  " + "\n  ".join(bad or [f"{SUMS}: incomplete"]))
