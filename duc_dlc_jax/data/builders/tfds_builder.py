"""The one TFDS builder: every source becomes array_record files of one schema.

Import it only where a data set is built: it needs TensorFlow, reading does not.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Iterable

import numpy as np
import tensorflow_datasets as tfds

from duc_dlc_jax.data import builders, codec
from duc_dlc_jax.data.builders.sources import Item
from duc_dlc_jax.data.labels import DataError, LabelSpec


class SegmentationBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes image (bytes), label (PNG bytes of train ids, empty without labels), name, size.

    Records keep the order of the source. The label specification and the pixel counts are written
    into the same unfinished folder as the records, which TFDS renames when all is done.
    """

    VERSION = tfds.core.Version(builders.VERSION)

    def __init__(self, *, splits: dict[str, Iterable[Item]], spec: LabelSpec, **kwargs):
        self._splits, self._spec = splits, spec
        self._summary: dict[str, dict] = {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = tfds.features.FeaturesDict(
            {
                "image": text(doc="PNG or JPEG bytes, RGB, EXIF orientation to be applied"),
                "label": text(doc="grey PNG bytes, train ids; 255 is ignored; empty: no labels"),
                "name": text(),
                "height": np.int32,
                "width": np.int32,
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            description=f"Semantic segmentation, {self._spec.num_classes} classes.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str):
        pixels, images, labelled = np.zeros(256, np.int64), 0, 0
        for images, item in enumerate(self._splits[split], start=1):
            example, counts = make_example(item, self._spec)
            pixels += counts
            labelled += bool(example["label"])
            yield images - 1, example
        self._summary[split] = {"images": images, "labelled": labelled, "pixels": pixels.tolist()}

    def _download_and_prepare(self, *args, **kwargs):
        super()._download_and_prepare(*args, **kwargs)
        folder = pathlib.Path(self.data_dir)  # still the unfinished one
        (folder / builders.SPEC_FILE).write_text(self._spec.to_json())
        (folder / builders.SUMMARY_FILE).write_text(json.dumps(self._summary))


def make_example(item: Item, spec: LabelSpec) -> tuple[dict, np.ndarray]:
    """Reads, checks and encodes one item.

    Returns:
      The record, and pixels per train id, int64 [256]; zeros without labels.

    Raises:
      DataError: bad image, bad mask, values outside the contract, or two sizes; names the file.
    """
    if isinstance(item.image, np.ndarray):
        data, (height, width) = codec.encode_png(item.image), item.image.shape[:2]
    else:
        data, height, width = codec.read_image_file(item.image)
    record = {"image": data, "label": b"", "name": item.name, "height": height, "width": width}
    if item.label is None:
        return record, np.zeros(256, np.int64)
    if isinstance(item.label, np.ndarray):
        raw, where = item.label, item.name
    else:
        raw, where = codec.read_mask_file(item.label), item.label
    if raw.shape != (height, width):
        raise DataError(
            f"{where}: the mask is {raw.shape[1]}x{raw.shape[0]}, its image {width}x{height} "
            "(width x height after EXIF orientation); the two must be equal"
        )
    try:
        label = spec.encode(raw)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    record["label"] = codec.encode_png(label)
    return record, np.bincount(label.ravel(), minlength=256)


def build(name: str, splits: dict[str, Iterable[Item]], spec: LabelSpec, data_dir: str) -> None:
    """Writes `data_dir/name/VERSION`; an interrupted call leaves only an `incomplete` folder."""
    body = {"name": name, "__module__": __name__}  # TFDS wants a module it can import
    kind = type(name, (SegmentationBuilder,), body, skip_registration=True)
    builder = kind(splits=splits, spec=spec, data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
    with tempfile.TemporaryDirectory() as unused:  # else TFDS leaves data_dir/downloads
        builder.download_and_prepare(download_dir=unused, download_config=config)
