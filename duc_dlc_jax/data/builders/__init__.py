"""TFDS builders of every data set, with one schema; where a prepared data set lies."""

from __future__ import annotations

import pathlib
from typing import Any

from duc_dlc_jax import storage
from duc_dlc_jax.data.labels import is_known

VERSION = "2.0.0"  # of the schema; a change of it asks for a new preparation
SPEC_FILE = "label_spec.json"  # the LabelSpec, beside the records
SUMMARY_FILE = "summary.json"  # per split: images, labelled or not, pixels per train id
SOURCE_FILE = "source.json"  # what the records were made of: a folder, or images by name
TILE = 512  # pixels; images of more than TILE_ABOVE pixels are stored in square tiles of this side
TILE_ABOVE = 2**20


def prepared_dir(data_dir: str | pathlib.Path, name: str) -> Any:
    """Returns the folder of a prepared data set, whether or not it exists.

    A pathlib.Path; in an object store an epath.Path.
    """
    root = storage.path(data_dir) if storage.is_remote(data_dir) else pathlib.Path(data_dir)
    return root / name / VERSION


def index_file(split: str) -> str:
    """Returns the name of the table of a split's examples: sizes, first records, class points."""
    return f"index-{split}.npz"


def prepare_command(name: str, data_dir: str | pathlib.Path) -> str:
    """Returns the shell command that fills `prepared_dir`."""
    raw = " --raw_dir=FOLDER_OF_THE_DOWNLOAD" if is_known(name) else " --images=DIR --labels=DIR"
    raw = "" if name == "scenes" else raw
    return f"python -m duc_dlc_jax.data.prepare --dataset={name}{raw} --data_dir={data_dir}"
