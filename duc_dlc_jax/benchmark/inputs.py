"""Crops per second and core: the input pipeline beside PyTorch's DataLoader on the same images.

All sides draw the same distribution of scale, flip and position and keep one worker process. What
counts is the CPU time of it and of the process that takes the batches, hence the whole cost of a
crop: reading (from the page cache), decoding, augmenting, stacking, and the way to the trainer. A
core that does nothing else makes as many crops per second.

PyTorch's side does what is usual: decode the image file, resize the whole image and mask with
OpenCV, flip, pad, cut. It hands over uint8 as the pipeline does (`dataloader`), or float32 as most
code bases do, FastFCN among them (`normalised`); here the accelerator does that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import multiprocessing
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import ml_collections
import numpy as np
from PIL import Image

from duc_dlc_jax import provenance
from duc_dlc_jax.data import pipeline, transforms
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.data.records import Records, open_records
from duc_dlc_jax.data.transforms import Augmentation

IMAGES = 48  # of a data set, that both sides read; fits the page cache
MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
WARM_UP = 4  # batches before the clock starts: more than the workers keep ready


def compare(config: ml_collections.ConfigDict, rounds: int, seconds: float) -> dict[str, Any]:
    """Crops per CPU second on `config`'s prepared data, in alternating rounds of each side.

    `data.in_memory` is off, workers and threads are 1; the first `IMAGES` images take part.
    "ratio" has the pipeline's rate over PyTorch's two; without PyTorch it is empty.
    """
    data, batch_size = config.data.copy_and_resolve_references(), config.train.batch_size
    data.update({"in_memory": False, "workers": 1, "threads": 1, "prefetch": 2})
    records = _First(open_records(data, data.train_split))
    sides: dict[str, Callable[[], Iterator]] = {
        "pipeline": lambda: pipeline.train_iterator(
            data, records, seed=config.seed, batch_size=batch_size, steps=2**24
        )
    }
    with tempfile.TemporaryDirectory() as folder, one_core():
        if importlib.util.find_spec("torch"):
            files = write_files(records, pathlib.Path(folder))
            images = WholeImages(files, Augmentation.from_config(data))
            normalised = dataclasses.replace(images, normalise=True)
            sides["dataloader"] = lambda: _data_loader(images, batch_size)
            sides["normalised"] = lambda: _data_loader(normalised, batch_size)
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, start in sides.items():
                rates[side].append(crops_per_second(start(), seconds))
    medians = {side: statistics.median(values) for side, values in rates.items()}
    sizes = sorted({records.size(i) for i in range(len(records))})
    return {
        "data": data.name,
        "images": len(records),
        "smallest": sizes[0],
        "largest": sizes[-1],
        "crop": [data.crop_size, data.crop_width or data.crop_size],
        "base_size": data.base_size,
        "batch_size": batch_size,
        "crops_per_second": medians,
        "rounds": rates,
        "ratio": {s: medians["pipeline"] / medians[s] for s in medians if s != "pipeline"},
    }


class _First(Records):
    """The first images of a split."""

    def __init__(self, records: Records):
        super().__init__(records.folder, records.split, records.in_memory)

    def __len__(self) -> int:
        return min(super().__len__(), IMAGES)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keeps this thread, and the threads and processes it starts, on one core where Linux can."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def crops_per_second(batches: Iterator, seconds: float) -> float:
    """Crops per second of CPU time, during `seconds` after the warm-up; ends the iterator."""
    with contextlib.ExitStack() as stack:
        stack.callback(getattr(batches, "close", lambda: None))
        for _ in range(WARM_UP):
            next(batches)
        end, used, crops = time.perf_counter() + seconds, cpu_seconds(), 0
        while crops == 0 or time.perf_counter() < end:
            crops += len(next(batches)["image"])
        return crops / (cpu_seconds() - used)


def cpu_seconds() -> float:
    """CPU time of this process and its worker processes so far; without /proc, wall time."""
    pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
    try:
        stats = [pathlib.Path(f"/proc/{pid}/stat").read_text() for pid in pids]
    except OSError:
        return time.perf_counter()
    ticks = [stat.rpartition(")")[2].split()[11:13] for stat in stats]  # utime, stime
    return sum(int(t) for pair in ticks for t in pair) / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class WholeImages:
    """PyTorch's side: a map-style data set of endless random crops, index i from file i modulo n.

    Attributes:
      files: (image, mask) paths; masks are 8-bit PNGs of train ids.
      augmentation: its scale, flip and position are used, nothing else of it.
      normalise: image float32 [3, C, C], standardised, instead of uint8 [C, C, 3].
    """

    files: list[tuple[str, str]]
    augmentation: Augmentation
    normalise: bool = False

    def __len__(self) -> int:
        return 2**24

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        config, rng = self.augmentation, np.random.default_rng(index)
        image_file, label_file = self.files[index % len(self.files)]
        image = cv2.imread(image_file, cv2.IMREAD_COLOR_RGB)
        label = cv2.imread(label_file, cv2.IMREAD_GRAYSCALE)
        assert image is not None
        assert label is not None
        drawn = transforms.draw_geometry(rng, label.shape, config)
        size = (drawn.width, drawn.height)
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
        if drawn.flipped:
            axis = 1 if config.flip == "left_right" else 0
            image, label = cv2.flip(image, axis), cv2.flip(label, axis)
        rows, columns = config.crop
        below, right = max(rows - drawn.height, 0), max(columns - drawn.width, 0)
        if below or right:
            pad = (0, below, 0, right, cv2.BORDER_CONSTANT)
            image = cv2.copyMakeBorder(image, *pad, value=(0, 0, 0))
            label = cv2.copyMakeBorder(label, *pad, value=IGNORE)
        window = np.s_[drawn.top : drawn.top + rows, drawn.left : drawn.left + columns]
        image, label = image[window], label[window]
        if self.normalise:
            image = (image.transpose(2, 0, 1) / np.float32(255) - MEAN) / STD
        return {"image": image, "label": label}


def _data_loader(images: WholeImages, batch_size: int) -> Iterator[dict[str, Any]]:
    data = importlib.import_module("torch.utils.data")
    loader = data.DataLoader(
        images,
        batch_size,
        sampler=data.RandomSampler(images, replacement=True, num_samples=len(images)),
        num_workers=1,
        prefetch_factor=2,
        worker_init_fn=_one_thread,
        multiprocessing_context="spawn",  # forking is not safe beside JAX
    )
    return iter(loader)


def _one_thread(worker: int) -> None:
    del worker
    cv2.setNumThreads(0)


def write_files(records: Records, folder: pathlib.Path) -> list[tuple[str, str]]:
    """Writes (image, mask) files as they were downloaded, or their equals: returns their paths.

    Stored JPEG and PNG files come out as they are. Pixels become PNGs by Pillow, which for
    CamVid's gives the original's very bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i in range(len(records)):
        tiles, example = records.tiles(i), records[i]
        stored = tiles[0]["encoding"].decode()
        as_is = len(tiles) == 1 and stored != "raw"
        image = folder / f"{i:05d}.{stored if as_is else 'png'}"
        if as_is:
            image.write_bytes(tiles[0]["image"])
        else:
            Image.fromarray(example["image"]).save(image)
        label = folder / f"{i:05d}_label.png"
        Image.fromarray(example["label"]).save(label)
        written.append((str(image), str(label)))
    return written


