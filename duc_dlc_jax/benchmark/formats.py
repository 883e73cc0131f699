"""What storing an image of Cityscapes' size costs: bytes, and crops per CPU second."""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np

from duc_dlc_jax.benchmark.inputs import one_core, write_files
from duc_dlc_jax.data import codec, photos
from duc_dlc_jax.data.records import Box, Records, open_records
from duc_dlc_jax.data.transforms import Augmentation, train_transform

TILES = ("raw", "png", "jpeg")


def compare(
    config: ml_collections.ConfigDict,
    rounds: int,
    seconds: float,
    count: int = 8,
    size: tuple[int, int] | None = None,
) -> dict[str, dict[str, float]]:
    """Stores the same `count` drawn photos in each format and cuts `config`'s crops from them.

    One thread, in alternating rounds, without the hand-over to a trainer.

    Args:
      config: its data.crop_size, base_size and so on are used.
      rounds: of each format; their median counts.
      seconds: of a round, CPU time.
      count: number of photos.
      size: (height, width) in pixels instead of 1024x2048.

    Returns:
      By format: bytes of an image with its mask, their share of the raw pixels, and crops/s.
    """
    data = config.data.copy_and_resolve_references()
    data.update({"name": "cityscapes", "in_memory": False})
    augmentation = Augmentation.from_config(data)
    with tempfile.TemporaryDirectory() as name, one_core():
        folder, stored = pathlib.Path(name), {}
        for encoding in TILES:
            photos.prepare_photos("cityscapes", folder / encoding, count, size, encoding)
            data.dir = str(folder / encoding)
            records = open_records(data, "train")
            paths = list(records.folder.glob("*.array_record*"))
            stored[f"{encoding} tiles"] = (paths, _cutter(records, records.region, augmentation))
        data.dir = str(folder / "raw")
        records = open_records(data, "train")
        files = write_files(records, folder / "files")
        paths = [pathlib.Path(path) for pair in files for path in pair]
        stored["whole png"] = (paths, _cutter(records, _whole(files), augmentation))
        raw = 4 * sum(int(np.prod(records.size(i))) for i in range(count))
        rates: dict[str, list[float]] = {name: [] for name in stored}
        for _ in range(rounds):
            for name, (_, cut) in stored.items():
                rates[name].append(_rate(cut, seconds))
        sizes = {name: sum(p.stat().st_size for p in paths) for name, (paths, _) in stored.items()}
    return {
        name: {
            "bytes_per_image": sizes[name] / count,
            "share_of_raw": sizes[name] / raw,
            "crops_per_second": statistics.median(rates[name]),
        }
        for name in stored
    }


Region = Callable[[int, Box], dict[str, Any]]


def _cutter(records: Records, region: Region, augmentation: Augmentation) -> Callable[[int], Any]:
    """Returns a function that cuts the n-th crop of an endless stream."""

    def cut(number: int):
        record = number % len(records)

        def read(box: Box):
            example = region(record, box)
            return example["image"], example["label"]

        rng = np.random.default_rng(number)
        return train_transform(read, records.size(record), rng, augmentation)

    return cut


def _whole(files: list[tuple[str, str]]) -> Region:
    def region(record: int, box: Box) -> dict[str, Any]:
        image_file, label_file = map(pathlib.Path, files[record])
        top, left, bottom, right = box
        window = np.s_[top:bottom, left:right]
        image = codec.decode_image(image_file.read_bytes(), str(image_file))
        label = codec.read_mask(label_file.read_bytes(), str(label_file))
        return {"image": image[window], "label": label[window]}

    return region


def _rate(cut: Callable[[int], Any], seconds: float) -> float:
    """Crops per second of CPU time, after one that does not count."""
    cut(0)
    start, crops = time.process_time(), 0
    while crops == 0 or time.process_time() < start + seconds:
        crops += 1
        cut(crops)
    return crops / (time.process_time() - start)


def show(formats: dict[str, dict[str, float]]) -> None:
    print(f"{'stored as':12s}{'KB an image':>14s}{'of raw':>9s}{'crops/s':>10s}")
    for name, row in formats.items():
        size, share, rate = row.values()
        print(f"{name:12s}{size / 1000:14,.0f}{share:9.2f}{rate:10.1f}")
