"""Boundary IoU (Cheng et al., 2021) and boundary F-score, per class, from counts over a data set.

Everything is counted in whole pixels and summed over images before any division. An ignored pixel
is in no region, and being next to one makes no boundary.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from duc_dlc_jax import metrics
from duc_dlc_jax.data.labels import IGNORE

IOU_WIDTH = 0.02  # of the image's diagonal: how far a mask's boundary region reaches inwards
F_WIDTH = 3  # pixels that two outlines may lie apart
COUNTS = 6  # per class: see `counts`
_OUTSIDE = 254  # beyond the image: neither a class nor ignored


def counts(
    label: np.ndarray, prediction: np.ndarray, classes: int, width: float = IOU_WIDTH
) -> np.ndarray:
    """label, prediction: train ids uint8 [H, W] -> int64 [classes, 6].

    width: of the boundary regions, a share of the image's diagonal.

    Columns: intersection and union of the boundary regions; pixels of the predicted outline, those
    of them at most F_WIDTH from the labelled outline; and the same the other way round.

    A boundary region holds the pixels of a mask from which a square of `distance` pixels to each
    side reaches out of the mask or of the image; this is the width, rounded, at least 1. An outline
    holds those with a neighbour, of 8, outside the mask; the image's border makes no outline.
    """
    ignored = label == IGNORE
    prediction = np.where(ignored, IGNORE, prediction)
    distance = max(round(width * float(np.hypot(*label.shape))), 1)
    masks = [np.pad(x, 1, constant_values=_OUTSIDE) for x in (label, prediction)]
    result = np.zeros((classes, COUNTS), np.int64)
    for k in np.union1d(np.unique(label), np.unique(prediction)):
        if k < classes:
            part = _around((masks[0] == k) | (masks[1] == k), distance + F_WIDTH)
            result[k] = _counts_of_class([mask[part] for mask in masks], k, distance)
    return result


def _counts_of_class(masks: list[np.ndarray], k: int, distance: int) -> list[int]:
    square, disc = np.ones((3, 3), np.uint8), _disc(F_WIDTH)
    regions, outlines = [], []
    for mask in masks:
        own = mask == k
        filled = (own | (mask == IGNORE)).astype(np.uint8)
        regions.append(own & (cv2.erode(filled, square, iterations=distance) == 0))
        beyond = filled | (mask == _OUTSIDE)
        outlines.append(own & (cv2.erode(beyond, square) == 0))
    labelled, predicted = outlines
    near_labelled, near_predicted = (cv2.dilate(x.astype(np.uint8), disc) > 0 for x in outlines)
    pairs = (predicted, predicted & near_labelled, labelled, labelled & near_predicted)
    both = regions[0] & regions[1], regions[0] | regions[1]
    return [int(np.count_nonzero(x)) for x in (*both, *pairs)]


def scores(counted: np.ndarray, width: float = IOU_WIDTH, absent: str = "skip") -> dict[str, Any]:
    """Counts int64 [K, 6] -> boundary IoU and F per class, their means over classes, the counts.

    F = 2 P R / (P + R) with P and R the shares of the predicted and of the labelled outline that
    the other one confirms; 0 where only one of the two exists. A class in neither labels nor
    predictions is NaN and in no mean, or 0 (absent="zero"). width: as of `counts`.
    """
    inner, union, predicted, confirmed, labelled, found = counted.T
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = inner / union
        precision, recall = np.nan_to_num(confirmed / predicted), np.nan_to_num(found / labelled)
        f = np.nan_to_num(2 * precision * recall / (precision + recall))
    f = np.where(predicted + labelled > 0, f, np.nan)
    if absent == "zero":  # of a class without an outline, which fills its images, F stays NaN
        iou, f = (np.where(union == 0, 0, values) for values in (iou, f))
    widths = f"boundary IoU: {width:g} of the diagonal; boundary F: {F_WIDTH} pixels"
    means = {"mean_iou": metrics.mean(iou), "mean_f": metrics.mean(f)}
    return {"widths": widths, "iou": iou, "f": f, **means, "counts": counted}


def _around(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """The part of an array, `margin` pixels wider on each side, that holds all of a mask."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return (
        slice(max(rows[0] - margin, 0), rows[-1] + margin + 1),
        slice(max(columns[0] - margin, 0), columns[-1] + margin + 1),
    )


def _disc(radius: int) -> np.ndarray:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)
