"""Evaluation protocols: how an image becomes the network's inputs, and these one labelling.

A protocol brings an image to one or several sizes, cuts each into windows (or one window: the whole
image), mirrors them or not, and averages what the network says about each of the label's pixels.
All of it is separable: along one axis of an image and one scale, `Axis` says which pixels a window
is made of and where in the windows' logits each label pixel reads, with which weight. These tables
are small, made here with NumPy in float64, and arguments of the compiled programs (`inference.py`),
which therefore do not depend on the image's size but on its padded size alone.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import ml_collections
import numpy as np

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import padding
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.models import registry
from duc_dlc_jax.padding import Size

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
PRESETS = {  # fields of config.eval; what is not named takes its default
    "single": {},
    "sliding": {"mode": "sliding"},
    "multi_scale": {"scales": SCALES, "flip": True},
    "multi_scale_cityscapes": {"scales": (*SCALES, 2.0, 2.25), "flip": True},
    "multi_scale_sliding": {"mode": "sliding", "scales": SCALES, "flip": True},
    "source_code": {
        "mode": "source_code",
        "scales": SCALES,
        "flip": True,
        "average": "exp_sum",
        "long_side": 520,
    },
}
PRESET_FIELDS = ("mode", "scales", "flip", "average", "long_side")


def select(
    config: ml_collections.ConfigDict, preset: str, changes: Sequence[str]
) -> ml_collections.ConfigDict:
    """A copy with config.eval of a preset ("": as it is) and then changes ("crop_size=713").

    Raises ConfigError for unknown fields and for values that they cannot have.
    """
    config, default = config.copy_and_resolve_references(), config_lib.default().eval
    if preset:
        config.eval.update({name: default[name] for name in PRESET_FIELDS} | PRESETS[preset])
    for change in changes:
        name, _, text = change.partition("=")
        config_lib.check_field_name(f"eval.{name}")
        try:
            value = text if isinstance(default[name], str) else ast.literal_eval(text)
            config.eval[name] = tuple(value) if isinstance(default[name], tuple) else value
        except (SyntaxError, TypeError, ValueError) as error:
            raise ConfigError(
                f"--set={change}: {text!r} is no value of eval.{name}, which is "
                f"{config.eval[name]!r} now"
            ) from error
    config_lib.validate(config)
    return config


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The fields of `config.eval` that decide a score, with the zeros resolved.

    `canvases` and `inputs` are padded sizes of images and of the network's inputs, by `planned`;
    like `pad_sides` they enter no result.
    """

    mode: str = "whole"
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    average: str = "softmax"
    crop_size: int = 480
    stride: int = 320
    long_side: int = 0
    pad_sides: tuple[int, ...] = ()
    grid: str = "corners"
    logit_stride: int = 8  # of the network's last grid, against its input
    canvases: tuple[Size, ...] = ()
    inputs: tuple[Size, ...] = ()

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict) -> Protocol:
        """Raises ConfigError for a window's stride beyond its size: pixels would go unread."""
        settings = config.eval
        crop = settings.crop_size or config.data.crop_size
        stride = settings.stride or 2 * crop // 3
        if not 0 < stride <= crop:
            raise ConfigError(
                f"eval.stride={settings.stride}; allowed: 1 to the window's size, {crop} "
                "(eval.crop_size), or 0 for two thirds of it"
            )
        return cls(
            settings.mode,
            tuple(settings.scales),
            settings.flip,
            settings.average,
            crop,
            stride,
            settings.long_side,
            tuple(sorted(settings.pad_sides)),
            config.model.resize_grid,
            registry.logit_stride(config.model.upsampling, config.model.output_stride),
        )

    def planned(self, sizes: Iterable[Size]) -> Protocol:
        """With padded sizes chosen so that at most 12 programs hold the network, for these images.

        Itself where no more are needed anyway. `pad_sides` go before planned canvases.
        """
        counts, plan = Counter(sizes), self
        if not self.pad_sides and len(counts) > padding.MOST_PROGRAMS:
            plan = dataclasses.replace(plan, canvases=padding.plan(counts, padding.MOST_PROGRAMS))
        needed: Counter[Size] = Counter()
        for size, images in counts.items():
            for scale in self.scales:
                needed[plan.window_size(plan.padded_size(size), scale)] += images
        if self.direct or len(needed) <= padding.MOST_PROGRAMS:
            return plan
        return dataclasses.replace(plan, inputs=padding.plan(needed, padding.MOST_PROGRAMS))

    @property
    def pads(self) -> bool:
        """Whether the network's inputs may be larger than what they show of an image."""
        return bool(self.pad_sides or self.canvases or self.inputs) or self.mode == "sliding"

    @property
    def direct(self) -> bool:
        """Whether an image is one input of the network, as it is."""
        return self.mode == "whole" and self.scales == (1.0,) and not (self.flip or self.long_side)

    def sentence(self) -> str:
        """The protocol in words, to stand beside every figure taken by it."""
        numbers = " ".join(f"{scale:g}" for scale in self.scales)
        scales = f"scale{'s' * (len(self.scales) > 1)} {numbers}"
        if self.scales == (1.0,):
            scales = "single scale"
        if self.long_side:
            scales += f" x {self.long_side} pixels on the long side"
        parts = [scales + " with left-right flips" * self.flip]
        if self.mode == "whole":
            parts.append("whole image at its own size" if self.direct else "whole image")
        else:
            parts.append(
                f"windows of {self.crop_size} pixels at stride {self.stride}"
                + (" padded with black" if self.mode == "source_code" else "")
                + ", overlaps averaged by count"
            )
        if self.average == "exp_sum":
            parts.append("exp of the " + ("summed logits of both flips" if self.flip else "logits"))
        elif not self.direct:
            parts.append("mean of the softmax")
        resized = "scores" if self.mode == "source_code" else "logits"
        return ", ".join([*parts, f"{resized} resized to the label"])

    def padded_size(self, size: Size) -> Size:
        """The size that programs are compiled for; the smallest of `pad_sides` on each side.

        A side beyond all of them goes up to a multiple of the largest. Without `pad_sides` the
        smallest canvas.
        """
        if not self.pad_sides:
            return padding.smallest(self.canvases, size)
        largest = self.pad_sides[-1]
        height, width = (
            min((s for s in self.pad_sides if s >= n), default=-(-n // largest) * largest)
            for n in size
        )
        return height, width

    def scaled_size(self, size: Size, scale: float) -> Size:
        """Height and width in pixels at a scale, rounded half up; with `long_side` of that size."""
        if not self.long_side:
            height, width = (max(int(n * scale + 0.5), 1) for n in size)
            return height, width
        long = math.ceil(self.long_side * scale)
        height, width = (max(int(n * long / max(size) + 0.5), 1) for n in size)
        return height, width

    def window_size(self, padded: Size, scale: float) -> Size:
        """Size of the network's inputs for images of one padded size at a scale."""
        if self.mode != "whole":
            return self.crop_size, self.crop_size
        return padding.smallest(self.inputs, self._largest(padded, scale))

    def window_counts(self, padded: Size, scale: float) -> Size:
        """Windows along height and width that an image of this padded size has at most."""
        height, width = (len(self.starts(n)) for n in self._largest(padded, scale))
        return height, width

    def _largest(self, padded, scale):
        if self.long_side and (self.pad_sides or self.canvases):  # landscape or portrait
            return (math.ceil(self.long_side * scale),) * 2
        return self.scaled_size(padded, scale)

    def starts(self, size: int) -> list[int]:
        """First pixels of the windows along an axis of `size` pixels.

        sliding: the last window is moved back to end with the image; source_code: it is not, and
        reaches beyond.
        """
        if self.mode == "whole" or size <= self.crop_size:
            return [0]
        count = -(-(size - self.crop_size) // self.stride) + 1
        starts = [i * self.stride for i in range(count)]
        return starts if self.mode == "source_code" else [*starts[:-1], size - self.crop_size]

    def extent(self, size: int) -> int:
        """Pixels of a window along an axis of `size` pixels that the network takes as image."""
        if self.mode == "whole":
            return size
        return self.crop_size if self.mode == "source_code" else min(self.crop_size, size)


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of an image of `size` pixels, scaled to `scaled` pixels.

    Positions are floats in pixels or cells; bilinear interpolation reads the two neighbours.
    """

    protocol: Protocol
    size: int
    scaled: int

    def has(self, window: int) -> bool:
        return window < len(self.protocol.starts(self.scaled))

    def sources(self, window: int, length: int, flip: bool) -> tuple[np.ndarray, np.ndarray]:
        """What the `length` pixels of a window are made of.

        Returns positions in the image, float [length], and which of them are the image's rather
        than padding, bool [length]; none is where the image lacks the window.
        """
        if not self.has(window):
            return np.zeros(length), np.zeros(length, bool)
        extent, index = self.protocol.extent(self.scaled), np.arange(length)
        start = self.protocol.starts(self.scaled)[window]
        pixel = start + (extent - 1 - index if flip else index)
        inside = (index < extent) & (pixel < self.scaled)
        pixel = np.clip(pixel, 0, self.scaled - 1)
        return _moved(pixel, self.scaled, self.size, self.protocol.grid), inside

    def reads(self, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the label's pixels read the logits of the windows, and with which weight.

        count: windows to list, those that this image lacks have weight 0; length: of the padded
        label, pixels beyond the label have weight 0.

        Returns positions on the logits' grid, float [count, flips, points, length], and weights,
        float [count, points, length], which sum to 1 over windows and points. A label pixel reads
        one point, at its place in the scaled image; with the source code's protocol two, the scaled
        image's pixels on either side, whose scores are then interpolated.
        """
        protocol, label = self.protocol, np.minimum(np.arange(length), self.size - 1)
        place = _moved(label, self.size, self.scaled, protocol.grid)
        points, shares = place[None], np.ones((1, length))
        if protocol.mode == "source_code":
            low = np.minimum(np.floor(place), max(self.scaled - 2, 0))
            points = np.stack([low, np.minimum(low + 1, self.scaled - 1)])
            shares = np.stack([1 - (place - low), place - low])
        extent, starts = protocol.extent(self.scaled), protocol.starts(self.scaled)
        offset = points[None] - np.asarray(starts)[:, None, None]
        inside = (offset >= 0) & (offset < extent)
        weights = shares[None] * inside / inside.sum(0) * (np.arange(length) < self.size)
        offset = np.clip(offset, 0, extent - 1)
        sides = [offset, extent - 1 - offset] if protocol.flip else [offset]
        cells = -(-extent // protocol.logit_stride)
        if protocol.grid == "corners":
            positions = np.stack(sides, 1) * (cells - 1) / max(extent - 1, 1)
        elif protocol.grid == "half_pixel":
            positions = np.clip((np.stack(sides, 1) + 0.5) * cells / extent - 0.5, 0, cells - 1)
        else:
            positions = np.minimum(np.stack(sides, 1) / protocol.logit_stride, cells - 1)
        absent = [(0, count - len(starts))]
        return (
            np.pad(positions, absent + [(0, 0)] * 3),
            np.pad(weights, absent + [(0, 0)] * 2),
        )


def _moved(pixel: np.ndarray, size_in: int, size_out: int, grid: str) -> np.ndarray:
    """Pixels of an axis of size_in pixels -> their places on the same axis of size_out pixels."""
    if grid == "corners":
        return pixel * (size_out - 1) / max(size_in - 1, 1)
    if grid == "half_pixel":
        return np.clip((pixel + 0.5) * size_out / size_in - 0.5, 0, size_out - 1)
    return np.minimum(pixel * size_out / size_in, size_out - 1)
