"""Small data sets in the official layouts, made of random pictures and chosen labels."""

import pathlib

import numpy as np
from PIL import Image

from duc_dlc_jax.data.labels import IGNORE

H, W = 12, 16


def write(path: pathlib.Path, array: np.ndarray, **options) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3)).astype(np.uint8)


def mask(*values: int) -> np.ndarray:
    return np.resize(np.array(values, np.uint8), (H, W))


def make_camvid(root):
    for split in ("train", "val"):
        write(root / split / "b.png", picture(1))
        write(root / f"{split}annot" / "b.png", mask(0, 10, 11))
        write(root / split / "a.png", picture(0))
        write(root / f"{split}annot" / "a.png", mask(3))


def make_cityscapes(root):
    for split in ("train", "val", "test"):
        write(root / "leftImg8bit" / split / "ulm" / "ulm_1_2_leftImg8bit.png", picture())
        if split != "test":
            write(root / "gtFine" / split / "ulm" / "ulm_1_2_gtFine_labelIds.png", mask(7, 0, 33))


def make_ade20k(root):
    root = root / "ADEChallengeData2016"
    for split in ("training", "validation"):
        write(root / "images" / split / "x.jpg", picture())
        write(root / "annotations" / split / "x.png", mask(0, 1, 150))


def make_pascal_context(root):
    root = root / "VOCdevkit" / "VOC2010"
    listing = root / "ImageSets" / "SegmentationContext"
    listing.mkdir(parents=True)
    for split in ("train", "val"):
        write(root / "JPEGImages" / f"{split}1.jpg", picture())
        write(root / "SegmentationClassContext" / f"{split}1.png", mask(0, 1, 59))
        (listing / f"{split}.txt").write_text(f"{split}1\n")


LAYOUTS = {  # maker, sorted train ids of the first record, labelled splits, unlabelled splits
    "camvid": (make_camvid, [3], ["train", "val"], []),
    "cityscapes": (make_cityscapes, [0, 18, IGNORE], ["train", "val"], ["test"]),
    "ade20k": (make_ade20k, [0, 149, IGNORE], ["train", "val"], []),
    "pascal_context": (make_pascal_context, [0, 58, IGNORE], ["train", "val"], []),
    "pascal_context_60": (make_pascal_context, [0, 1, 59], ["train", "val"], []),
}
