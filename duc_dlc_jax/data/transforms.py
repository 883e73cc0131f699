"""Training augmentation after FastFCN, on the pixels of the crop only.

The order is the code base's: flip, short side to a random size, (rotation), padding on the right
and bottom, random crop, (blur), (colour). Instead of resizing the whole image, each pixel of the
crop is traced back to the source and sampled there: the same pixels, and only the part of the
source that they come from is read.

Coordinates are pixel edges: pixel i covers [i, i + 1) and output pixel i of a resize from n to m
pixels has its centre at (i + 0.5) n / m. The image is interpolated around that point (OpenCV's
INTER_LINEAR); the mask takes the source pixel that contains it. OpenCV's INTER_NEAREST would
shift the mask by up to half a pixel against the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import IGNORE

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
    photometric_probability: float = 0.0
    crop_width: int = 0

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of the crops in pixels."""
        return self.crop_size, self.crop_width or self.crop_size

    @classmethod
    def from_config(cls, data: Any) -> Augmentation:
        """Reads `config.data`; raises ConfigError for values that make no crop."""
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls)})

    def __post_init__(self):
        if self.flip not in FLIPS:
            raise ConfigError(f"data.flip = {self.flip!r}; allowed: {', '.join(FLIPS)}")
        if self.crop_size < 1 or not 1 <= self.sizes()[0] <= self.sizes()[1]:
            raise ConfigError(
                f"data.crop_size = {self.crop_size} must be at least 1, and the short side "
                f"{self.base_size} x [{self.scale_min}, {self.scale_max}] must span 1 pixel or more"
            )
        for name in ("blur_probability", "photometric_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name} = {getattr(self, name)}; allowed: 0..1")

    def sizes(self) -> tuple[int, int]:
        """Returns the smallest and largest short side, pixels."""
        return int(self.base_size * self.scale_min), int(self.base_size * self.scale_max)


@dataclasses.dataclass(frozen=True)
class Colour:
    """One drawn photometric distortion, in this order; the defaults change nothing."""

    brightness: float = 0.0  # added grey levels
    contrast: float = 1.0  # factor of all channels
    saturation: float = 1.0  # factor, in HSV
    hue: float = 0.0  # added degrees


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
    colour: Colour | None = None


def draw_geometry(
    rng: np.random.Generator,
    shape: tuple,
    config: Augmentation,
    focus: tuple[int, int] | None = None,
) -> Geometry:
    """Draws a crop of a source of shape (H, W, ...); with `focus` one that holds the pixel (y, x).

    (Under rotation the pixel may still turn out of a corner.)
    """
    flipped = bool(rng.random() < 0.5) and config.flip != "none"
    low, high = config.sizes()
    height, width = resized_shape(shape, int(rng.integers(low, high + 1)))
    tops, lefts = (max(n - c, 0) for n, c in zip((height, width), config.crop, strict=True))
    rows, columns = (0, tops), (0, lefts)
    if focus is not None:
        y, x = (focus[0] + 0.5) * height / shape[0], (focus[1] + 0.5) * width / shape[1]
        if flipped:
            y, x = (y, width - x) if config.flip == "left_right" else (height - y, x)
        rows, columns = (
            (max(int(p) - size + 1, 0), min(int(p), limit))
            for p, limit, size in zip((y, x), (tops, lefts), config.crop, strict=True)
        )
    top = int(rng.integers(rows[0], rows[1] + 1))
    left = int(rng.integers(columns[0], columns[1] + 1))
    degrees = float(rng.uniform(-1, 1)) * config.rotate_degrees
    radius = float(rng.uniform(0, 1))
    blur = radius if rng.random() < config.blur_probability else 0.0
    colour = None
    if config.photometric_probability:
        colour = draw_colour(rng, config.photometric_probability)
    return Geometry(height, width, top, left, flipped, degrees, blur, colour)


def draw_colour(rng: np.random.Generator, probability: float) -> Colour:
    """Draws each distortion with `probability`, in the ranges of SSD (Liu et al., 2016)."""
    ranges = {
        "brightness": (-32, 32),
        "contrast": (0.5, 1.5),
        "saturation": (0.5, 1.5),
        "hue": (-36, 36),
    }
    drawn = {name: float(rng.uniform(*limits)) for name, limits in ranges.items()}
    return Colour(**{name: drawn[name] for name in ranges if rng.random() < probability})


def resized_shape(shape: tuple, short: int) -> tuple[int, int]:
    """Returns (height, width) with the short side at `short` pixels and the aspect ratio kept."""
    height, width = shape[:2]
    if height > width:
        return max(int(height * short / width), 1), short
    return short, max(int(width * short / height), 1)


Read = Callable[[tuple[int, int, int, int]], tuple[np.ndarray, np.ndarray]]


