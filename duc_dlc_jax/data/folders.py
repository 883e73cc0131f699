"""Two folders of one's own, images and masks, to splits and a label contract.

Folders train, val and test directly below are the splits; without them a share of the images, drawn
by a hash of the name and the seed, is held back: images that are added later move none of the
others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from duc_dlc_jax.data import classes, codec
from duc_dlc_jax.data.builders.files import File
from duc_dlc_jax.data.builders.sources import Item
from duc_dlc_jax.data.labels import IGNORE, DataError, LabelSpec, is_known
from duc_dlc_jax.data.pairs import CLASSES, Pair, find_pairs, folder_split
from duc_dlc_jax.data.threads import in_order
from duc_dlc_jax.progress import Progress

PNG_KINDS = {  # (bits, colour type) of a PNG's header
    (1, 0): "1-bit ids",
    (8, 0): "grey ids",
    (16, 0): "16-bit ids",
    **{(bits, 3): "palette ids" for bits in (1, 2, 4, 8)},
    (8, 2): "RGB colours",
    (8, 6): "RGB colours",
}
MOST_IN_ONE = 4096  # values of one mask; a photograph has more
COLOUR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}


@dataclasses.dataclass(frozen=True)
class Scan:
    """What one pair holds.

    Attributes:
      pair: the files.
      size: (height, width) of the image, pixels.
      kind: a value of `PNG_KINDS`; "" without a mask.
      pixels: number by raw id of the mask.
      palette: 0xRRGGBB by index that occurs, of a palette PNG.
    """

    pair: Pair
    size: tuple[int, int]
    kind: str = ""
    pixels: dict[int, int] = dataclasses.field(default_factory=dict)
    palette: dict[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What two folders hold, and the label contract that follows.

    Attributes:
      spec: the label contract.
      scans: what the pairs hold, by split; "train" and "val" are never empty.
      kind: what the masks are, see `PNG_KINDS`.
      split_by: where the splits come from, for people.
      names_from: where the names of the classes come from, for people.
      skipped: a message for each file that is left out.
      others: number of files of types that are not read, by suffix.
    """

    spec: LabelSpec
    scans: dict[str, list[Scan]]
    kind: str
    split_by: str
    names_from: str
    skipped: tuple[str, ...]
    others: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by split."""
        return {split: len(scans) for split, scans in self.scans.items()}

    def items(self) -> dict[str, list[Item]]:
        """Returns the pairs by split, for `prepare.build`."""
        return {split: [_item(s.pair) for s in scans] for split, scans in self.scans.items()}

    def fingerprint(self) -> str:
        """Returns a SHA-256, hex, of the names of the images in each split."""
        names = {split: sorted(s.pair.name for s in scans) for split, scans in self.scans.items()}
        return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()

    def sizes(self, split: str) -> list[tuple[int, int]]:
        """Returns (height, width) of each image of a split, pixels."""
        return [scan.size for scan in self.scans[split]]

    def short_side(self) -> int:
        """Returns the median short side of the training images, pixels."""
        return round(statistics.median(min(size) for size in self.sizes("train")))

    def lines(self) -> list[str]:
        """Returns what was found as lines of text, with a row per class."""
        sizes = [size for split in self.scans for size in self.sizes(split)]
        ends = min(sizes, key=np.prod), max(sizes, key=np.prod)
        spans = " to ".join(f"{w}x{h}" for h, w in dict.fromkeys(ends))
        numbers = ", ".join(f"{count} {split}" for split, count in self.counts.items())
        lines = [
            f"Images    {len(sizes)} of {spans}, median short side of train {self.short_side()}",
            f"Splits    {numbers}: {self.split_by}",
            f"Masks     {self.kind}; the names of the classes are from {self.names_from}",
        ]
        for split, then in (("train", "not learned"), ("val", "not scored")):
            if absent := self._absent(split):
                listed = ", ".join(absent[:8]) + (" ..." if absent[8:] else "")
                lines.append(f"Absent    {len(absent)} of the classes in {split}, {then}: {listed}")
        if self.skipped:
            lines += [f"Left out  {len(self.skipped)}:", *_listed(self.skipped)]
        if self.others:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self.others.items()))
            lines.append(f"Not read  {kinds}: images are PNG or JPEG, masks PNG")
        return [*lines, "", *self._class_rows()]

    def _absent(self, split: str) -> list[str]:
        """Returns the classes that no mask of a split has."""
        raw = (raw for scan in self.scans[split] for raw in _raw_pixels(scan, self.spec.colours))
        seen = set(map(self.spec.raw_to_train.get, raw))
        return [name for k, name in enumerate(self.spec.classes) if k not in seen]

    def _class_rows(self) -> list[str]:
        """Rows of classes and ignored values: share of the pixels, masks that have it."""
        pixels: dict[int, int] = {}
        masks: dict[int, int] = {}
        for scan in (s for scans in self.scans.values() for s in scans):
            for raw, count in _raw_pixels(scan, self.spec.colours).items():
                pixels[raw] = pixels.get(raw, 0) + count
                masks[raw] = masks.get(raw, 0) + 1
        total = sum(pixels.values())
        rows = [f"{'id':>3}  {'class':<24}{'in the masks':>14}{'pixels':>10}{'masks':>8}"]
        for raw, train in sorted(self.spec.raw_to_train.items(), key=lambda pair: pair[::-1]):
            ignored = train == IGNORE
            if ignored and raw not in pixels:
                continue
            number, label = ("-", "ignored") if ignored else (train, self.spec.classes[train])
            share = f"{pixels.get(raw, 0) / total:.2%}"
            value = self.spec.written([raw])
            rows.append(
                f"{number:>3}  {label[:24]:<24}{value:>14}{share:>10}{masks.get(raw, 0):>8}"
            )
        return rows


def inspect(
    images_dir: str | pathlib.Path,
    labels_dir: str | pathlib.Path,
    classes_file: str | pathlib.Path | None = None,
    seed: int = 0,
    *,
    name: str = "own_images",
    val_share: float = 0.15,
    binary: bool = False,
    skip_bad: bool = False,
) -> Inspection:
    """Reads all images and masks below two folders; infers the splits and the label contract.

    Args:
      images_dir: PNG or JPEG images, in folders of any depth.
      labels_dir: PNG masks in the same folders under the same names, see `pairs.find_pairs`.
      classes_file: see `classes.read_classes`; None: a classes.json in or beside labels_dir, or
        else the classes are the values that occur in the masks.
      seed: of the split.
      name: of the data set: a-z, 0-9 and _, a letter first, and no known data set's.
      val_share: share of the images that are held back where there is no folder val; above 0 and
        below 1.
      binary: see `classes.infer_spec`.
      skip_bad: leave out files without a partner, that are unreadable or of two sizes.

    Raises:
      FileNotFoundError: no such folder or file.
      DataError: no pairs; a share outside its range; files that cannot be used; masks that fit
        neither together nor the file of classes; names files, values and the way out.
    """
    _check_name(name)
    if not 0 < val_share < 1:
        raise DataError(f"--val_share={val_share:g}; allowed: above 0 and below 1")
    images_dir, labels_dir = pathlib.Path(images_dir), pathlib.Path(labels_dir)
    found, alone, others = find_pairs(images_dir, labels_dir)
    scans, broken = _scan_all(found)
    left_out = [*alone, *broken]
    labelled = any(scan.kind for scan in scans)
    if left_out and not (skip_bad and labelled):
        way_out = (
            "Without them no mask is left: mend them"
            if skip_bad
            else "Mend or remove them, or leave them out with --skip_bad; with --plan_only fit "
            "shows what then remains"
        )
        raise DataError(
            f"{len(left_out)} of the files in {images_dir} and {labels_dir} cannot be used. "
            + "\n".join([f"{way_out}:", *_listed(left_out)])
        )
    classes_file = find_classes(labels_dir, classes_file)
    declared = classes.read_classes(classes_file) if classes_file else None
    values = _values(scans, bool(declared and declared[0].colour))
    spec = classes.infer_spec(name, values, declared, str(classes_file), binary)
    by_split, split_by = _split(scans, seed, val_share)
    if not any(scan.pair.split == "val" for scan in scans):
        _refuse_lost_val(images_dir)
    source = "--binary" if binary else classes_file or "their values"
    return Inspection(spec, by_split, values.kind, split_by, str(source), tuple(left_out), others)


def find_classes(
    labels_dir: pathlib.Path, given: str | pathlib.Path | None = None
) -> str | pathlib.Path | None:
    """Returns the file of classes: the one that is given, or one in or beside the folder."""
    if given is not None:
        return given
    beside = (labels_dir / CLASSES, labels_dir.parent / CLASSES)
    return next((path for path in beside if path.is_file()), None)


def _refuse_lost_val(images_dir: pathlib.Path) -> None:
    """Raises DataError where there is a folder val: a drawn split would take its place."""
    for path in sorted(images_dir.iterdir()):
        if path.is_dir() and folder_split(f"{path.name}/") == "val":
            raise DataError(
                f"{path}: no image in it can be used, and a share of the others would be held "
                "back in its place. Mend its images and their masks, or remove or rename the folder"
            )


def _check_name(name: str) -> None:
    if is_known(name):
        raise DataError(f"{name} is the name of a known data set; give your own folders another")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(
            f"{name!r} names no data set; allowed: small letters, digits and _, a letter first"
        )


def _scan_all(found: Sequence[Pair]) -> tuple[list[Scan], list[str]]:
    """Reads all pairs on all cores; returns what they hold, and a message per bad one."""
    scans, broken = [], []
    progress = Progress(len(found), "looking at pair")
    for number, result in enumerate(in_order(_scan_or_message, found), 1):
        (scans if isinstance(result, Scan) else broken).append(result)
        progress.show(number, "", log=number % 500 == 0)
    return scans, broken


def _scan_or_message(pair: Pair) -> Scan | str:
    try:
        return _scan(pair)
    except (DataError, OSError) as error:
        return str(error)


def _scan(pair: Pair) -> Scan:
    """Reads one pair; raises DataError for what preparing the pair would refuse."""
    height, width = codec.check_image(pair.image.read_bytes(), str(pair.image))[1].shape[:2]
    if pair.mask is None:
        return Scan(pair, (height, width))
    data, where = pair.mask.read_bytes(), str(pair.mask)
    kind = _kind(data, where)
    raw = codec.read_mask(data, where, colours=kind == "RGB colours")
    if raw.shape != (height, width):
        raise DataError(
            f"{where}: the mask is {raw.shape[1]}x{raw.shape[0]}, its image {pair.image} "
            f"{width}x{height} (width x height after EXIF orientation); the two must be equal"
        )
    pixels, palette = _count(raw), {}
    if len(pixels) > MOST_IN_ONE:
        raise DataError(
            f"{where}: {len(pixels)} different values: a photograph or a smoothed picture, not a "
            "mask (are --images and --labels the right way round?)"
        )
    if kind == "palette ids":
        colours = Image.open(io.BytesIO(data)).getpalette("RGB") or []
        rgb = [r << 16 | g << 8 | b for r, g, b in zip(*[iter(colours)] * 3, strict=True)]
        palette = {index: rgb[index] for index in pixels if index < len(rgb)}
    return Scan(pair, (height, width), kind, pixels, palette)


def _kind(data: bytes, where: str) -> str:
    """Returns what a mask holds by its header; raises DataError for kinds that are not read."""
    header = codec.png_header(data)
    if header is None:
        what = "a JPEG" if data.startswith(b"\xff\xd8") else "not a whole PNG"
        raise DataError(f"{where}: {what} file of {len(data)} bytes; masks must be PNG files")
    if header not in PNG_KINDS:
        bits, colour_type = header
        sort = COLOUR_TYPES.get(colour_type, f"colour type {colour_type}")
        raise DataError(
            f"{where}: its pixels are {bits}-bit {sort}; masks must be PNG files of 8- or 16-bit "
            "grey, of palette indices or of 8-bit RGB"
        )
    return PNG_KINDS[header]


def _count(raw: np.ndarray) -> dict[int, int]:
    """Returns the number of pixels by value; runs of equal pixels are counted at once."""
    flat = raw.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    lengths = np.diff(starts, append=flat.size)
    values, inverse = np.unique(flat[starts], return_inverse=True)
    counts = np.bincount(inverse, weights=lengths)
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}


def _raw_pixels(scan: Scan, colours: bool) -> dict[int, int]:
    """Returns pixels by raw id: the colours of palette indices where colours count."""
    if not (colours and scan.kind == "palette ids"):
        return scan.pixels
    pixels: dict[int, int] = {}
    for index, count in scan.pixels.items():
        colour = scan.palette.get(index, 0)
        pixels[colour] = pixels.get(colour, 0) + count
    return pixels


def _values(scans: Sequence[Scan], want_colours: bool) -> classes.Values:
    """Joins what the masks hold.

    Raises:
      DataError: masks of two kinds, or palettes that give an index two colours; names two files.
    """
    masks = [scan for scan in scans if scan.kind]
    kinds = {scan.kind: str(scan.pair.mask) for scan in masks}
    if len(kinds) > 1:
        named = "; ".join(f"{kind}: {file}" for kind, file in kinds.items())
        raise DataError(f"masks of different kinds: {named}. Save all masks in one way")
    (kind,) = kinds
    palette: dict[int, tuple[int, str]] = {}
    by_colour = kind == "RGB colours" or (kind == "palette ids" and want_colours)
    for scan in [] if by_colour else masks:
        for index, colour in scan.palette.items():
            other, file = palette.setdefault(index, (colour, str(scan.pair.mask)))
            if other != colour:
                raise DataError(
                    f"palette index {index} is #{other:06x} in {file} and #{colour:06x} in "
                    f"{scan.pair.mask}: the indices do not mean the same everywhere. Give a file "
                    '--classes with colours, {"cat": "#FF0000"}, and the colours count'
                )
    first: dict[int, str] = {}
    for scan in masks:
        for raw in _raw_pixels(scan, by_colour):
            first.setdefault(raw, str(scan.pair.mask))
    richest = sorted(masks, key=lambda scan: -len(scan.pixels))[:3]
    return classes.Values(
        kind="palette colours" if by_colour and kind == "palette ids" else kind,
        colours=by_colour,
        first=first,
        palette={index: colour for index, (colour, _) in palette.items()},
        richest=tuple((str(scan.pair.mask), len(scan.pixels)) for scan in richest),
    )


def _split(scans: Sequence[Scan], seed: int, val_share: float) -> tuple[dict[str, list[Scan]], str]:
    """Returns the scans by split, and where the splits come from.

    Raises:
      DataError: some images lie in folders of splits and others do not; nothing is left to train
        or to evaluate on.
    """
    by_split: dict[str, list[Scan]] = {"train": [], "val": [], "test": []}
    outside = [scan for scan in scans if not scan.pair.split]
    inside = [scan for scan in scans if scan.pair.split]
    if outside and inside:
        raise DataError(
            f"{inside[0].pair.image} lies in a folder of a split, {outside[0].pair.image} does "
            "not: put all images into train, val (and test), or none"
        )
    for scan in inside:
        by_split[scan.pair.split].append(scan)
    if by_split["val"]:
        origin = "the folders"
        if not by_split["train"]:
            raise DataError("there is a folder val, but no image below a folder train")
    else:
        free = by_split["train"] or outside
        if len(free) < 2:
            raise DataError(f"{len(free)} labelled images to train on; at least 2 are needed")
        ordered = sorted(free, key=lambda scan: _draw(scan.pair.name, seed))
        held = sum(_draw(scan.pair.name, seed) < val_share for scan in free)
        held = min(max(held, 1), len(free) - 1)
        val = {scan.pair.name for scan in ordered[:held]}
        by_split["val"] = [scan for scan in free if scan.pair.name in val]
        by_split["train"] = [scan for scan in free if scan.pair.name not in val]
        origin = f"about {val_share:.0%} held back by the names and seed {seed}"
    return {split: rows for split, rows in by_split.items() if rows}, origin


def _draw(name: str, seed: int) -> float:
    """Returns a number in [0, 1) that follows from name and seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) / 2**64


def _item(pair: Pair) -> Item:
    return Item(pair.name, File(pair.image), File(pair.mask) if pair.mask else None)


def _listed(messages: Sequence[str], most: int = 20) -> list[str]:
    """A line for each message, and one for those beyond `most`."""
    more = [f"  and {len(messages) - most} more"] if len(messages) > most else []
    return [f"  {text}" for text in messages[:most]] + more
