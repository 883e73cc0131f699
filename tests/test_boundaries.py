"""Boundary IoU and F against their definitions, pixel by pixel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from duc_dlc_jax import boundaries
from duc_dlc_jax.data.labels import IGNORE


def region(mask, k, ignored, distance):
    """Pixels of class k from which a square of `distance` reaches out of the class or the image."""
    height, width = mask.shape
    result = np.zeros(mask.shape, bool)
    for y, x in np.argwhere((mask == k) & ~ignored):
        for dy, dx in itertools.product(range(-distance, distance + 1), repeat=2):
            v, u = y + dy, x + dx
            inside = 0 <= v < height and 0 <= u < width
            if not inside or (mask[v, u] != k and not ignored[v, u]):
                result[y, x] = True
    return result


def outline(mask, k, ignored):
    height, width = mask.shape
    result = np.zeros(mask.shape, bool)
    for y, x in np.argwhere((mask == k) & ~ignored):
        window = np.s_[max(y - 1, 0) : min(y + 2, height), max(x - 1, 0) : min(x + 2, width)]
        result[y, x] = ((mask[window] != k) & ~ignored[window]).any()
    return result


def near(points, others, distance):
    """How many points have one of the others at most `distance` pixels away."""
    a, b = np.argwhere(points), np.argwhere(others)
    if not len(b):
        return 0
    squares = ((a[:, None] - b[None]) ** 2).sum(-1)
    return int((squares.min(1, initial=10**9) <= distance**2).sum())


def random_masks(seed, classes=4, size=(24, 30)):
    rng = np.random.default_rng(seed)
    label = np.kron(rng.integers(0, classes, (4, 5)), np.ones((6, 6), int)).astype(np.uint8)
    prediction = np.roll(label, rng.integers(-3, 4, 2), (0, 1))
    prediction[rng.random(size) < 0.02] = classes - 1
    label[rng.random(size) < 0.05] = IGNORE
    label[:5, 20:] = IGNORE
    return label, prediction


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("share", "distance"), [(0.0, 1), (0.02, 1), (0.045, 2), (0.08, 3)])
def test_counts_equal_their_definition(seed, share, distance):
    """Of the diagonal, 38.4 pixels: 0, 0.77, 1.73, 3.07, rounded, at least 1."""
    label, prediction = random_masks(seed)
    ignored = label == IGNORE
    counted = boundaries.counts(label, prediction, 5, share)
    assert not counted[4].any()
    for k in range(4):
        inner = [region(mask, k, ignored, distance) for mask in (label, prediction)]
        lines = [outline(mask, k, ignored) for mask in (label, prediction)]
        expected = [
            (inner[0] & inner[1]).sum(),
            (inner[0] | inner[1]).sum(),
            lines[1].sum(),
            near(lines[1], lines[0], boundaries.F_WIDTH),
            lines[0].sum(),
            near(lines[0], lines[1], boundaries.F_WIDTH),
        ]
        np.testing.assert_array_equal(counted[k], expected, err_msg=f"class {k}")


def test_a_wide_class_moved_by_2_pixels_keeps_its_iou_and_loses_its_boundary():
    label = np.zeros((200, 200), np.uint8)
    label[:, 50:150] = 1
    moved = np.roll(label, 2, 1)
    result = boundaries.scores(boundaries.counts(label, moved, 2))
    iou = ((label == 1) & (moved == 1)).sum() / ((label == 1) | (moved == 1)).sum()
    assert iou > 0.95
    assert result["iou"][1] < 0.75
    assert result["f"][1] == 1  # within 3 pixels
    again = boundaries.scores(boundaries.counts(label, np.roll(label, 4, 1), 2))
    assert again["f"][1] == 0


def test_right_predictions_score_1_and_absent_classes_nothing():
    label, _ = random_masks(0)
    right = np.where(label == IGNORE, 0, label).astype(np.uint8)
    result = boundaries.scores(boundaries.counts(label, right, 6))
    np.testing.assert_array_equal(result["iou"], [1, 1, 1, 1, np.nan, np.nan])
    np.testing.assert_array_equal(result["f"], [1, 1, 1, 1, np.nan, np.nan])
    assert result["mean_iou"] == result["mean_f"] == 1
    assert "0.02 of the diagonal" in result["widths"]
    zero = boundaries.scores(boundaries.counts(label, right, 6, 0.005), 0.005, "zero")
    np.testing.assert_array_equal([zero["iou"], zero["f"]], [[1, 1, 1, 1, 0, 0]] * 2)
    assert zero["mean_iou"] == zero["mean_f"] == pytest.approx(4 / 6)
    assert "0.005 of the diagonal" in zero["widths"]


def test_a_class_that_is_only_predicted_scores_0():
    label, prediction = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    prediction[5:9, 5:9] = 1
    result = boundaries.scores(boundaries.counts(label, prediction, 2))
    assert result["iou"][1] == result["f"][1] == 0
