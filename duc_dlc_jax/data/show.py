"""Pictures of prepared data: python -m duc_dlc_jax.data.show --dataset=camvid --data_dir=data \
--output=FOLDER [--split=train] [--augmented] [--config=configs/X.py] [--images=12] [--seed=0]

Writes a contact sheet (photo, label in the palette's colours, legend) and the share of the pixels
that each class has in each split. With --augmented the sheet shows the first training crops, as
the input pipeline makes them under the configuration.
"""

from __future__ import annotations

import pathlib

import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from duc_dlc_jax import cli, pictures, storage
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.data import drawing, pipeline, prepare
from duc_dlc_jax.data.drawing import Cell
from duc_dlc_jax.data.records import Records, open_records


def show(
    config: ml_collections.ConfigDict,
    split: str,
    output: pathlib.Path,
    augmented: bool = False,
    images: int = 12,
    seed: int = 0,
) -> list[pathlib.Path]:
    """Draws the contact sheet of a split and the class balance of its data set.

    Args:
      config: `config.data` names the data set and has the fields of the augmentation.
      split: of the data set, or several joined by "+".
      output: folder for the pictures; made where it is missing.
      augmented: show training crops instead of whole images.
      images: number of examples.
      seed: of their choice, and of the crops.

    Returns:
      The files written: NAME-SPLIT[-augmented].png and NAME-balance.png.

    Raises:
      ConfigError: no such split, or one that cannot train under `augmented`.
      FileNotFoundError: the data set is not prepared.
    """
    records = open_records(config.data, split)
    cells = crops(config, records, images, seed) if augmented else whole(records, images, seed)
    name, kind = config.data.name, "training crops" if augmented else f"of {len(records)} images"
    title = f"{name} {split}: {len(cells)} {kind} (seed {seed})"
    output.mkdir(parents=True, exist_ok=True)
    stem = pictures.file_name(f"{name}-{split}" + ("-augmented" if augmented else ""))
    paths = [output / f"{stem}.png", output / f"{pictures.file_name(name)}-balance.png"]
    drawing.contact_sheet(cells, records.spec, title).save(paths[0])
    title = f"{name}: share of the labelled pixels, logarithmic"
    drawing.balance(prepare.summary(records.folder), records.spec, title).save(paths[1])
    return paths


def whole(records: Records, images: int, seed: int) -> list[Cell]:
    """Reads a random choice of whole examples, in their order in the records."""
    chosen = np.random.default_rng(seed).permutation(len(records))[:images]
    cells = []
    for index in np.sort(chosen).tolist():
        example = records[index]
        height, width = example["label"].shape
        caption = f"{example['name']}  {width}x{height}"
        cells.append(Cell(caption, example["image"], example["label"]))
    return cells


def crops(
    config: ml_collections.ConfigDict, records: Records, images: int, seed: int
) -> list[Cell]:
    """Takes the first crops that training with this seed sees, whatever its batch size."""
    data = config.data.copy_and_resolve_references()
    data.workers = 0  # the same crops; processes would take longer to start than one batch takes
    batch = next(pipeline.train_iterator(data, records, seed=seed, batch_size=images, steps=1))
    cells = []
    for image, label, record in zip(batch["image"], batch["label"], batch["record"], strict=True):
        name = records.name(int(record))
        cells.append(Cell(f"{name}  crop {label.shape[1]}x{label.shape[0]}", image, label))
    return cells


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; see --help")
    args = flags.FLAGS
    config = args.config or config_lib.default()
    for field, value in (("name", args.dataset), ("dir", args.data_dir)):
        if value:
            config.data[field] = value
    if not config.data.name:
        raise config_lib.ConfigError("say which data set: --dataset=NAME or --config=configs/X.py")
    config_lib.validate(config)
    split = args.split or config.data.train_split
    output = pathlib.Path(args.output)
    storage.check(output, write=True, flag="--output")
    for path in show(config, split, output, args.augmented, args.images, args.seed):
        print(path)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Of the augmentation; the default is its own.")
    flags.DEFINE_string("dataset", "", "camvid, ...; default: the configuration's data.name.")
    flags.DEFINE_string("data_dir", "", "Of prepared records; default: the configuration's.")
    flags.DEFINE_string("split", "", "Default: the configuration's data.train_split.")
    flags.DEFINE_bool("augmented", False, "Show training crops.")
    flags.DEFINE_integer("images", 12, "Number of examples.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the choice of examples and of the crops.", lower_bound=0)
    flags.DEFINE_string("output", None, "Folder for the pictures.", required=True)
    cli.run(main)
