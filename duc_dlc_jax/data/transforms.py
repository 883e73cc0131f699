"""Training augmentation after FastFCN, on the pixels of the crop only.

The order is the code base's: flip, short side to a random size, (rotation), padding on the right
and bottom, random crop, (blur). Instead of resizing the whole image, each pixel of the crop is
traced back to the source and sampled there: the same pixels, and the cost of the crop alone.

Coordinates are pixel edges: pixel i covers [i, i + 1) and output pixel i of a resize from n to m
pixels has its centre at (i + 0.5) n / m. The image is interpolated around that point (OpenCV's
INTER_LINEAR); the mask takes the source pixel that contains it. OpenCV's INTER_NEAREST would
shift the mask by up to half a pixel against the image.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import cv2
import numpy as np
from PIL import Image

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import IGNORE, DataError

FLIPS = ("left_right", "up_down", "none")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The fields of `config.data` that shape a training crop; units are given there."""

    base_size: int
    crop_size: int
    scale_min: float
    scale_max: float
    flip: str
    antialias: bool
    blur_probability: float
    rotate_degrees: float

    @classmethod
    def from_config(cls, data: Any) -> Augmentation:
        """Reads `config.data`; raises ValueError for values that make no crop."""
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls)})

    def __post_init__(self):
        if self.flip not in FLIPS:
            raise ConfigError(f"data.flip = {self.flip!r}; allowed: {', '.join(FLIPS)}")
        if self.crop_size < 1 or not 1 <= self.sizes()[0] <= self.sizes()[1]:
            raise ConfigError(
                f"data.crop_size = {self.crop_size} must be at least 1, and the short side "
                f"{self.base_size} x [{self.scale_min}, {self.scale_max}] must span 1 pixel or more"
            )
        if not 0 <= self.blur_probability <= 1:
            raise ConfigError(f"data.blur_probability = {self.blur_probability}; allowed: 0..1")

    def sizes(self) -> tuple[int, int]:
        """Returns the smallest and largest short side, pixels."""
        return int(self.base_size * self.scale_min), int(self.base_size * self.scale_max)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """One drawn crop: resize to (height, width), flip, rotate, cut at (top, left); pixels."""

    height: int
    width: int
    top: int
    left: int
    flipped: bool = False
    degrees: float = 0.0  # about the centre of the resized image
    blur: float = 0.0  # standard deviation in pixels


def draw_geometry(rng: np.random.Generator, shape: tuple, config: Augmentation) -> Geometry:
    """Draws a crop of a source of shape (H, W, ...)."""
    flipped = bool(rng.random() < 0.5) and config.flip != "none"
    low, high = config.sizes()
    height, width = resized_shape(shape, int(rng.integers(low, high + 1)))
    top = int(rng.integers(0, max(height - config.crop_size, 0) + 1))
    left = int(rng.integers(0, max(width - config.crop_size, 0) + 1))
    degrees = float(rng.uniform(-1, 1)) * config.rotate_degrees
    radius = float(rng.uniform(0, 1))
    blur = radius if rng.random() < config.blur_probability else 0.0
    return Geometry(height, width, top, left, flipped, degrees, blur)


def resized_shape(shape: tuple, short: int) -> tuple[int, int]:
    """Returns (height, width) with the short side at `short` pixels and the aspect ratio kept."""
    height, width = shape[:2]
    if height > width:
        return max(int(height * short / width), 1), short
    return short, max(int(width * short / height), 1)


def train_transform(
    image: np.ndarray, label: np.ndarray, rng: np.random.Generator, config: Augmentation
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a random training crop; equal generators give equal crops.

    Args:
      image: RGB uint8 [H, W, 3].
      label: train ids uint8 [H, W].
      rng: the only source of randomness.
      config: C = config.crop_size.

    Returns:
      Image uint8 [C, C, 3], black where padded, and label uint8 [C, C], 255 where padded.

    Raises:
      DataError: image and label differ in size; gives both.
    """
    if image.shape[:2] != label.shape:
        raise DataError(f"image {image.shape[:2]} and label {label.shape} (H, W) differ in size")
    geometry = draw_geometry(rng, image.shape, config)
    return cut(image, label, geometry, config)


def cut(
    image: np.ndarray, label: np.ndarray, geometry: Geometry, config: Augmentation
) -> tuple[np.ndarray, np.ndarray]:
    """Samples one crop; shapes as in `train_transform`."""
    flip = config.flip if geometry.flipped else "none"
    size = (config.crop_size, config.crop_size)
    x, y = source_points(label.shape, geometry, size, flip)
    crop_label = sample_label(label, x, y)
    if config.antialias and geometry.height < image.shape[0]:
        image = _shrink(image, geometry.height, geometry.width)
        x, y = source_points(image.shape, geometry, size, flip)
    crop = sample_image(image, x, y)
    if geometry.blur > 0:
        crop = cv2.GaussianBlur(crop, (0, 0), max(geometry.blur, 0.05))
    return crop, crop_label


def source_points(
    shape: tuple, geometry: Geometry, size: tuple[int, int], flip: str
) -> tuple[np.ndarray, np.ndarray]:
    """Traces the pixel centres of a crop back to the source.

    Args:
      shape: (H, W, ...) of the source.
      geometry: the crop.
      size: (h, w) of the crop, pixels.
      flip: left_right, up_down or none.

    Returns:
      x and y in source pixel edges, float64, broadcastable to [h, w].
    """
    x = geometry.left + np.arange(size[1])[None, :] + 0.5
    y = geometry.top + np.arange(size[0])[:, None] + 0.5
    if geometry.degrees:
        cos, sin = np.cos(np.deg2rad(geometry.degrees)), np.sin(np.deg2rad(geometry.degrees))
        dx, dy = x - geometry.width / 2, y - geometry.height / 2
        x = geometry.width / 2 + cos * dx + sin * dy
        y = geometry.height / 2 - sin * dx + cos * dy
    if flip == "left_right":
        x = geometry.width - x
    elif flip == "up_down":
        y = geometry.height - y
    return x * shape[1] / geometry.width, y * shape[0] / geometry.height


def sample_label(label: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Takes the source pixel that contains each point; `IGNORE` outside. uint8 [h, w]."""
    height, width = label.shape
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    ids = label[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
    return np.where(inside, ids, np.uint8(IGNORE))


def sample_image(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolates each point between its four source pixels; black outside. uint8 [h, w, 3]."""
    height, width = image.shape[:2]
    x, y = np.broadcast_arrays(x, y)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    columns, rows = (x - 0.5).astype(np.float32), (y - 0.5).astype(np.float32)
    crop = cv2.remap(image, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    crop[~inside] = 0
    return crop


def _shrink(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes with Pillow's low-pass, the code base's own operation."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
