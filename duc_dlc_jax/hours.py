"""How long a training takes, from steps that were timed: `describe --hours`.

hours = images x GMACs of an image / (images/s x GMACs of an image, as timed) / 3600

images: steps x batch. GMACs: multiply-adds of the convolutions for one training crop. Where
network and crop are those that were timed the rate is measured; elsewhere this extrapolates by
multiply-adds alone: layers that are bound by memory, the loss over another number of classes,
evaluations, checkpoints and a slow input are not in it. Devices without a timed step get no hours.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import optimizer as optimizers
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.builders import sources
from duc_dlc_jax.data.records import find_spec
from duc_dlc_jax.models import counts, segmenter


@dataclasses.dataclass(frozen=True)
class Measured:
    """A training step of docs/performance.md: one device, ResNet-50 + DUC + DLC, `dtype`.

    side: of its square crops in pixels. images_per_second: of a batch that stays on the device.
    """

    device: str
    side: int
    classes: int
    dtype: str
    batch: int
    images_per_second: float
    note: str = ""

    @property
    def name(self) -> str:
        shape = f"{self.side} pixels, {self.classes} classes, {self.dtype}, batch {self.batch}"
        return f"{self.device}, {shape}"

    def gmacs(self) -> float:
        model = config_lib.default().model
        return gmacs(segmenter.create(model, self.classes), (self.side, self.side))


H100, H200 = "one NVIDIA H100 80GB HBM3", "one NVIDIA H200"
CPU = "two cores of an AMD EPYC"
MEASURED = (
    Measured(H100, 480, 150, "bfloat16", 16, 323.0, "with a former, slower loss"),
    Measured(H100, 360, 11, "bfloat16", 16, 939.0, "former loss, few classes: a lower bound"),
    Measured(H200, 360, 11, "bfloat16", 16, 1054.0, "few classes: a lower bound"),
    Measured(CPU, 480, 150, "float32", 2, 2 / 2.22),
)
NOT_MEASURED = ("NVIDIA A100", "TPU v5e", "TPU v5p", "TPU v6e")


def gmacs(model: segmenter.Segmenter, size: tuple[int, int]) -> float:
    """1e9 multiply-adds of the convolutions for one image of size (height, width)."""
    return sum(counts.macs(model, *size).values()) / 1e9


def predict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Steps, images and GMACs of a training, and its hours on each device of `MEASURED`.

    The number of training images is the official one of a known data set. Raises ConfigError for
    epochs of another one.
    """
    spec, size = find_spec(config.data), config_lib.crop_shape(config.data)
    model = segmenter.create(config.model, spec.num_classes)
    steps = optimizers.total_steps(config, _training_images(config))
    images, work = steps * config.train.batch_size, gmacs(model, size)
    like = config_lib.default()
    like.model.dtype = config.model.dtype  # each rate names its own
    same_network = config.model.to_json() == like.model.to_json()
    rows = []
    for measured in MEASURED:
        timed = measured.gmacs()
        shape = size == (measured.side, measured.side) and spec.num_classes == measured.classes
        rows.append(
            {
                "measured": measured.name,
                "note": measured.note,
                "images_per_second": measured.images_per_second,
                "gmacs": timed,
                "hours": images * work / (measured.images_per_second * timed) / 3600,
                "extrapolated": not (shape and same_network),
            }
        )
    return {
        "steps": steps,
        "images": images,
        "gmacs": work,
        "devices": rows,
        "not_measured": list(NOT_MEASURED),
    }


def _training_images(config: ml_collections.ConfigDict) -> int:
    if config.train.steps > 0:
        return 0  # not asked for
    known, split = sources.SOURCES.get(config.data.name), config.data.train_split
    if known is None or split not in known.counts:
        raise ConfigError(
            f"the number of images of {config.data.name!r}, {split} is not known here: set "
            "train.steps for --hours"
        )
    return known.counts[split]


def text(found: dict[str, Any]) -> str:
    """The hours for people, every constant of the formula with them."""
    rows = [f"{found['steps']:,} steps, {found['images']:,} images of {found['gmacs']:.2f} GMACs"]
    for row in found["devices"]:
        how = "extrapolated by multiply-adds from" if row["extrapolated"] else "measured:"
        note = f" ({row['note']})" if row["note"] else ""
        rows.append(
            f"{row['hours']:>10,.1f} h  {how} {row['measured']}: "
            f"{row['images_per_second']:.4g} images/s at {row['gmacs']:.2f} GMACs{note}"
        )
    rows.append(f"not measured: {', '.join(found['not_measured'])}")
    rows.append(
        "hours = images x GMACs / (images/s x GMACs as timed) / 3600; n devices take an n-th at "
        "best; without evaluations, checkpoints and a slow input"
    )
    return "\n".join(rows)
