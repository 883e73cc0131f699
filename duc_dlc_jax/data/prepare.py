"""Turns a download into records: python -m duc_dlc_jax.data.prepare --dataset=camvid \
--raw_dir=FOLDER --data_dir=data [--strict]

Every mask is read and checked against the label contract. The records, the label specification
and the pixel counts appear together in DATA_DIR/NAME/VERSION when all is done, or not at all.
Needs TensorFlow (reading the records does not).
"""

from __future__ import annotations

import json
import pathlib

from absl import app, flags, logging

from duc_dlc_jax import cli
from duc_dlc_jax.data import builders
from duc_dlc_jax.data.builders import sources
from duc_dlc_jax.data.labels import IGNORE, DataError, LabelSpec, label_spec


def prepare(
    name: str, raw_dir: str | None, data_dir: str | pathlib.Path, strict: bool = False
) -> pathlib.Path:
    """Prepares a data set unless it is prepared already; prints the table of its splits.

    Args:
      name: of the data set, see `labels.label_spec`.
      raw_dir: folder of the download; None for `scenes`.
      data_dir: folder that receives NAME/VERSION.
      strict: a missing split or a count that differs from the official one is an error.

    Returns:
      The folder of the records.

    Raises:
      ConfigError: unknown data set.
      DataError: missing, partial or contradictory input, or a difference under `strict`.
    """
    spec, source = label_spec(name), sources.SOURCES[name]
    folder = builders.prepared_dir(data_dir, name)
    if (folder / builders.SUMMARY_FILE).is_file():
        print(f"{name} is already prepared in {folder}; delete that folder to prepare it again")
    else:
        splits = sources.list_items(source, name, raw_dir)
        if strict:
            sized = {split: _length(items) for split, items in splits.items()}
            _refuse(name, count_differences(source, sized))
        _build(name, splits, spec, data_dir)
    summary = json.loads((folder / builders.SUMMARY_FILE).read_text())
    differences = count_differences(source, {s: row["images"] for s, row in summary.items()})
    print("\n".join([*table(summary, spec), *differences]))
    if strict:
        _refuse(name, differences)
    return folder


def count_differences(source: sources.Source, found: dict[str, int | None]) -> list[str]:
    """Returns a line for each split that is missing or differs from the official count.

    Args:
      source: has the official counts.
      found: images by split; None where they are only known after building.
    """
    lines = []
    for split, official in source.counts.items():
        if split not in found:
            lines.append(f"split {split}: missing, officially {official} images")
            continue
        count = found[split]
        if count is not None and abs(count - official) > source.tolerance:
            lines.append(f"split {split}: {count} images, officially {official}")
    return lines


def table(summary: dict[str, dict], spec: LabelSpec) -> list[str]:
    """Returns the lines of a table: per split images and ignored share, then pixels per class."""
    lines = [f"{'split':<8}{'images':>8}{'labelled':>10}{'classes seen':>15}{'ignored':>10}"]
    for split, row in summary.items():
        total = max(sum(row["pixels"]), 1)
        seen = sum(count > 0 for count in row["pixels"][: spec.num_classes])
        lines.append(
            f"{split:<8}{row['images']:>8}{row['labelled']:>10}"
            f"{f'{seen} of {spec.num_classes}':>15}{row['pixels'][IGNORE] / total:>10.2%}"
        )
    lines += ["", f"{'id':>3}  {'class':<28}" + "".join(f"{f'{s} pixels':>16}" for s in summary)]
    for k, label in enumerate(spec.classes):
        pixels = "".join(f"{row['pixels'][k]:>16,}" for row in summary.values())
        lines.append(f"{k:>3}  {label[:28]:<28}{pixels}")
    return lines


def _length(items) -> int | None:
    return len(items) if hasattr(items, "__len__") else None


def _refuse(name: str, differences: list[str]) -> None:
    if differences:
        raise DataError(f"{name}, with --strict: {'; '.join(differences)}")


def _build(name: str, splits: dict, spec: LabelSpec, data_dir: str | pathlib.Path) -> None:
    try:
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"preparing {name} needs TensorFlow to write records: pip install tensorflow-cpu "
            "(training and reading do not need it)"
        ) from error
    from duc_dlc_jax.data.builders import tfds_builder

    tfds_builder.build(name, splits, spec, str(data_dir))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; see --help")
    logging.set_verbosity(logging.WARNING)  # TFDS logs each of its steps
    args = flags.FLAGS
    prepare(args.dataset, args.raw_dir, args.data_dir, args.strict)


if __name__ == "__main__":
    flags.DEFINE_string("dataset", None, "camvid, cityscapes, ade20k, ...", required=True)
    flags.DEFINE_string("raw_dir", None, "Folder of the download; scenes needs none.")
    flags.DEFINE_string("data_dir", "data", "Folder that receives the records.")
    flags.DEFINE_bool("strict", False, "Fail on a missing split or an unofficial count.")
    cli.run(main)
