"""Small downloads in the official layouts, drawn for tests: two or three images a split."""

import pathlib

import numpy as np
from PIL import Image

from duc_dlc_jax.data.labels import IGNORE

H, W = 12, 16


def write(path: pathlib.Path, array: np.ndarray, **options) -> pathlib.Path:
    """Saves an image or a mask; the format follows from the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def picture(seed: int = 0, shape: tuple[int, int] = (H, W)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def mask(*values: int, dtype: type = np.uint8) -> np.ndarray:
    return np.resize(np.array(values, dtype), (H, W))


def prepared(folder: pathlib.Path) -> pathlib.Path:
    """Prepares `camvid`, one image of which is stored in tiles; returns the data_dir."""
    from duc_dlc_jax.data.prepare import prepare

    camvid(folder / "raw")
    write(folder / "raw" / "val" / "c.png", np.resize(picture(), (1100, 1000, 3)))
    write(folder / "raw" / "valannot" / "c.png", np.resize(mask(4, 5), (1100, 1000)))
    prepare("camvid", str(folder / "raw"), folder / "data")
    return folder / "data"


def camvid(root: pathlib.Path) -> None:
    for split in ("train", "val"):
        for number, name in enumerate(("a", "b")):
            write(root / split / f"{name}.png", picture(number))
            write(root / f"{split}annot" / f"{name}.png", mask(number, 10, 11))


def cityscapes(root: pathlib.Path) -> None:
    for split in ("train", "val", "test"):
        write(root / "leftImg8bit" / split / "ulm" / "ulm_000001_000002_leftImg8bit.png", picture())
        if split != "test":
            write(
                root / "gtFine" / split / "ulm" / "ulm_000001_000002_gtFine_labelIds.png",
                mask(7, 0, 33),
            )


def ade20k(root: pathlib.Path) -> None:
    root = root / "ADEChallengeData2016"
    for split in ("training", "validation"):
        write(root / "images" / split / "x.jpg", picture())
        write(root / "annotations" / split / "x.png", mask(0, 1, 150))


def pascal_context(root: pathlib.Path, mats: bool = False) -> None:
    """mats: masks as .mat files of 459 ids instead of PNGs."""
    import scipy.io

    root = root / "VOCdevkit" / "VOC2010"
    listing = root / "ImageSets" / "SegmentationContext"
    listing.mkdir(parents=True)
    for number, split in enumerate(("train", "val")):
        name = f"2008_00000{number}"
        write(root / "JPEGImages" / f"{name}.jpg", picture())
        (listing / f"{split}.txt").write_text(f"{name}\n")
        if mats:
            (root / "trainval").mkdir(exist_ok=True)
            ids = mask(1, 2, 459, dtype=np.uint16)
            scipy.io.savemat(root / "trainval" / f"{name}.mat", {"LabelMap": ids})
        else:
            write(root / "SegmentationClassContext" / f"{name}.png", mask(0, 1, 59))


LAYOUTS = {  # maker, sorted train ids of the first record, labelled splits, unlabelled splits
    "camvid": (camvid, [0, 10, IGNORE], ["train", "val"], []),
    "cityscapes": (cityscapes, [0, 18, IGNORE], ["train", "val"], ["test"]),
    "ade20k": (ade20k, [0, 149, IGNORE], ["train", "val"], []),
    "pascal_context": (pascal_context, [0, 58, IGNORE], ["train", "val"], []),
    "pascal_context_60": (pascal_context, [0, 1, 59], ["train", "val"], []),
}
