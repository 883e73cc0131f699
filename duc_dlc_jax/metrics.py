"""Pixel accuracy, mean IoU and relatives (eq. 7 to 9) from one integer confusion matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from duc_dlc_jax.data.labels import IGNORE


def confusion_matrix(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    """labels, predictions: integer, same shape -> int32 [K, K], rows = label, columns = prediction.

    Ignored pixels are not counted. int32 holds 1,023 images of 1024x2048: sum matrices in int64.
    """
    labels, predictions = labels.reshape(-1), predictions.reshape(-1)
    index = labels.astype(jnp.int32) * num_classes + predictions.astype(jnp.int32)
    cells = num_classes * num_classes
    index = jnp.where(labels == IGNORE, cells, index)
    counts = jnp.zeros(cells + 1, jnp.int32).at[index].add(1)
    return counts[:cells].reshape(num_classes, num_classes)


def scores(matrix: np.ndarray, absent: str = "skip") -> dict[str, float | np.ndarray]:
    """Confusion matrix int64 [K, K] -> PA, mPA, mIoU, Final Score and per-class figures.

    A class in neither labels nor predictions has IoU NaN and is left out of the means
    (`absent="skip"`), or counts as 0 (`absent="zero"`, the older code's rule). With no pixel at
    all, every figure is NaN.
    """
    matrix = np.asarray(matrix, np.int64)
    hit, labelled, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    union = labelled + predicted - hit
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, accuracy = hit / union, hit / labelled
        pixel_accuracy = hit.sum() / labelled.sum() if labelled.any() else np.nan
    if absent == "zero":
        iou, accuracy = np.nan_to_num(iou), np.nan_to_num(accuracy)

    def mean(values: np.ndarray) -> float:
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    miou = mean(iou)
    return {
        "PA": float(pixel_accuracy),
        "mPA": mean(accuracy),
        "mIoU": miou,
        "final_score": (float(pixel_accuracy) + miou) / 2,
        "iou": iou,
        "accuracy": accuracy,
    }
