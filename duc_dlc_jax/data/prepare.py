"""Turns a download into records: python -m duc_dlc_jax.data.prepare --dataset=camvid \
--raw_dir=FOLDER --data_dir=data [--encoding=auto] [--strict]; or two folders of one's own:
--dataset=NAME --images=DIR --labels=DIR [--classes=FILE]

FOLDER may hold the unpacked files or the official archives as downloaded. Every mask is read and
checked against the label contract. The records, the label specification and the pixel counts
appear together in DATA_DIR/NAME/VERSION when all is done, or not at all: a killed call can simply
be repeated. DATA_DIR may be s3://BUCKET/... or gs://BUCKET/...: the records are then written here
and uploaded, a manifest of their checksums last. Needs TensorFlow (reading the records does not).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping

from absl import app, flags, logging

from duc_dlc_jax import cli, storage
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import builders, folders, staging
from duc_dlc_jax.data.builders import files, sources
from duc_dlc_jax.data.builders.sources import Item, Listing
from duc_dlc_jax.data.labels import IGNORE, DataError, LabelSpec, is_known, label_spec
from duc_dlc_jax.data.records import is_prepared, read_spec, summary

AGAIN = "delete that folder, or give another --data_dir"


def _source(name: str) -> sources.Source:
    """Raises ConfigError for an unknown data set and for one that has no builder."""
    label_spec(name)
    if not is_known(name):
        raise ConfigError(
            f"{name} has no layout of its own: prepare its folders with --dataset={name} "
            "--images=DIR --labels=DIR --classes=FILE"
        )
    return sources.SOURCES[name]


@contextlib.contextmanager
def listing_of(name: str, raw_dir: str | None) -> Iterator[tuple[Listing, LabelSpec]]:
    """Yields what a download holds and the label contract of its masks; files stay readable inside.

    Raises:
      ConfigError: unknown data set.
      DataError: missing, partial or contradictory input.
    """
    source = _source(name)
    if name == "scenes":
        yield source.list_splits({}), label_spec(name)
        return
    if not raw_dir or not pathlib.Path(raw_dir).exists():
        raise DataError(
            f"--raw_dir={raw_dir or ''} is no folder and no archive. {name} is read from "
            f"{source.layout}. Download: {source.download}"
        )
    with files.find(pathlib.Path(raw_dir)) as found:
        listing = sources.list_items(source, name, pathlib.Path(raw_dir), found)
        yield listing, label_spec(name, listing.masks)


def prepare(
    name: str,
    raw_dir: str | None,
    data_dir: str | pathlib.Path,
    strict: bool = False,
    encoding: str = "auto",
) -> pathlib.Path:
    """Prepares a data set unless it is prepared already; prints the table of its splits.

    Args:
      name: of the data set, see `labels.label_spec`.
      raw_dir: folder of the download or of its archives, or one archive; None for `scenes`.
      data_dir: folder that receives NAME/VERSION.
      strict: a missing split or a count that differs from the official one is an error.
      encoding: of the stored pixels, see `examples.make_example`.

    Returns:
      The folder of the records.

    Raises:
      ConfigError: unknown data set.
      DataError: missing, partial or contradictory input, or a difference under `strict`; or other
        images than it was prepared from.
    """
    source = _source(name)
    folder = builders.prepared_dir(data_dir, name)
    if is_prepared(folder):
        print(f"{name} is already prepared in {folder}; delete that folder to prepare it again")
        if raw_dir:
            with listing_of(name, raw_dir) as (listing, _):
                _check_source(folder, f"--raw_dir={raw_dir}", images_of(source, listing))
            _note_source(folder, raw_dir)
    else:
        with listing_of(name, raw_dir) as (listing, spec):
            counts = images_of(source, listing)
            if strict:
                _refuse(name, count_differences(source, counts))
            origin = {"raw_dir": str(pathlib.Path(raw_dir).resolve())} if raw_dir else {}
            build(name, listing.splits, spec, data_dir, counts, encoding, origin)
    rows = summary(folder)
    differences = count_differences(source, {split: rows[split]["images"] for split in rows})
    print("\n".join([*table(rows, read_spec(folder)), *differences]))
    if strict:
        _refuse(name, differences)
    return folder


def prepare_folders(
    found: folders.Inspection, data_dir: str | pathlib.Path, encoding: str = "auto"
) -> pathlib.Path:
    """Prepares what `folders.inspect` found, unless it is prepared already; prints the table.

    Returns:
      The folder of the records.

    Raises:
      DataError: a file became unusable since it was inspected; names it. Or it is prepared from
        other images or classes.
    """
    name, names = found.spec.name, found.fingerprint()
    folder = builders.prepared_dir(data_dir, name)
    if is_prepared(folder):
        print(f"{name} is already prepared in {folder}; delete that folder to prepare it again")
        _check_source(folder, "--images", found.counts)
        if _origin(folder).get("names", names) != names:
            raise DataError(f"{folder} was prepared from images of other names or splits; {AGAIN}")
        if found.spec != read_spec(folder):
            raise DataError(f"{folder} was prepared with other classes; {AGAIN}")
    else:
        origin = {"names": names}
        build(name, found.items(), found.spec, data_dir, found.counts, encoding, origin)
    print("\n".join(table(summary(folder), read_spec(folder))))
    return folder


def prepare_into(name: str, data_dir: str, make: Callable[[str], pathlib.Path]) -> None:
    """Has `make` prepare into data_dir; for an object store into the user's cache, and uploads it.

    Raises as `make`; ConfigError for a store or a folder that cannot be used.
    """
    target = builders.prepared_dir(data_dir, name)
    if not storage.is_remote(data_dir):
        if not is_prepared(target):
            storage.check(data_dir, write=True, flag="--data_dir")
        folder = make(data_dir)
        if not (folder / staging.MANIFEST).exists():  # of an older version
            staging.write_manifest(folder)
        return
    storage.check(target, write=True, flag="--data_dir")
    if (target / staging.MANIFEST).exists():
        print(f"{name} is already prepared in {target}; delete that folder to prepare it again")
        return
    folder = make(str(storage.cache_dir() / "prepared"))
    staging.upload(folder, target)
    shutil.rmtree(folder)
    print(f"uploaded to {target}")


def _check_source(folder: pathlib.Path, given: str, images: dict[str, int]) -> None:
    """Raises DataError where a split has other `images` than the records in `folder`."""
    prepared = {split: row["images"] for split, row in summary(folder).items()}
    if images != prepared:
        now, then = (
            ", ".join(f"{count} {split}" for split, count in counts.items())
            for counts in (images, prepared)
        )
        raise DataError(f"{given}: {now} images, but {folder} was prepared from {then}; {AGAIN}")


def _note_source(folder: pathlib.Path, raw_dir: str) -> None:
    """Prints where a prepared data set is from, if that is another place than `raw_dir`."""
    origin = _origin(folder).get("raw_dir")
    if origin not in (None, str(pathlib.Path(raw_dir).resolve())):
        print(f"warning: it was prepared from {origin}; nothing of {raw_dir} is read")


def _origin(folder: pathlib.Path) -> dict[str, str]:
    """Returns what `build` noted beside the records; older ones have no note."""
    path = folder / builders.SOURCE_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def images_of(source: sources.Source, listing: Listing) -> dict[str, int]:
    """Returns the number of images of each listed split."""
    return {
        split: len(items) if isinstance(items, list) else source.counts[split]
        for split, items in listing.splits.items()
    }


def build(
    name: str,
    splits: Mapping[str, Iterable[Item]],
    spec: LabelSpec,
    data_dir: str | pathlib.Path,
    counts: dict[str, int],
    encoding: str = "auto",
    origin: Mapping[str, str] | None = None,
) -> None:
    """Writes the records of a data set; what an earlier call left unfinished is removed first.

    origin: noted beside the records: the folder of the download, or what names the images had.

    Raises DataError where another process is preparing it, and ImportError without TensorFlow.
    """
    try:
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"preparing {name} needs TensorFlow to write records: pip install tensorflow-cpu "
            "(training and reading do not need it)"
        ) from error
    from duc_dlc_jax.data.builders import tfds_builder

    parent = pathlib.Path(data_dir) / name
    parent.mkdir(parents=True, exist_ok=True)
    with open(parent / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"{parent}: another process is preparing {name}; wait for it"
            ) from error
        for leftover in parent.glob("incomplete.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            tfds_builder.build(name, splits, spec, str(data_dir), counts, encoding)
            if origin:
                path = builders.prepared_dir(data_dir, name) / builders.SOURCE_FILE
                path.write_text(json.dumps(origin) + "\n")
            staging.write_manifest(builders.prepared_dir(data_dir, name))
        finally:
            (parent / ".lock").unlink(missing_ok=True)


def count_differences(source: sources.Source, found: dict[str, int]) -> list[str]:
    """Returns a line for each split that is missing or differs from the official count.

    Args:
      source: has the official counts.
      found: images by split.
    """
    lines = []
    for split, official in (source.counts | source.optional).items():
        if split in found:
            if abs(found[split] - official) > source.tolerance:
                lines.append(f"split {split}: {found[split]} images, officially {official}")
        elif split in source.counts:
            lines.append(f"split {split}: missing, officially {official} images")
    return lines


def table(rows: dict[str, dict], spec: LabelSpec) -> list[str]:
    """Returns the lines of two tables: of the splits, and of the classes.

    Per split: images, ignored share. Per class: pixels in each split, the raw ids that mean it.
    """
    lines = [f"{'split':<12}{'images':>8}{'labelled':>10}{'classes seen':>15}{'ignored':>10}"]
    for split, row in rows.items():
        total = max(sum(row["pixels"]), 1)
        seen = sum(count > 0 for count in row["pixels"][: spec.num_classes])
        lines.append(
            f"{split:<12}{row['images']:>8}{row['labelled']:>10}"
            f"{f'{seen} of {spec.num_classes}':>15}{row['pixels'][IGNORE] / total:>10.2%}"
        )
    heads = "".join(f"{f'{split} pixels':>20}" for split in rows)
    lines += ["", f"{'id':>3}  {'class':<28}{heads}  raw ids"]
    for train, label, raw_ids in spec.mapping():
        pixels = "".join(f"{row['pixels'][train]:>20,}" for row in rows.values())
        lines.append(f"{train:>3}  {label[:28]:<28}{pixels}  {raw_ids}")
    return lines


def _refuse(name: str, differences: list[str]) -> None:
    if differences:
        raise DataError(f"{name}, with --strict: {'; '.join(differences)}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; see --help")
    logging.set_verbosity(logging.WARNING)  # TFDS logs each of its steps
    args = flags.FLAGS
    own = args.images or args.labels
    if own and not (args.images and args.labels and not args.raw_dir):
        raise app.UsageError("--images and --labels belong together, without --raw_dir")

    def make(data_dir: str) -> pathlib.Path:
        if not args.images:
            return prepare(args.dataset, args.raw_dir, data_dir, args.strict, args.encoding)
        found = folders.inspect(args.images, args.labels, args.classes, name=args.dataset)
        print("\n".join([*found.lines(), ""]))
        return prepare_folders(found, data_dir, args.encoding)

    prepare_into(args.dataset, args.data_dir, make)


if __name__ == "__main__":
    flags.DEFINE_string("dataset", None, "camvid, cityscapes, ade20k, ...", required=True)
    flags.DEFINE_string("raw_dir", None, "Folder of the download; scenes needs none.")
    flags.DEFINE_string("images", None, "Folder of your own images; --dataset is its name.")
    flags.DEFINE_string("labels", None, "Folder of their masks.")
    flags.DEFINE_string("classes", None, "File that names their classes, JSON or .txt.")
    flags.DEFINE_enum("encoding", "auto", ["auto", "raw", "png", "jpeg"], "Of the stored pixels.")
    flags.DEFINE_string("data_dir", "data", "Receives the records; may be s3:// or gs://.")
    flags.DEFINE_bool("strict", False, "Fail on a missing split or an unofficial count.")
    cli.run(main)
