"""Checks every image and mask of a download before it is prepared, or records after it was:

python -m duc_dlc_jax.data.verify --dataset=camvid --raw_dir=FOLDER [--json=FILE] [--limit=20]
python -m duc_dlc_jax.data.verify --data_dir=data [--dataset=camvid]

Goes on after the first problem and names every file that has one, by kind. Ends with exit code 2
where there is any, else with the tables of splits and classes. Needs no TensorFlow.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import json
import pathlib
from collections.abc import Iterable

import numpy as np
from absl import app, flags
from PIL import Image

from duc_dlc_jax import cli, storage
from duc_dlc_jax.data import builders, codec, prepare
from duc_dlc_jax.data.builders import examples, sources
from duc_dlc_jax.data.builders.sources import Item
from duc_dlc_jax.data.labels import IGNORE, DataError, LabelSpec
from duc_dlc_jax.data.records import Records, decode_tile
from duc_dlc_jax.data.threads import in_order
from duc_dlc_jax.progress import Progress

RECORD = "record"  # a kind of problem, as those in codec
HEADINGS = {  # by the kind of a DataError
    codec.BAD_IMAGE: "images that cannot be read to their end",
    codec.BAD_MASK: "masks that cannot be read to their end",
    codec.MODE: "files of a mode that is not accepted",
    "size": "masks of another size than their image",
    "values": "masks with values outside the contract",
    "archive": "members of damaged archives",
    RECORD: "damaged or contradictory records",
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with one file or record; `kind` is a key of `HEADINGS`."""

    split: str
    file: str
    kind: str
    message: str


@dataclasses.dataclass
class Checked:
    """What one example was found to hold: pixels per train id (int64 [256]) and problems."""

    pixels: np.ndarray
    labelled: bool
    turned: str = ""  # the file of an image that its EXIF orientation turns
    problems: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def add(self, file: object, error: Exception, kind: str) -> None:
        kind = (error.kind if isinstance(error, DataError) else "") or kind
        self.problems.append((str(file), kind, str(error)))


@dataclasses.dataclass
class Report:
    """The findings of one data set.

    Attributes:
      name, place: of the data set, and the folder that was read.
      spec: its label contract.
      splits: per split images, labelled images and pixels per train id, as in summary.json.
      problems: of all files, in the order of the data set.
      turned: images that their EXIF orientation turns.
    """

    name: str
    place: str
    spec: LabelSpec
    splits: dict[str, dict] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    turned: list[str] = dataclasses.field(default_factory=list)

    def add_split(self, split: str, total: int, results: Iterable[Checked]) -> None:
        """Adds up the results of `total` examples, with a progress line."""
        pixels, labelled, images = np.zeros(256, np.int64), 0, 0
        progress = Progress(total, f"{split}: image")
        for result in results:
            images += 1
            labelled += result.labelled
            pixels += result.pixels
            self.problems += [Problem(split, *problem) for problem in result.problems]
            self.turned += [result.turned] if result.turned else []
            text = f"problems: {len(self.problems)}"
            progress.show(images, text, log=images % 500 == 0 or images == total)
        row = {"images": images, "labelled": labelled, "pixels": pixels.tolist()}
        self.splits[split] = row

    def lines(self, limit: int) -> list[str]:
        """Returns the report as text, with at most `limit` problems of each kind."""
        images = sum(row["images"] for row in self.splits.values())
        lines = [f"{self.name} in {self.place}: {images} images, problems: {len(self.problems)}"]
        if self.turned:
            lines.append(
                f"images turned as their EXIF orientation says (masks are not): "
                f"{len(self.turned)}, first {self.turned[0]}"
            )
        if not self.problems:
            lines += ["", *prepare.table(self.splits, self.spec)]
            source = sources.SOURCES.get(self.name)
            counts = {split: row["images"] for split, row in self.splits.items()}
            return lines + (prepare.count_differences(source, counts) if source else [])
        for kind, problems in self.by_kind().items():
            lines += ["", f"{HEADINGS.get(kind, kind)}: {len(problems)}"]
            lines += [f"  {problem.split}: {problem.message}" for problem in problems[:limit]]
            if len(problems) > limit:
                lines.append(f"  and {len(problems) - limit} more; --json=FILE lists all")
        return lines

    def by_kind(self) -> dict[str, list[Problem]]:
        kinds = collections.defaultdict(list)
        for problem in self.problems:
            kinds[problem.kind].append(problem)
        return {kind: kinds[kind] for kind in [*HEADINGS, *kinds] if kind in kinds}

    def to_json(self) -> dict:
        counts = {kind: len(problems) for kind, problems in self.by_kind().items()}
        return {
            "dataset": self.name,
            "folder": self.place,
            "splits": self.splits,
            "counts": counts,
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
            "turned_by_exif": self.turned,
        }