def machine() -> dict[str, Any]:
    """What figures hold for: processor, cores, load over the last minute, versions."""
    versions = {"python": platform.python_version()}
    for name in ("numpy", "opencv-python-headless", "pillow", "grain", "array-record", "torch"):
        if version := provenance.version(name):
            versions[name] = version
    load = round(os.getloadavg()[0], 2)
    cpu, cores = provenance.cpu(), os.cpu_count()
    return {"cpu": cpu, "cores": cores, "load_average": load, "versions": versions}


def show(result: dict[str, Any]) -> None:
    sizes = "{smallest[1]}x{smallest[0]}".format(**result)
    if result["largest"] != result["smallest"]:
        sizes += " to {largest[1]}x{largest[0]}".format(**result)
    crop = "x".join(map(str, result["crop"]))
    print(f"{result['images']} images of {sizes}, crops of {crop}, per second of one core")
    titles = {
        "pipeline": "this pipeline",
        "dataloader": "PyTorch's DataLoader",
        "normalised": "... with float32 batches",
    }
    for side, rate in result["crops_per_second"].items():
        ratio = result["ratio"].get(side)
        print(f"{titles[side]:25s}{rate:8.1f} crops/s" + (f"  ratio {ratio:.2f}" if ratio else ""))
    if not result["ratio"]:
        print("PyTorch is not installed: no comparison (pip install torch)")