def train_transform(
    read: Read,
    shape: tuple[int, int],
    rng: np.random.Generator,
    config: Augmentation,
    focus: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts a random training crop; equal generators give equal crops.

    Args:
      read: (top, left, bottom, right) in pixels -> that part of the image, RGB uint8 [h, w, 3],
        and of the label, train ids uint8 [h, w].
      shape: (H, W) of the whole.
      rng: the only source of randomness.
      config: (C, D) = config.crop.
      focus: (y, x) of a pixel that the crop shall hold.

    Returns:
      Image uint8 [C, D, 3], black where padded; label uint8 [C, D], 255 where padded; and height
      and width of the unpadded part, int32 [2].
    """
    geometry = draw_geometry(rng, shape, config, focus)
    valid = np.minimum((geometry.height, geometry.width), config.crop).astype(np.int32)
    return *cut(read, shape, geometry, config), valid


def cut(
    read: Read, shape: tuple[int, int], geometry: Geometry, config: Augmentation
) -> tuple[np.ndarray, np.ndarray]:
    """Samples one crop; image and label as in `train_transform`."""
    flip = config.flip if geometry.flipped else "none"
    x, y = source_points(shape, geometry, config.crop, flip)
    shrink = shrinks(shape, geometry, config)
    reach = 3 * shape[0] / geometry.height if shrink else 1  # of the filter, source pixels
    box = _bounds(x, y, shape, reach)
    image, label = read(box)
    inside = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])
    crop_label = sample_label(label, x - box[1], y - box[0])
    if shrink:
        x, y = x * geometry.width / shape[1], y * geometry.height / shape[0]
        image, box = _shrink(image, box, shape, geometry, _bounds(x, y, _resized(geometry), 1))
    crop = sample_image(image, x - box[1], y - box[0], inside)
    if geometry.blur > 0:
        crop = cv2.GaussianBlur(crop, (0, 0), max(geometry.blur, 0.05))
    if geometry.colour is not None:
        crop = _blacken(distort(crop, geometry.colour), inside)
    return crop, crop_label


def shrinks(shape: tuple[int, int], geometry: Geometry, config: Augmentation) -> bool:
    """Whether a crop of a source of shape (H, W) is low-passed."""
    return config.antialias and geometry.height < shape[0]


def _bounds(x: np.ndarray, y: np.ndarray, shape: tuple, reach: float) -> tuple[int, int, int, int]:
    """Returns (top, left, bottom, right) of the source pixels within `reach` of the points."""
    edges = []
    for points, size in ((y, shape[0]), (x, shape[1])):
        low = min(max(int(np.floor(points.min() - reach)), 0), size - 1)
        high = max(min(int(np.ceil(points.max() + reach)), size), low + 1)
        edges.append((low, high))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right


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
    column, row = np.clip(column, 0, width - 1), np.clip(row, 0, height - 1)
    if len(column) == 1 and row.shape[1] == 1:  # no rotation: columns, then whole rows, are fast
        ids = label.take(column[0], 1).take(row[:, 0], 0)
    else:
        ids = label[row, column]
    return ids if inside.all() else np.where(inside, ids, np.uint8(IGNORE))


def sample_image(image: np.ndarray, x: np.ndarray, y: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Interpolates each point between its four source pixels; black where not `inside`.

    x and y in pixel edges of `image`, uint8 [H, W, 3]. Returns uint8 [h, w, 3].
    """
    columns, rows = (x - 0.5).astype(np.float32), (y - 0.5).astype(np.float32)
    columns, rows, inside = np.broadcast_arrays(columns, rows, inside)
    if inside.all():
        return _interpolate(image, columns, rows)
    crop = np.zeros((*inside.shape, 3), np.uint8)
    down, across = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    if len(down):
        part = np.s_[down[0] : down[-1] + 1, across[0] : across[-1] + 1]
        pixels = _interpolate(image, columns[part], rows[part])
        crop[part] = _blacken(pixels, inside[part])
    return crop


def _interpolate(image: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`cv2.remap` of RGB uint8 [H, W, 3], which takes half the time with four channels."""
    rgba = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
    rgba = cv2.remap(rgba, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)


def _blacken(crop: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Returns uint8 [h, w, 3], black where `inside`, bool [h, w], is false."""
    return crop if inside.all() else cv2.copyTo(crop, inside.view(np.uint8))


def distort(image: np.ndarray, colour: Colour) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue of RGB uint8 [h, w, 3]."""
    table = (np.arange(256) + colour.brightness) * colour.contrast
    image = cv2.LUT(image, np.clip(np.rint(table), 0, 255).astype(np.uint8))
    if (colour.saturation, colour.hue) == (1.0, 0.0):
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)  # hue in steps of 2 degrees
    levels = np.arange(256)
    tables = (
        (levels + round(colour.hue / 2)) % 180,
        np.clip(np.rint(levels * colour.saturation), 0, 255),
        levels,
    )
    hsv = cv2.LUT(hsv, np.stack(tables, axis=-1)[None].astype(np.uint8))
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _resized(geometry: Geometry) -> tuple[int, int]:
    return geometry.height, geometry.width


def _shrink(
    image: np.ndarray, box: tuple, shape: tuple, geometry: Geometry, wanted: tuple
) -> tuple[np.ndarray, tuple]:
    """Resizes with Pillow's low-pass, the code base's own operation, the part that is wanted.

    Args:
      image: the part `box` (top, left, bottom, right) of a source of shape (H, W).
      geometry: the size after resizing.
      wanted: (top, left, bottom, right) of the resized image.

    Returns:
      That part of the resized image, and `wanted`.
    """
    down, right = shape[0] / geometry.height, shape[1] / geometry.width
    edges = (
        max(wanted[1] * right - box[1], 0),
        max(wanted[0] * down - box[0], 0),
        min(wanted[3] * right - box[1], image.shape[1]),
        min(wanted[2] * down - box[0], image.shape[0]),
    )
    size = (wanted[3] - wanted[1], wanted[2] - wanted[0])
    small = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, box=edges)
    return np.asarray(small), wanted