def verify_download(name: str, raw_dir: str | None) -> Report:
    """Checks all images and masks of a download, in threads.

    Raises:
      ConfigError: unknown data set.
      DataError: the files are not there, or images and masks do not pair; see `prepare.listing_of`.
    """
    with prepare.listing_of(name, raw_dir) as (listing, spec):
        report = Report(name, raw_dir or "memory", spec)
        counts = prepare.images_of(sources.SOURCES[name], listing)
        for split, items in listing.splits.items():
            check = functools.partial(check_item, spec=spec)
            report.add_split(split, counts[split], in_order(check, items))
    return report


def check_item(item: Item, spec: LabelSpec) -> Checked:
    """Reads an image and its mask to the end; the mask is checked even where the image is bad."""
    result = Checked(np.zeros(256, np.int64), item.label is not None)
    size, drawn = None, isinstance(item.label, np.ndarray)
    try:
        if isinstance(item.image, np.ndarray):
            height, width = item.image.shape[:2]
        else:
            data = item.image.read()
            height, width = codec.check_image(data, str(item.image))[1].shape[:2]
            with Image.open(io.BytesIO(data)) as image:
                if codec.exif_orientation(image) != 1:
                    result.turned = str(item.image)
        size = height, width
    except (DataError, OSError) as error:
        result.add(item.image, error, codec.BAD_IMAGE)
    if item.label is not None:
        try:
            label = examples.read_label(item, spec, size)
            result.pixels += np.bincount(label.ravel(), minlength=256)
        except (DataError, OSError) as error:
            result.add(item.name if drawn else item.label, error, codec.BAD_MASK)
    return result


def verify_records(folder: pathlib.Path) -> Report:
    """Checks all records of a prepared data set and compares them with index and summary.

    Args:
      folder: DATA_DIR/NAME/VERSION.

    Raises:
      DataError: its label specification or summary cannot be read.
    """
    try:
        spec, summary = prepare.read_spec(folder), prepare.summary(folder)
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"{folder}: {error!r}; delete this folder and prepare it again") from error
    report = Report(spec.name, str(folder), spec)
    for split, expected in summary.items():
        try:
            records = Records(folder, split)
            points = records.class_points()
        except Exception as error:  # the readers raise what they meet
            report.problems.append(Problem(split, str(folder), RECORD, f"{folder}: {error}"))
            continue
        by_record = [points[points[:, 0] == i, 1:] for i in range(len(records))]
        check = functools.partial(check_record, records, by_record)
        before = len(report.problems)
        results = in_order(check, range(len(records)))
        report.add_split(split, len(records), results)
        if len(report.problems) == before:  # else the sums differ for that reason
            report.problems += _differences(split, report.splits[split], expected, folder)
    return report


def check_record(records: Records, points: list[np.ndarray], index: int) -> Checked:
    """Decodes all tiles of an example and compares them with the index and the contract.

    points: (train id, y, x) of some pixels of each class, int32 [P, 3], by example.
    """
    result = Checked(np.zeros(256, np.int64), False)
    where = f"record {index} of {records.folder}, {records.split}"
    try:
        label = _whole_label(records, index)
        if label is not None:
            result.labelled = True
            result.pixels += np.bincount(label.ravel(), minlength=256)
            _check_label(label, points[index], records.spec)
    except Exception as error:  # array_record and the codecs raise what they meet
        result.add(where, DataError(f"{where}: {error}", RECORD), RECORD)
    return result


