"""The few places of a split that a grid's report shows, chosen by a rule that knows no prediction.

Images: `COUNT` of the split's n, number (2 k + 1) n // (2 COUNT) for k = 0, 1, ...: the middles of
equal parts of its order. Crop of each: the square with the most outline pixels of the *label*, the
first one in row order where several have as many; its side is a third of the shortest side of the
chosen images. An outline pixel has another class right of it or below it; ignored pixels have none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from duc_dlc_jax import boundaries
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.data.records import Records

COUNT = 6


@dataclasses.dataclass(frozen=True)
class Crop:
    """A square of `side` pixels of the image that has this number in the split."""

    record: int
    name: str
    top: int
    left: int
    side: int

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Its part of a mask [H, W]."""
        return ids[self.top : self.top + self.side, self.left : self.left + self.side]


def choose(records: Records) -> list[Crop]:
    """The crops of a split by the rule; of fewer images than `COUNT`, one each."""
    count = min(COUNT, len(records))
    numbers = [(2 * k + 1) * len(records) // (2 * count) for k in range(count)]
    side = max(min(min(records.size(number)) for number in numbers) // 3, 1)
    crops = []
    for number in numbers:
        example = records[number]
        top, left = densest(outline(example["label"]), side)
        crops.append(Crop(number, example["name"], top, left, side))
    return crops


def outline(label: np.ndarray) -> np.ndarray:
    """Train ids uint8 [H, W] -> whether each is an outline pixel, bool [H, W]."""
    found = np.zeros(label.shape, bool)
    counted = label != IGNORE
    found[:, :-1] = (label[:, :-1] != label[:, 1:]) & counted[:, :-1] & counted[:, 1:]
    found[:-1] |= (label[:-1] != label[1:]) & counted[:-1] & counted[1:]
    return found


def densest(mask: np.ndarray, side: int) -> tuple[int, int]:
    """Top and left of the square of `side` pixels with the most pixels of a mask, bool [H, W]."""
    sums = cv2.integral(mask.astype(np.uint8))  # int32 [H + 1, W + 1]
    inside = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(np.argmax(inside), inside.shape)  # argmax: the first of equals
    return int(top), int(left)


def scored(crop: Crop, example: dict[str, Any], classes: int) -> dict[str, Any]:
    """The crop, and its boundary IoU as if it were the image: 2% of *its* diagonal wide.

    example: `label` and `prediction`, train ids uint8 [H, W]. The mean is over the classes in the
    crop's label or prediction; None where all of it is ignored.
    """
    masks = crop.of(example["label"]), crop.of(example["prediction"])
    mean = boundaries.scores(boundaries.counts(*masks, classes))["mean_iou"]
    return {**dataclasses.asdict(crop), "boundary_iou": None if np.isnan(mean) else round(mean, 6)}


def strip(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Crops of masks, uint8 [side, side] each -> side by side, uint8 [side, count x side]."""
    return np.concatenate(masks, axis=1)


def split(masks: np.ndarray) -> list[np.ndarray]:
    """What `strip` joined."""
    return np.split(masks, masks.shape[1] // masks.shape[0], axis=1)
