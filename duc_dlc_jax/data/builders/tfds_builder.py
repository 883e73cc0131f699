"""The one TFDS builder: every source becomes array_record files of one schema.

Import it only where a data set is built: it needs TensorFlow, reading does not.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow_datasets as tfds

from duc_dlc_jax.data import builders
from duc_dlc_jax.data.builders.examples import Example, make_example
from duc_dlc_jax.data.builders.sources import Item
from duc_dlc_jax.data.labels import LabelSpec
from duc_dlc_jax.data.threads import in_order
from duc_dlc_jax.progress import Progress


class SegmentationBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes image and label of each tile, and where the tile lies in its image.

    Records keep the order of the source. The label specification, the pixel counts and the tables
    of the examples are written into the same unfinished folder as the records, which TFDS renames
    when all is done.
    """

    VERSION = tfds.core.Version(builders.VERSION)

    def __init__(self, *, splits: Mapping[str, Iterable[Item]], spec: LabelSpec, **kwargs):
        self._totals: dict[str, int] = kwargs.pop("totals")
        self._splits, self._spec, self._encoding = splits, spec, kwargs.pop("encoding")
        self._summary: dict[str, dict] = {}
        self._index: dict[str, dict[str, np.ndarray]] = {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = tfds.features.FeaturesDict(
            {
                "image": text(doc="of the tile: raw RGB rows, or a PNG or JPEG file"),
                "encoding": text(doc="of `image`: raw, png or jpeg"),
                "label": text(doc="of the tile: rows of train ids; 255 is ignored; or empty"),
                "name": text(),
                "height": np.int32,  # of the tile, pixels
                "width": np.int32,
                "top": np.int32,  # of the tile in its image, pixels
                "left": np.int32,
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
        pixels, labelled, total = np.zeros(256, np.int64), 0, self._totals[split]
        first, sizes, points = [0], [], [np.zeros((0, 4), np.int32)]
        progress = Progress(total, f"{split}: image")
        # Keys spread over TFDS's 128 bits: it sorts buckets by the high bits, and small integers
        # would all fall into one, which it sorts in memory.
        spacing = (2**128 - 1) // ((total + 1) << 24)
        for number, example in enumerate(in_order(self._example, self._splits[split])):
            for tile, record in enumerate(example.records):
                yield ((number << 24) + tile) * spacing, record
            first.append(first[-1] + len(example.records))
            sizes.append((example.height, example.width))
            rows = np.insert(example.points, 0, number, axis=1)
            points.append(rows.astype(np.int32))
            pixels += example.pixels
            labelled += bool(example.records[0]["label"])
            progress.show(number + 1, "", log=(number + 1) % 500 == 0 or number + 1 == total)
        images = len(sizes)
        self._summary[split] = {"images": images, "labelled": labelled, "pixels": pixels.tolist()}
        self._index[split] = {
            "first": np.array(first, np.int64),
            "size": np.array(sizes, np.int32).reshape(-1, 2),
            "points": np.concatenate(points),
        }

    def _example(self, item: Item) -> Example:
        return make_example(item, self._spec, self._encoding)

    def _download_and_prepare(self, *args, **kwargs):
        super()._download_and_prepare(*args, **kwargs)
        folder = pathlib.Path(self.data_dir)  # still the unfinished one
        for split, tables in self._index.items():
            np.savez(folder / builders.index_file(split), allow_pickle=False, **tables)
        (folder / builders.SPEC_FILE).write_text(self._spec.to_json())
        (folder / builders.SUMMARY_FILE).write_text(json.dumps(self._summary))


def build(
    name: str,
    splits: Mapping[str, Iterable[Item]],
    spec: LabelSpec,
    data_dir: str,
    totals: dict[str, int],
    encoding: str = "auto",
) -> None:
    """Writes `data_dir/name/VERSION`; an interrupted call leaves only an `incomplete` folder.

    Args:
      name: of the data set.
      splits: the items by split.
      spec: the label contract.
      data_dir: folder of all prepared data sets.
      totals: number of items by split.
      encoding: see `examples.make_example`.
    """
    body = {"name": name, "__module__": __name__}  # TFDS wants a module it can import
    kind = type(name, (SegmentationBuilder,), body, skip_registration=True)
    tfds.disable_progress_bar()  # ours counts images
    builder = kind(
        splits=splits,
        spec=spec,
        totals=totals,
        encoding=encoding,
        data_dir=data_dir,
        file_format="array_record",
    )
    config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
    with tempfile.TemporaryDirectory() as unused:  # else TFDS leaves data_dir/downloads
        builder.download_and_prepare(download_dir=unused, download_config=config)