def _whole_label(records: Records, index: int) -> np.ndarray | None:
    """Returns the label of an example, uint8 [H, W], after decoding all of its tiles."""
    height, width = records.size(index)
    tiles = records.tiles(index)
    boxes = [tuple(int(t[key]) for key in ("top", "left", "height", "width")) for t in tiles]
    expected = [(0, 0, height, width)] if len(tiles) == 1 else examples.tiles(height, width)
    if boxes != expected:
        raise DataError(f"its tiles (top, left, height, width) are {boxes}, by index {expected}")
    label = np.empty((height, width), np.uint8)
    for tile, (top, left, *size) in zip(tiles, boxes, strict=True):
        _, ids = decode_tile(tile, tile["name"].decode())
        label[top : top + size[0], left : left + size[1]] = ids
    return label if all(tile["label"] for tile in tiles) else None


def _check_label(label: np.ndarray, points: np.ndarray, spec: LabelSpec) -> None:
    found = np.flatnonzero(np.bincount(label.ravel(), minlength=256)).tolist()
    if outside := [value for value in found if spec.num_classes <= value < IGNORE]:
        raise DataError(f"train ids {outside}; allowed: 0..{spec.num_classes - 1}, {IGNORE}")
    if (label[points[:, 1], points[:, 2]] != points[:, 0]).any():
        raise DataError("the index gives pixels of classes that the label has not there")


def _differences(split: str, found: dict, expected: dict, folder: pathlib.Path) -> list[Problem]:
    """Compares a split's sums with its row of the summary."""
    path, messages = folder / builders.SUMMARY_FILE, []
    for key in ("images", "labelled"):
        if found[key] != expected[key]:
            messages.append(f"{expected[key]} {key}, in the records {found[key]}")
    if found["pixels"] != expected["pixels"]:
        wrong = np.flatnonzero(np.array(found["pixels"]) != np.array(expected["pixels"])).tolist()
        messages.append(f"pixels of the train ids {wrong} are not those in the records")
    return [Problem(split, str(path), RECORD, f"{path}: {message}") for message in messages]


def prepared(data_dir: str, name: str | None) -> list[pathlib.Path]:
    """Returns the folders of the records in data_dir, of all data sets or of one.

    Raises:
      DataError: there is none.
    """
    storage.local("--data_dir", data_dir)
    names = [name] if name else sorted(p.name for p in pathlib.Path(data_dir).glob("*/"))
    folders = [builders.prepared_dir(data_dir, n) for n in names]
    folders = [folder for folder in folders if prepare.is_prepared(folder)]
    if not folders:
        command = builders.prepare_command(name or "NAME", data_dir)
        raise DataError(f"no prepared records in {data_dir}/{name or ''}. Prepare them: {command}")
    return folders


def verify(
    name: str | None, raw_dir: str | None, data_dir: str | None, json_file: str, limit: int
) -> None:
    """Checks a download, or the records in data_dir, and prints the reports.

    Raises:
      DataError: there are problems, or nothing to check.
    """
    if not name and (raw_dir or not data_dir):
        raise DataError("say which data set: --dataset=NAME --raw_dir=DIR, or --data_dir=DIR")
    if json_file:
        storage.check(json_file, write=True, flag="--json", file=True)
    reports = []
    if name and (raw_dir or not data_dir):
        reports.append(verify_download(name, raw_dir))
    if data_dir:
        reports += [verify_records(folder) for folder in prepared(data_dir, name)]
    print("\n\n".join("\n".join(report.lines(limit)) for report in reports))
    if json_file:
        text = json.dumps([report.to_json() for report in reports], indent=1)
        storage.write_text(pathlib.Path(json_file), text + "\n")
    if problems := [problem for report in reports for problem in report.problems]:
        files = {problem.file for problem in problems}
        raise DataError(f"{len(problems)} problem(s) in {len(files)} file(s), listed above")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; see --help")
    args = flags.FLAGS
    verify(args.dataset, args.raw_dir, args.data_dir, args.json, args.limit)


if __name__ == "__main__":
    flags.DEFINE_string("dataset", None, "camvid, cityscapes, ade20k, ...")
    flags.DEFINE_string("raw_dir", None, "Folder of the download, or of its archives.")
    flags.DEFINE_string("data_dir", None, "Folder of prepared records to check instead.")
    flags.DEFINE_string("json", "", "Also write counts and all problems to this file.")
    flags.DEFINE_integer("limit", 20, "Problems of each kind that are printed.", lower_bound=0)
    cli.run(main)
