"""Pictures and videos that a user names: found, measured, read."""

from __future__ import annotations

import collections
import dataclasses
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from absl import logging
from PIL import Image

from duc_dlc_jax.data import codec
from duc_dlc_jax.data.builders.files import walk
from duc_dlc_jax.data.labels import DataError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
RATE = 25.0  # frames/s where a video does not say

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Input:
    """One file; `name` is unique among those found, and fit for a file of results."""

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEOS

    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels as it will be shown, by its header; None: unreadable."""
        try:
            if self.is_video:
                return Video(self.path).size
            with Image.open(self.path) as image:
                turned = codec.exif_orientation(image) >= 5
                return (image.width, image.height) if turned else (image.height, image.width)
        except (DataError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None  # reading it will say why

    def image(self) -> np.ndarray | str:
        """RGB uint8 [H, W, 3], turned as its EXIF orientation says, or why it cannot be read."""
        try:
            return codec.decode_image(self.path.read_bytes(), str(self.path))
        except (DataError, OSError) as error:
            return str(error) if str(self.path) in str(error) else f"{self.path}: {error}"


class Video:
    """The frames of a video file, as many as OpenCV reads, turned as the file says.

    Raises DataError where it opens nothing.
    """

    def __init__(self, path: Path):
        self._capture = cv2.VideoCapture(str(path))
        self.size = self._get(cv2.CAP_PROP_FRAME_HEIGHT), self._get(cv2.CAP_PROP_FRAME_WIDTH)
        if not self._capture.isOpened() or min(self.size) < 1:
            raise DataError(f"{path}: OpenCV finds no video in it")
        self.frames = max(self._get(cv2.CAP_PROP_FRAME_COUNT), 0)  # by its header; may be wrong
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else RATE

    def _get(self, name: int) -> int:
        return round(self._capture.get(name))

    def __iter__(self) -> Iterator[np.ndarray]:
        """RGB uint8 [H, W, 3], once."""
        while True:
            there, frame = self._capture.read()
            if not there:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def find(texts: Sequence[str], without: str | os.PathLike) -> list[Input]:
    """The files, those below folders and those that patterns (`photos/**/*.jpg`) match, sorted.

    A folder is searched for images and videos by their names' endings, and a warning counts the
    others; hidden files and what lies in the folder `without` (of results) are left out. Names are
    paths with underscores for folders, and keep their ending where two would be alike.

    Raises FileNotFoundError, naming the text, where nothing is found.
    """
    results = Path(without).resolve()
    paths: dict[Path, str] = {}  # and the name without ending
    for text in texts:
        path = Path(text)
        if path.is_dir():
            found, root = list(walk(path).values()), path
        else:
            found = [path] if path.exists() else sorted(map(Path, glob.glob(text, recursive=True)))
            root = _common(found)
        files = [p for p in found if p.is_file()]
        there = [p for p in files if results not in p.resolve().parents]
        found = [p for p in there if not path.is_dir() or p.suffix.lower() in IMAGES + VIDEOS]
        if not found:
            raise FileNotFoundError(f"--input={text}: {_nothing(path, files, there, without)}")
        _tell_passed_over(text, set(there) - set(found))
        paths |= {p: "_".join(p.relative_to(root).with_suffix("").parts) for p in found}
    alike = collections.Counter(paths.values())
    names: dict[str, Path] = {}
    for path, name in paths.items():
        wanted = name if alike[name] == 1 else name + path.suffix.replace(".", "_")
        unique, number = wanted, 2
        while unique in names:
            unique, number = f"{wanted}_{number}", number + 1
        names[unique] = path
    return [Input(path, name) for name, path in names.items()]


def _nothing(path: Path, files: list[Path], there: list[Path], without: str | os.PathLike) -> str:
    """Why there is nothing to label; files: what was found, there: without that of the results."""
    if files and not there:
        return f"nothing but files in --output={without}, which is passed over; name another folder"
    return f"no file that ends with {', '.join(IMAGES + VIDEOS)}" if path.is_dir() else "no file"


def _tell_passed_over(text: str, paths: set[Path]) -> None:
    if paths:
        suffixes = collections.Counter(path.suffix.lower() or "without ending" for path in paths)
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))
        logging.warning("--input=%s: passed over %s, first %s", text, counts, min(paths))


def _common(paths: list[Path]) -> Path:
    """The deepest folder that holds all of them."""
    parents = [path.parent for path in paths]
    root = parents[0] if parents else Path()
    while not all(root in (parent, *parent.parents) for parent in parents):
        root = root.parent
    return root
