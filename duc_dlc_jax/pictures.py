"""Pictures of labels and predictions: id PNG with the palette kept, colour mask, overlay."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import IO, Any

import cv2
import numpy as np
from etils import epath
from PIL import Image

from duc_dlc_jax.data import codec
from duc_dlc_jax.data.labels import IGNORE, LabelSpec


def overlay(
    image: np.ndarray, ids: np.ndarray, spec: LabelSpec, opacity: float = 0.5
) -> np.ndarray:
    """image uint8 RGB [H, W, 3] and train ids [H, W] -> the image tinted by class, uint8 RGB."""
    return cv2.addWeighted(image, 1 - opacity, spec.colourise(ids), opacity, 0)


def triple(example: dict[str, Any], spec: LabelSpec) -> np.ndarray:
    """{image, label, prediction} -> the three side by side, uint8 RGB [H, 3 W, 3].

    Ignored pixels of the label are black in the prediction as well.
    """
    label = example["label"]
    shown = np.where(label == IGNORE, IGNORE, example["prediction"]).astype(np.uint8)
    return np.concatenate([example["image"], spec.colourise(label), spec.colourise(shown)], axis=1)


def write_triples(folder: epath.Path, examples: Sequence[dict[str, Any]], spec: LabelSpec) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for example in examples:
        write_png(folder / f"{file_name(example['name'])}.png", triple(example, spec))


def write_ids(path: str | os.PathLike | IO[bytes], ids: np.ndarray, spec: LabelSpec) -> None:
    """Train ids uint8 [H, W] as a palette PNG: pixel values are the ids, viewers show colours.

    Ignored pixels are black.
    """
    image = Image.fromarray(ids)
    image.putpalette(spec.colourise(np.arange(256, dtype=np.uint8)[None]).tobytes())
    image.save(path, "PNG")


def write_png(path: epath.Path, picture: np.ndarray) -> None:
    """RGB uint8 [H, W, 3]; several times as fast as Pillow's default compression."""
    path.write_bytes(codec.encode_image(picture, "png"))


def file_name(name: str) -> str:
    """A record's name as one file name: folders become underscores."""
    return name.replace("/", "_").replace("\\", "_")
