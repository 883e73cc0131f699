"""Which image below one folder belongs to which mask below another."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterable

from duc_dlc_jax.data.builders.files import walk
from duc_dlc_jax.data.labels import DataError

CLASSES = "classes.json"  # the file of classes, where it lies among the masks
IMAGES = (".png", ".jpg", ".jpeg")
MASK_ENDING = re.compile(
    r"[_-](masks?|labels?|labelids|labeltrainids|gt|seg|segmentation|annotation|gtfine_labelids|gtfine_labeltrainids)$",
    re.IGNORECASE,
)
IMAGE_ENDING = re.compile(r"[_-](images?|img|rgb|sat|leftimg8bit)$", re.IGNORECASE)
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")
Files = dict[str, pathlib.Path]  # by path below the folder, without suffix, "/" between the names


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and its mask (None: without labels), and the path they share without suffix."""

    name: str
    image: pathlib.Path
    mask: pathlib.Path | None

    @property
    def split(self) -> str:
        """The split that the first folder of the name says: train, val, test or ""."""
        return folder_split(self.name)


def folder_split(name: str) -> str:
    first, slash, _ = name.partition("/")
    return SPLITS.get(first.lower(), "") if slash else ""


def find_pairs(
    images_dir: pathlib.Path, labels_dir: pathlib.Path
) -> tuple[list[Pair], list[str], collections.Counter[str]]:
    """Pairs images and masks of one path, but for suffix and endings of the name, in name order.

    Images of a folder "test" need no masks, if none of them has one.

    Returns:
      The pairs, a line of text for each file without a partner, and the number of files of other
      types by suffix.

    Raises:
      FileNotFoundError: no such folder.
      DataError: one folder for both, no images, no PNG masks, no pair, two files for one name, or
        a name that is not UTF-8.
    """
    for flag, folder in (("images", images_dir), ("labels", labels_dir)):
        if not folder.is_dir():
            raise FileNotFoundError(f"--{flag}={folder}: no such folder")
    if images_dir.resolve() == labels_dir.resolve():
        raise DataError(f"--images and --labels are both {images_dir}; give two folders")
    photos, drawn = _walk(images_dir, labels_dir), _walk(labels_dir, images_dir)
    images = _images(images_dir, photos)
    # An image by its name, and by its name without ending where no other has that.
    by_name = {IMAGE_ENDING.sub("", name): name for name in images} | {
        name: name for name in images
    }
    masks = _masks(labels_dir, drawn, by_name)
    if not set(images) & set(masks):
        raise DataError(
            f"no mask has the name of an image: {len(images)} images, first "
            f"{images[min(images)]}; {len(masks)} masks, first {masks[min(masks)]}. An image "
            "a/b.jpg or a/b_image.jpg below --images and its mask a/b.png or a/b_mask.png below "
            "--labels belong together"
        )
    test = {name for name in images if folder_split(name) == "test"}
    unlabelled = set() if test & set(masks) else test
    paired = sorted((set(images) & set(masks)) | unlabelled)
    other_images = {_bare(name): path for name, path in photos.items() if not _is_image(path)}
    other_masks = {
        _image_of(name, by_name): path for name, path in drawn.items() if not _is_mask(path)
    }

    alone = [
        f"{files[name]}: {alone}"
        if name not in unread
        else f"{files[name]}: its {other} is {unread[name]}; only {types} is read"
        for files, partners, alone, other, unread, types in (
            (images, {*masks, *unlabelled}, "an image without a mask", "mask", other_masks, "PNG"),
            (masks, images, "a mask without an image", "image", other_images, "PNG or JPEG"),
        )
        for name in sorted(set(files) - set(partners))
    ]
    unread = [*other_images.values(), *(p for p in other_masks.values() if p.name != CLASSES)]
    others = collections.Counter(path.suffix.lower() or "without suffix" for path in unread)
    return [Pair(name, images[name], masks.get(name)) for name in paired], alone, others


def _is_image(path: pathlib.Path) -> bool:
    return path.suffix.lower() in IMAGES


def _is_mask(path: pathlib.Path) -> bool:
    return path.suffix.lower() == ".png"


def _image_of(name: str, by_name: dict[str, str]) -> str:
    """The name of the image that a mask of this name belongs to."""
    bare = _bare(name)
    return by_name.get(bare) or by_name.get(MASK_ENDING.sub("", bare), bare)


def _walk(folder: pathlib.Path, outside: pathlib.Path) -> Files:
    """Returns the files below a folder by path with suffix; not those `outside`.

    Raises DataError for a name that is not UTF-8, which no record could hold.
    """
    outside, found = outside.resolve(), walk(folder)
    for name in found:
        raw = os.fsencode(name)
        if raw.decode(errors="ignore") != name:
            raise DataError(f"{folder}: the name {raw} in it is not UTF-8; rename it")
    if not outside.is_relative_to(folder.resolve()):
        return found
    return {name: path for name, path in found.items() if outside not in path.resolve().parents}


def _images(folder: pathlib.Path, found: Files) -> Files:
    images: Files = {}
    for name, path in found.items():
        if _is_image(path):
            other = images.setdefault(_bare(name), path)
            if other != path:
                raise DataError(f"{other} and {path} have one name; keep one of the two")
    if not images:
        raise DataError(_nothing(folder, "PNG or JPEG images", found))
    return images


def _masks(folder: pathlib.Path, found: Files, by_name: dict[str, str]) -> Files:
    """Returns the PNG masks by the name of their image; by_name: see `_image_of`."""
    masks: Files = {}
    for name, path in found.items():
        if _is_mask(path):
            other = masks.setdefault(_image_of(name, by_name), path)
            if other != path:
                raise DataError(f"{other} and {path} are masks of one image; keep one of the two")
    jpeg = [
        path
        for name, path in found.items()
        if _is_image(path) and _image_of(name, by_name) in set(by_name.values()) - set(masks)
    ]
    if jpeg:
        raise DataError(
            f"{len(jpeg)} masks are JPEG files, first {jpeg[0]}. JPEG mixes the values of "
            "neighbouring pixels, so that they name no class any more: export the masks as PNG"
        )
    if not masks:
        raise DataError(_nothing(folder, "PNG masks", found))
    return masks


def _bare(name: str) -> str:
    """A name without suffix, its letters composed: macOS takes accents apart, others do not."""
    name = unicodedata.normalize("NFC", name)
    return pathlib.PurePosixPath(name).with_suffix("").as_posix()


def _nothing(folder: pathlib.Path, wanted: str, found: Iterable[str]) -> str:
    suffixes = collections.Counter(pathlib.PurePosixPath(name).suffix.lower() for name in found)
    there = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in suffixes.most_common(5))
    return f"{folder}: no {wanted} below it; it has {there or 'no files'}"
