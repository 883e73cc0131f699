"""Random access to the examples of a prepared data set: whole images, or the part that is wanted.

No TensorFlow here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import pathlib
import threading
from typing import Any

import numpy as np

from duc_dlc_jax import storage
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import builders, codec, staging
from duc_dlc_jax.data.in_flight import InFlight
from duc_dlc_jax.data.labels import IGNORE, DataError, LabelSpec, label_spec

Box = tuple[int, int, int, int]  # top, left, bottom, right of a part of an image, pixels


class RecordError(RuntimeError):
    """A record that cannot be read or transformed; the message names it."""


class Records:
    """The examples of one split, or of several joined by "+"; see `open_records`.

    Pickles as a folder and a name: every worker process opens the files for itself.

    Attributes:
      spec: the label specification written beside the records.
      labelled: whether every image has labels.
      in_flight: notes what is being read, where processes may die; see `InFlight`.
    """

    in_flight: InFlight | None = None

    def __init__(self, folder: pathlib.Path, split: str, in_memory: bool = False):
        self.folder, self.split, self.in_memory = folder, split, in_memory
        self.spec = read_spec(folder)
        splits = summary(folder)
        rows = [splits[part] for part in split.split("+")]
        self.labelled = all(row["labelled"] == row["images"] for row in rows)
        self._pixels = np.sum([row["pixels"] for row in rows], axis=0)
        self._starts = np.cumsum([0] + [row["images"] for row in rows])
        self._open()

    def _open(self) -> None:
        self._parts, self._cache, self._lock = None, {}, threading.Lock()

    def __getstate__(self) -> dict:
        hidden = ("_parts", "_cache", "_lock")
        return {k: v for k, v in self.__dict__.items() if k not in hidden}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def size(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of an image in pixels, without reading it."""
        part, row = self._locate(index)
        height, width = part.size[row]
        return int(height), int(width)

    def sizes(self) -> list[tuple[int, int]]:
        """Returns (height, width) of every image in pixels, without reading them."""
        return [self.size(index) for index in range(len(self))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the whole example; see `region`."""
        height, width = self.size(index)
        return self.region(index, (0, 0, height, width))

    def pixels(self) -> list[int]:
        """Returns the pixels of each class, counted when the split was prepared."""
        return self._pixels[: self.spec.num_classes].tolist()

    def name(self, index: int) -> str:
        """Returns an example's name without decoding it."""
        return self.tiles(index, (0, 0, 1, 1))[0]["name"].decode()

    def region(self, index: int, box: Box) -> dict[str, Any]:
        """Reads one part of an example; of a tiled image the tiles that the part touches.

        Returns:
          image uint8 [h, w, 3], label uint8 [h, w] (all 255 without labels) and name, with
          h = bottom - top and w = right - left.

        Raises:
          RecordError: the record cannot be read; names it.
        """
        try:
            if not self.in_memory:
                return self._read(index, box)
            if index not in self._cache:
                height, width = self.size(index)
                self._cache[index] = self._read(index, (0, 0, height, width))
            example = self._cache[index]
        except Exception as error:
            raise RecordError(f"record {index} of {self.folder}, {self.split}: {error}") from error
        top, left, bottom, right = box
        cut = np.s_[top:bottom, left:right]
        return example | {"image": example["image"][cut], "label": example["label"][cut]}

    def tiles(self, index: int, box: Box | None = None) -> list[dict[str, Any]]:
        """Returns the stored records of the tiles that a box touches, or all, in row order."""
        part, row = self._locate(index)
        return part.tiles(row, box or (0, 0, *self.size(index)))

    def class_points(self) -> np.ndarray:
        """Returns (record, train id, y, x) of some pixels of each class in each image; int32."""
        tables = [part.points.copy() for part in self._opened()]
        for table, start in zip(tables, self._starts, strict=False):
            table[:, 0] += start
        return np.concatenate(tables)

    def _read(self, index: int, box: Box) -> dict[str, Any]:
        top, left, bottom, right = box
        image = label = None
        for tile in self.tiles(index, box):
            name, y, x = tile["name"].decode(), int(tile["top"]), int(tile["left"])
            pixels, ids = decode_tile(tile, name)
            height, width = ids.shape
            inside = np.s_[max(top - y, 0) : bottom - y, max(left - x, 0) : right - x]
            if y <= top and x <= left and y + height >= bottom and x + width >= right:
                return {"image": pixels[inside], "label": ids[inside], "name": name}
            if image is None or label is None:
                image = np.empty((bottom - top, right - left, 3), np.uint8)
                label = np.empty(image.shape[:2], np.uint8)
            target = np.s_[
                max(y - top, 0) : max(y + height - top, 0),
                max(x - left, 0) : max(x + width - left, 0),
            ]
            image[target], label[target] = pixels[inside], ids[inside]
        return {"image": image, "label": label, "name": name}

    def _locate(self, index: int) -> tuple[_Part, int]:
        """Returns the part that holds an example, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._opened()[number], index - int(self._starts[number])

    def _opened(self) -> list[_Part]:
        with self._lock:
            if self._parts is None:
                self._parts = [_Part(self.folder, split) for split in self.split.split("+")]
        return self._parts


class _Part:
    """The open files of one split: records of tiles, and the tables of its examples."""

    def __init__(self, folder: pathlib.Path, split: str):
        import tensorflow_datasets as tfds  # late: 0.7 s

        _keep_freed_memory()
        builder: Any = tfds.builder_from_directory(str(folder))
        self._source = builder.as_data_source(split)
        with np.load(folder / builders.index_file(split)) as tables:
            self._first, self.size, self.points = (
                tables[name] for name in ("first", "size", "points")
            )

    def tiles(self, row: int, box: Box) -> list[dict[str, Any]]:
        """Returns the records of the tiles of example `row` that the box touches."""
        first, count = int(self._first[row]), int(self._first[row + 1] - self._first[row])
        if count == 1:
            return [self._source[first]]
        top, left, bottom, right = box
        side, columns = builders.TILE, -(-int(self.size[row][1]) // builders.TILE)
        return [  # one by one: __getitems__ costs a third more on a core
            self._source[first + i * columns + j]
            for i in range(top // side, (bottom - 1) // side + 1)
            for j in range(left // side, (right - 1) // side + 1)
        ]


def _keep_freed_memory() -> None:
    """Lets glibc hand the memory of one decoded image to the next instead of the system.

    Else an array of 1 MB costs as long in page faults as the decoding of its JPEG.
    """
    mmap_threshold, trim_threshold = -3, -1  # names of <malloc.h>
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**25)  # bytes; the most it takes
        libc.mallopt(trim_threshold, 2**28)


def decode_tile(tile: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns image uint8 [h, w, 3] and label uint8 [h, w] of a record."""
    height, width = int(tile["height"]), int(tile["width"])
    if tile["encoding"] == b"raw":
        image = np.frombuffer(tile["image"], np.uint8).reshape(height, width, 3)
    else:
        image = codec.decode_image(tile["image"], name)
        if image.shape != (height, width, 3):
            found = image.shape[:2]
            raise DataError(f"{name}: its image is {found}, by its record {(height, width)} (H, W)")
    if tile["label"]:
        label = np.frombuffer(tile["label"], np.uint8).reshape(height, width)
    else:
        label = np.full((height, width), IGNORE, np.uint8)
    return image, label


def is_prepared(folder: pathlib.Path) -> bool:
    return (folder / builders.SUMMARY_FILE).is_file()


def summary(folder: pathlib.Path) -> dict[str, dict]:
    """Returns images, labelled images and pixels per train id of each prepared split."""
    return json.loads((folder / builders.SUMMARY_FILE).read_text())


def read_spec(folder: pathlib.Path) -> LabelSpec:
    """Returns the label contract that a prepared data set was built with."""
    return LabelSpec.from_json((folder / builders.SPEC_FILE).read_text())


def find_spec(data: Any) -> LabelSpec:
    """Returns the label contract of `config.data`: of its prepared records, or of a known name.

    Raises ConfigError where nothing is prepared and the name is not known.
    """
    folder = builders.prepared_dir(data.dir, data.name)
    return read_spec(folder) if (folder / builders.SPEC_FILE).is_file() else label_spec(data.name)


def open_records(data: Any, split: str) -> Records:
    """Opens one split of a prepared data set; `data` is `config.data` (name, dir, in_memory).

    `split` may join several: "train+train_extra". From an object store the records are copied to
    this machine first (`staging.staged`, data.staging_dir).

    Raises:
      FileNotFoundError: not prepared; gives the folder and the command that prepares it.
      ConfigError: no such split; lists those there are.
      DataError: they cannot be copied.
    """
    folder = builders.prepared_dir(data.dir, data.name)
    storage.check(folder)
    if not is_prepared(folder):
        raise FileNotFoundError(
            f"no prepared records of {data.name!r} in {folder}. Prepare them: "
            f"{builders.prepare_command(data.name, data.dir)}"
        )
    splits = summary(folder)
    for part in split.split("+"):
        if part not in splits:
            raise ConfigError(f"no split {part!r} in {folder}; it has: {', '.join(splits)}")
    if storage.is_remote(folder):
        folder = staging.staged(folder, split.split("+"), data.staging_dir)
    return Records(folder, split, data.in_memory)
