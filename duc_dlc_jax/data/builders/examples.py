"""One image and its mask, checked, as the records that store them. No TensorFlow here."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np

from duc_dlc_jax.data import builders, codec
from duc_dlc_jax.data.builders.sources import Item
from duc_dlc_jax.data.labels import IGNORE, DataError, LabelSpec

POINTS = 4  # positions kept per class and image, for class-uniform sampling


@dataclasses.dataclass(frozen=True)
class Example:
    """One image as it will be stored.

    Attributes:
      records: its tiles in row order, a dictionary of the schema each.
      height, width: pixels, after EXIF orientation.
      pixels: number per train id, int64 [256]; zeros without labels.
      points: (train id, y, x) of up to `POINTS` pixels of each class, int32 [P, 3].
    """

    records: list[dict]
    height: int
    width: int
    pixels: np.ndarray
    points: np.ndarray


def make_example(item: Item, spec: LabelSpec, encoding: str = "auto") -> Example:
    """Reads, checks and encodes one item.

    `encoding` of the pixels: "raw", "png", "jpeg" (quality 95, with loss), or "auto": JPEG files
    stay as they are, everything else is raw, which array_record compresses. Except for JPEG files
    under "auto", images of more than `builders.TILE_ABOVE` pixels are cut into tiles.

    Raises:
      DataError: bad image, bad mask, values outside the contract, or two sizes; names the file.
    """
    if isinstance(item.image, np.ndarray):
        data, kind, image = b"", "raw", np.asarray(item.image)
    else:
        data = item.image.read()
        kind, image = codec.check_image(data, str(item.image))
    height, width = image.shape[:2]
    label, pixels = None, np.zeros(256, np.int64)
    if item.label is not None:
        label = read_label(item, spec, (height, width))
        pixels = np.bincount(label.ravel(), minlength=256)
    if encoding == "auto" and kind == "jpeg":
        whole = _record(item.name, data, "jpeg", label, (0, 0, height, width))
        records = [whole]
    else:
        chosen = "raw" if encoding == "auto" else encoding
        records = [
            _record(item.name, codec.encode_image(_cut(image, box), chosen), chosen, label, box)
            for box in tiles(height, width)
        ]
    points = np.zeros((0, 3), np.int32) if label is None else _class_points(label, item.name)
    return Example(records, height, width, pixels, points)


def read_label(item: Item, spec: LabelSpec, size: tuple[int, int] | None) -> np.ndarray:
    """Returns the train ids of an item, uint8 [H, W]; size: (H, W) of its image, None: unknown.

    Raises:
      DataError: as in `make_example`.
    """
    if isinstance(item.label, np.ndarray):
        raw, where = item.label, item.name
    else:
        assert item.label is not None
        where = str(item.label)
        raw = codec.read_mask(item.label.read(), where, spec.colours)
    if size is not None and raw.shape != size:
        raise DataError(
            f"{where}: the mask is {raw.shape[1]}x{raw.shape[0]}, its image {size[1]}x{size[0]} "
            "(width x height after EXIF orientation); the two must be equal",
            "size",
        )
    try:
        return spec.encode(raw)
    except DataError as error:
        raise DataError(f"{where}: {error}", error.kind) from error


def tiles(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Returns (top, left, height, width) of an image's tiles in row order."""
    if height * width <= builders.TILE_ABOVE:
        return [(0, 0, height, width)]
    side = builders.TILE
    return [
        (top, left, min(side, height - top), min(side, width - left))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def _cut(plane: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    top, left, height, width = box
    return np.ascontiguousarray(plane[top : top + height, left : left + width])


def _record(name: str, data: bytes, encoding: str, label: np.ndarray | None, box) -> dict:
    return {
        "image": data,
        "encoding": encoding,
        "label": b"" if label is None else _cut(label, box).tobytes(),
        "name": name,
        **dict(zip(("top", "left", "height", "width"), box, strict=True)),
    }


def _class_points(label: np.ndarray, name: str) -> np.ndarray:
    """Draws (train id, y, x) of up to `POINTS` pixels of each class; int32 [P, 3]."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    flat, width = label.ravel(), label.shape[1]
    drawn = rng.integers(0, flat.size, 4096)
    points = []
    for k in np.flatnonzero(np.bincount(flat, minlength=256)[:IGNORE]):
        positions = drawn[flat[drawn] == k][:POINTS]
        if len(positions) < POINTS:
            positions = rng.permutation(np.flatnonzero(flat == k))[:POINTS]
        points += [(k, position // width, position % width) for position in positions]
    return np.array(points, np.int32).reshape(-1, 3)
