"""The one TFDS builder: every source becomes array_record files of one schema.

Import it only where a data set is built: it needs TensorFlow, reading does not.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

from duc_dlc_jax.data import builders, codec
from duc_dlc_jax.data.builders.sources import Item
from duc_dlc_jax.data.labels import IGNORE, DataError, LabelSpec
from duc_dlc_jax.progress import Progress

ENCODINGS = ("auto", "raw", "png", "jpeg")
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


class SegmentationBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes image and label of each tile, and where the tile lies in its image.

    Records keep the order of the source. The label specification, the pixel counts and the tables
    of the examples are written into the same unfinished folder as the records, which TFDS renames
    when all is done.
    """

    VERSION = tfds.core.Version(builders.VERSION)

    def __init__(self, *, splits: Mapping[str, Iterable[Item]], spec: LabelSpec, **kwargs):
        self._totals: dict[str, int] = kwargs.pop("totals")
        self._splits, self._spec, self._encoding = splits, spec, kwargs.pop("encoding")
        self._summary: dict[str, dict] = {}
        self._index: dict[str, dict[str, np.ndarray]] = {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = tfds.features.FeaturesDict(
            {
                "image": text(doc="of the tile: raw RGB rows, or a PNG or JPEG file"),
                "encoding": text(doc="of `image`: raw, png or jpeg"),
                "label": text(doc="of the tile: rows of train ids; 255 is ignored; or empty"),
                "name": text(),
                "height": np.int32,  # of the tile, pixels
                "width": np.int32,
                "top": np.int32,  # of the tile in its image, pixels
                "left": np.int32,
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            description=f"Semantic segmentation, {self._spec.num_classes} classes.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str):
        pixels, labelled, total = np.zeros(256, np.int64), 0, self._totals[split]
        first, sizes, points = [0], [], [np.zeros((0, 4), np.int32)]
        progress = Progress(total, f"{split}: image")
        # Keys spread over TFDS's 128 bits: it sorts buckets by the high bits, and small integers
        # would all fall into one, which it sorts in memory.
        spacing = (2**128 - 1) // ((total + 1) << 24)
        for number, example in enumerate(_in_threads(self._example, self._splits[split])):
            for tile, record in enumerate(example.records):
                yield ((number << 24) + tile) * spacing, record
            first.append(first[-1] + len(example.records))
            sizes.append((example.height, example.width))
            rows = np.insert(example.points, 0, number, axis=1)
            points.append(rows.astype(np.int32))
            pixels += example.pixels
            labelled += bool(example.records[0]["label"])
            progress.show(number + 1, "", log=(number + 1) % 500 == 0 or number + 1 == total)
        images = len(sizes)
        self._summary[split] = {"images": images, "labelled": labelled, "pixels": pixels.tolist()}
        self._index[split] = {
            "first": np.array(first, np.int64),
            "size": np.array(sizes, np.int32).reshape(-1, 2),
            "points": np.concatenate(points),
        }

    def _example(self, item: Item) -> Example:
        return make_example(item, self._spec, self._encoding)

    def _download_and_prepare(self, *args, **kwargs):
        super()._download_and_prepare(*args, **kwargs)
        folder = pathlib.Path(self.data_dir)  # still the unfinished one
        for split, tables in self._index.items():
            np.savez(folder / builders.index_file(split), allow_pickle=False, **tables)
        (folder / builders.SPEC_FILE).write_text(self._spec.to_json())
        (folder / builders.SUMMARY_FILE).write_text(json.dumps(self._summary))


def _in_threads(function, items: Iterable) -> Iterator:
    """Yields function(item) in order, computed ahead on all cores (the codecs free the GIL)."""
    threads = os.cpu_count() or 1
    waiting: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def make_example(item: Item, spec: LabelSpec, encoding: str = "auto") -> Example:
    """Reads, checks and encodes one item.

    `encoding` of the pixels: "raw", "png", "jpeg" (quality 95, with loss), or "auto": JPEG files
    stay as they are, everything else is raw, which array_record compresses. Except for JPEG files
    under "auto", images of more than `builders.TILE_ABOVE` pixels are cut into tiles.

    Raises:
      DataError: bad image, bad mask, values outside the contract, or two sizes; names the file.
    """
    if isinstance(item.image, np.ndarray):
        data, kind, (height, width) = b"", "raw", item.image.shape[:2]
    else:
        data = item.image.read()
        kind, height, width = codec.check_image(data, str(item.image))
    label, pixels = None, np.zeros(256, np.int64)
    if item.label is not None:
        label = read_label(item, spec, (height, width))
        pixels = np.bincount(label.ravel(), minlength=256)
    if encoding == "auto" and kind == "jpeg":
        whole = _record(item.name, data, "jpeg", label, (0, 0, height, width))
        records = [whole]
    else:
        image = codec.decode_image(data, str(item.image)) if data else np.asarray(item.image)
        chosen = "raw" if encoding == "auto" else encoding
        records = [
            _record(item.name, codec.encode_image(_cut(image, box), chosen), chosen, label, box)
            for box in _tiles(height, width)
        ]
    points = np.zeros((0, 3), np.int32) if label is None else _class_points(label, item.name)
    return Example(records, height, width, pixels, points)


def read_label(item: Item, spec: LabelSpec, size: tuple[int, int]) -> np.ndarray:
    """Returns the train ids of an item, uint8 [H, W]; size: (H, W) of its image.

    Raises:
      DataError: as in `make_example`.
    """
    if isinstance(item.label, np.ndarray):
        raw, where = item.label, item.name
    else:
        assert item.label is not None
        where = str(item.label)
        raw = codec.read_mask(item.label.read(), where, spec.colours)
    if raw.shape != size:
        raise DataError(
            f"{where}: the mask is {raw.shape[1]}x{raw.shape[0]}, its image {size[1]}x{size[0]} "
            "(width x height after EXIF orientation); the two must be equal"
        )
    try:
        return spec.encode(raw)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _tiles(height: int, width: int) -> list[tuple[int, int, int, int]]:
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


def build(
    name: str,
    splits: Mapping[str, Iterable[Item]],
    spec: LabelSpec,
    data_dir: str,
    totals: dict[str, int],
    encoding: str = "auto",
) -> None:
    """Writes `data_dir/name/VERSION`; an interrupted call leaves only an `incomplete` folder.

    Args:
      name: of the data set.
      splits: the items by split.
      spec: the label contract.
      data_dir: folder of all prepared data sets.
      totals: number of items by split.
      encoding: see `make_example`.
    """
    body = {"name": name, "__module__": __name__}  # TFDS wants a module it can import
    kind = type(name, (SegmentationBuilder,), body, skip_registration=True)
    tfds.disable_progress_bar()  # ours counts images
    builder = kind(
        splits=splits,
        spec=spec,
        totals=totals,
        encoding=encoding,
        data_dir=data_dir,
        file_format="array_record",
    )
    config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
    with tempfile.TemporaryDirectory() as unused:  # else TFDS leaves data_dir/downloads
        builder.download_and_prepare(download_dir=unused, download_config=config)
