"""Pixel accuracy, mean IoU and relatives (eq. 7 to 9) from one integer confusion matrix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duc_dlc_jax.data.labels import IGNORE

# What a class in neither labels nor predictions does to the means, and how a protocol says so.
ABSENT = {"skip": "", "zero": "; absent classes count as 0"}


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


def host_confusion_matrix(
    label: np.ndarray, prediction: np.ndarray, num_classes: int
) -> np.ndarray:
    """`confusion_matrix` by NumPy, of one image: uint8 [H, W] each -> int64 [K, K]."""
    counted = label != IGNORE
    index = label[counted].astype(np.int64) * num_classes + prediction[counted]
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean(values: np.ndarray) -> float:
    """Without the NaNs; NaN where there is nothing else."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def scores(matrix: np.ndarray, absent: str = "skip") -> dict[str, Any]:
    """Confusion matrix int64 [K, K] -> PA, mPA, mIoU, fwIoU, Final Score and per-class figures.

    fwIoU weighs each class's IoU with its share of the labelled pixels; `pixels` are these pixels.

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

    miou = mean(iou)
    return {
        "PA": float(pixel_accuracy),
        "mPA": mean(accuracy),
        "mIoU": miou,
        "fwIoU": float((np.nan_to_num(iou) * labelled).sum() / labelled.sum())
        if labelled.any()
        else float("nan"),
        "final_score": (float(pixel_accuracy) + miou) / 2,
        "iou": iou,
        "accuracy": accuracy,
        "pixels": labelled,
    }


def extra_mious(scores: dict[str, Any], data_set: str) -> dict[str, float]:
    """Figures whose name says over how many classes a data set's mIoU goes.

    PASCAL-Context is reported over 59 classes, the background ignored, and by FastFCN and EncNet
    over 60, of which the background counts as 0: mIoU_60_rescaled = 59 / 60 mIoU_59. A network
    trained with the background as a class has an mIoU_60 of its own.
    """
    miou = scores["mIoU"]
    return {
        "pascal_context": {"mIoU_59": miou, "mIoU_60_rescaled": miou * 59 / 60},
        "pascal_context_60": {"mIoU_60": miou},
    }.get(data_set, {})
