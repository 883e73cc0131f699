"""Pictures that compress like photos, drawn: for benchmarks without a download."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import cv2
import numpy as np
from PIL import Image

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import prepare
from duc_dlc_jax.data.builders.files import File
from duc_dlc_jax.data.builders.sources import Item
from duc_dlc_jax.data.labels import IGNORE, label_spec

PHOTOS = {  # height, width in pixels and file format of the data sets that can be imitated
    "scenes": (192, 256, "png"),
    "camvid": (360, 480, "png"),
    "ade20k": (512, 683, "jpeg"),
    "pascal_context": (375, 500, "jpeg"),
    "cityscapes": (1024, 2048, "png"),
}


def photo(height: int, width: int, seed: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws what compresses like a photo: clouds on all scales, and sensor noise of 1.5 levels.

    A PNG of it takes 0.43 to 0.45 of the raw size (CamVid's take 0.49), a JPEG of quality 90 at
    512x683 takes 53 KB (one of ADE20K's: 53), a mask 0.02 to 0.04 (CamVid's: 0.03).

    Returns:
      RGB uint8 [height, width, 3] and train ids below `classes` in patches, uint8 [height, width].
    """
    rng = np.random.default_rng(seed)

    def clouds(cells: int, channels: int) -> np.ndarray:
        rows = max(cells * height // max(height, width), 1) + 1
        coarse = rng.normal(size=(rows, cells + 1, channels)).astype(np.float32)
        smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        return smooth.reshape(height, width, channels)

    image = np.full((height, width, 3), 128, np.float32)
    cells = 2
    while cells <= max(height, width) / 2:
        contrast = 60 / (cells / 2) ** 0.7
        image += contrast * (clouds(cells, 1) + 0.3 * clouds(cells, 3))
        cells *= 2
    image += rng.normal(0, 1.5, image.shape)
    levels = min(classes, 10)
    patches = np.clip(np.floor((clouds(4, 1)[..., 0] / 4 + 0.5) * levels), 0, levels - 1)
    label = (patches * (classes // levels)).astype(np.uint8)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), label


def prepare_photos(
    name: str,
    data_dir: pathlib.Path,
    count: int,
    size: tuple[int, int] | None = None,
    encoding: str = "auto",
) -> None:
    """Prepares `count` photos in the size and file format of the data set `name`.

    Args:
      name: one of `PHOTOS`; its label contract is used too.
      data_dir: folder that receives NAME/VERSION, and the JPEG files in `files`.
      count: number of images of the only split, train.
      size: (height, width) in pixels instead of the usual one.
      encoding: of the stored pixels, see `examples.make_example`.

    Raises:
      ConfigError: a name without photos; lists those there are.
    """
    if name not in PHOTOS:
        raise ConfigError(f"no photos imitate {name!r}; allowed: {', '.join(PHOTOS)}")
    height, width, kind = PHOTOS[name]
    spec = label_spec(name)
    raw = {train: raw for raw, train in spec.raw_to_train.items() if train != IGNORE}
    to_raw = np.array([raw[k] for k in range(spec.num_classes)], np.uint8)
    files = data_dir / "files"
    files.mkdir(parents=True, exist_ok=True)

    def items() -> Iterator[Item]:
        for i in range(count):
            image, label = photo(*(size or (height, width)), seed=i, classes=spec.num_classes)
            path = files / f"{i:05d}.jpg"
            if kind == "jpeg":
                Image.fromarray(image).save(path, quality=90)
            yield Item(f"{i:05d}", File(path) if kind == "jpeg" else image, to_raw[label])

    prepare.build(name, {"train": items()}, spec, data_dir, {"train": count}, encoding)
