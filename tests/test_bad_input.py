"""Every bad input to its message; the table of docs/datasets.md is what these tests found.

UPDATE_DOCS=1 writes the table anew.
"""

from __future__ import annotations

import dataclasses
import fcntl
import io
import os
import pathlib
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

import layouts
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import verify
from duc_dlc_jax.data.labels import DataError
from duc_dlc_jax.data.prepare import prepare
from layouts import mask, picture, write

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "datasets.md"
BEGIN, END = "<!-- bad input: begin -->\n", "<!-- bad input: end -->\n"


@dataclasses.dataclass(frozen=True)
class Case:
    """A download with one thing wrong.

    Attributes:
      what: the row's title.
      name: of the data set, as given to --dataset.
      spoil: changes a folder that holds a good small download.
      raw: what --raw_dir gets, below that folder.
      strict: prepare --strict; verify has no such flag.
    """

    what: str
    name: str
    spoil: Callable[[pathlib.Path], None]
    raw: str = ""
    strict: bool = False


def cut(path: pathlib.Path, share: float = 0.5) -> None:
    """Leaves the first `share` of a file's bytes."""
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def as_it_is(root: pathlib.Path) -> None:
    """Changes nothing."""


def emptied(root: pathlib.Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def full_ade20k(root: pathlib.Path) -> None:
    emptied(root)
    write(root / "ADE20K_2021_17_01/images/ADE/training/abbey/x_seg.png", picture())


def instances(root: pathlib.Path) -> None:
    emptied(root)
    write(root / "annotations_instance/training/x.png", picture())


def without_label_map(root: pathlib.Path) -> None:
    import scipy.io

    emptied(root)
    layouts.pascal_context(root, mats=True)
    path = next((root / "VOCdevkit").rglob("trainval/*0.mat"))
    scipy.io.savemat(path, {"Labels": mask(1)})


def float_label_map(root: pathlib.Path) -> None:
    import scipy.io

    emptied(root)
    layouts.pascal_context(root, mats=True)
    path = next((root / "VOCdevkit").rglob("trainval/*0.mat"))
    scipy.io.savemat(path, {"LabelMap": mask(1).astype(np.float64)})


def colour_masks(root: pathlib.Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(root / f"{split}annot")
        for name in ("a", "b"):
            colours = np.full((*mask(0).shape, 3), (128, 0, 0), np.uint8)
            colours[0, 0] = (1, 2, 3) if (split, name) == ("val", "b") else (64, 0, 128)
            write(root / f"{split}_labels" / f"{name}_L.png", colours)


def zipped(member: str, mode: int = 0o100644) -> Callable[[pathlib.Path], None]:
    """Adds an archive with one member; mode: its Unix file mode."""

    def spoil(root: pathlib.Path) -> None:
        info = zipfile.ZipInfo(member)
        info.external_attr = mode << 16
        with zipfile.ZipFile(root / "more.zip", "w") as archive:
            archive.writestr(info, b"anything")

    return spoil


def tarred(kind: bytes) -> Callable[[pathlib.Path], None]:
    """Adds an archive with one member that is no file; kind: tarfile's type."""

    def spoil(root: pathlib.Path) -> None:
        info = tarfile.TarInfo("train/c.png")
        info.type, info.linkname = kind, "../../secret"
        with tarfile.open(root / "more.tar", "w") as archive:
            archive.addfile(info)

    return spoil


def flipped_bit(root: pathlib.Path) -> None:
    """Moves a mask into an archive and changes one byte of it there."""
    path = root / "trainannot" / "a.png"
    data = path.read_bytes()
    with zipfile.ZipFile(root / "trainannot.zip", "w") as archive:
        archive.writestr("trainannot/a.png", data)
    path.unlink()
    whole = (root / "trainannot.zip").read_bytes()
    spoiled = data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
    (root / "trainannot.zip").write_bytes(whole.replace(data, spoiled))


def truncated_zip(root: pathlib.Path) -> None:
    with zipfile.ZipFile(root / "camvid.zip", "w") as archive:
        archive.writestr("train/a.png", bytes(1000))
    cut(root / "camvid.zip")


def sixteen_bit_image(root: pathlib.Path) -> None:
    write(root / "train/a.png", np.full(mask(0).shape, 300, np.uint16))


def palette_of_the_wrong_ids(root: pathlib.Path) -> None:
    from PIL import Image

    indexed = Image.fromarray(mask(3, 200)).convert("P")
    indexed.putpalette([1, 1, 1] * 256)
    indexed.save(root / "trainannot/a.png")


def gif(root: pathlib.Path) -> None:
    path = write(root / "train/a.gif", picture())
    path.rename(root / "train/a.png")


CASES = [
    Case("a data set that does not exist", "camvit", emptied),
    Case("no such folder", "camvid", shutil.rmtree),
    Case("an empty folder", "camvid", emptied),
    Case("another data set's folder", "cityscapes", as_it_is),
    Case("no archive and no folder", "camvid", lambda r: cut(r / "val/a.png"), raw="val/a.png"),
    Case("an image without its mask", "camvid", lambda r: (r / "trainannot/a.png").unlink()),
    Case("a mask without its image", "camvid", lambda r: (r / "train/a.png").unlink()),
    Case(
        "a listed image that is missing",
        "pascal_context",
        lambda r: next(r.rglob("JPEGImages/*1.jpg")).unlink(),
    ),
    Case("a split that is missing, or another number of images", "camvid", as_it_is, strict=True),
    Case("the full ADE20K archive", "ade20k", full_ade20k),
    Case("ADE20K's instance masks", "ade20k", instances),
    Case("an RGB mask where ids are expected", "camvid", lambda r: write_mask(r, picture())),
    Case("a colour that is no class", "camvid", colour_masks),
    Case("a value outside the contract", "camvid", lambda r: write_mask(r, mask(0, 12, 255))),
    Case(
        "a 16-bit mask with such a value",
        "camvid",
        lambda r: write_mask(r, mask(1, 256, dtype=np.uint16)),
    ),
    Case("a palette mask with such an index", "camvid", palette_of_the_wrong_ids),
    Case("a mask of another size", "camvid", lambda r: write_mask(r, mask(0)[:, :-2])),
    Case(
        "a mask that lies as the pixels of an EXIF-turned photo do",
        "ade20k",
        lambda r: turn(next(r.rglob("images/training/x.jpg"))),
    ),
    Case("a truncated PNG image", "camvid", lambda r: cut(r / "train/a.png")),
    Case(
        "a truncated JPEG image",
        "ade20k",
        lambda r: cut(next(r.rglob("images/validation/x.jpg")), 0.95),
    ),
    Case("a truncated mask", "camvid", lambda r: cut(r / "trainannot/a.png", 0.9)),
    Case("no image at all", "camvid", lambda r: (r / "train/a.png").write_text("<html>") and None),
    Case("an empty file", "camvid", lambda r: cut(r / "trainannot/a.png", 0)),
    Case("an image of another format", "camvid", gif),
    Case("a 16-bit image", "camvid", sixteen_bit_image),
    Case("a .mat file without LabelMap", "pascal_context", without_label_map),
    Case("a LabelMap that is not of integers", "pascal_context", float_label_map),
    Case("an archive that leaves its folder", "camvid", zipped("../train/c.png")),
    Case("an archive with an absolute path", "camvid", zipped("/train/c.png")),
    Case("an archive with a link (.zip)", "camvid", zipped("train/c.png", 0o120777)),
    Case("an archive with a link (.tar)", "camvid", tarred(tarfile.SYMTYPE)),
    Case("an archive with a device", "camvid", tarred(tarfile.CHRTYPE)),
    Case("an incomplete archive", "camvid", truncated_zip),
    Case("a damaged member of an archive", "camvid", flipped_bit),
]


def write_mask(root: pathlib.Path, ids: np.ndarray) -> None:
    write(root / "trainannot" / "a.png", ids)


def turn(path: pathlib.Path) -> None:
    """Gives a photo the EXIF orientation 6: to be turned by 90 degrees."""
    from PIL import Image

    exif = Image.Exif()
    exif[274] = 6
    write(path, picture(), exif=exif)


def message(call: Callable[[], object], folder: pathlib.Path) -> str:
    """Returns the error of a call."""
    with pytest.raises((ConfigError, DataError)) as caught:
        call()
    return plain(caught.value, folder)


def plain(said: object, folder: pathlib.Path) -> str:
    """Leaves out of a message what differs between machines and encoders."""
    text = str(said).replace(str(folder), "DIR")
    return re.sub(r"\d+ bytes not processed", "N bytes not processed", text)


def messages_of(case: Case, folder: pathlib.Path) -> set[str]:
    """Returns what prepare and verify say of a bad download."""
    root = folder / "raw"
    maker = case.name if case.name in ("ade20k", "pascal_context") else "camvid"
    getattr(layouts, maker)(root)
    case.spoil(root)
    raw = str(root / case.raw)
    found = {message(lambda: prepare(case.name, raw, folder / "data", case.strict), folder)}
    if case.strict:
        return found
    try:
        report = verify.verify_download(case.name, raw)
    except (ConfigError, DataError) as error:
        return found | {plain(error, folder)}
    return found | {plain(problem.message, folder) for problem in report.problems}


def second_prepare(folder: pathlib.Path) -> str:
    """Returns what prepare says while another process holds the lock of the data set."""
    layouts.camvid(folder / "raw")
    (folder / "data" / "camvid").mkdir(parents=True)
    with open(folder / "data" / "camvid" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return message(lambda: prepare("camvid", str(folder / "raw"), folder / "data"), folder)


def test_the_table_of_the_document_is_what_the_commands_say(tmp_path, capsys):
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    rows = []
    for number, case in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = messages_of(case, folder)
        assert len(found) == 1, f"{case.what}: prepare and verify differ: {found}"
        rows.append((case.what, found.pop()))
        outside = {path.name for path in folder.iterdir()} - {"raw", "data"}
        assert not outside, f"{case.what}: wrote {outside}"
        assert not list(folder.glob("data/*/*/*.json")), f"{case.what}: it looks prepared"
    folder = tmp_path / "second"
    folder.mkdir()
    rows.append(("a second `prepare` at the same time", second_prepare(folder)))
    table = "| bad input | message |\n|---|---|\n" + "".join(
        f"| {what} | {code(said)} |\n" for what, said in rows
    )
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    written, after = rest.split(END)
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.write_text(before + BEGIN + table + END + after)
    else:
        assert written == table, "UPDATE_DOCS=1 pytest tests/test_bad_input.py writes the table"


def code(said: str) -> str:
    """Writes a message as a code span of a Markdown table."""
    assert "|" not in said
    assert "\n" not in said
    return f"`` {said} ``" if "`" in said else f"`{said}`"


def test_what_looks_odd_but_is_right_is_accepted(tmp_path):
    """Palette masks are read as indices, 16-bit masks exactly, EXIF-turned photos turned."""
    from PIL import Image

    layouts.camvid(tmp_path)
    indexed = Image.fromarray(mask(3, 7)).convert("P")
    indexed.putpalette([value for i in range(256) for value in (255 - i, 3, i)])
    indexed.save(tmp_path / "trainannot/a.png")
    write(tmp_path / "valannot/a.png", mask(10, 11, dtype=np.uint16))
    report = verify.verify_download("camvid", str(tmp_path))
    assert report.problems == []
    half = mask(0).size // 2
    assert np.flatnonzero(report.splits["train"]["pixels"]).tolist() == [1, 3, 7, 10, 255]
    assert report.splits["train"]["pixels"][7] == half
    assert report.splits["val"]["pixels"][10] > half

    layouts.ade20k(tmp_path / "ade")
    photo = next(tmp_path.rglob("images/training/x.jpg"))
    turn(photo)
    write(next(tmp_path.rglob("annotations/training/x.png")), np.full((16, 12), 1, np.uint8))
    report = verify.verify_download("ade20k", str(tmp_path / "ade"))
    assert report.problems == []
    assert report.turned == [str(photo)]


@pytest.mark.parametrize("name", ["camvid", "cityscapes", "ade20k", "pascal_context", "mats"])
def test_a_good_download_in_a_zip_is_accepted(name, tmp_path):
    if name == "mats":
        name = "pascal_context_60"
        layouts.pascal_context(tmp_path / "raw", mats=True)
    else:
        getattr(layouts, name)(tmp_path / "raw")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted((tmp_path / "raw").rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "raw"))
    inside = verify.verify_download(name, str(tmp_path / "all.zip"))
    unpacked = verify.verify_download(name, str(tmp_path / "raw"))
    assert inside.problems == []
    assert inside.splits == unpacked.splits
    assert set(inside.splits) >= {"train", "val"}


def test_members_of_hostile_archives_are_never_written(tmp_path):
    """A .tar.gz is unpacked to be read: its evil members must not be."""
    layouts.camvid(tmp_path / "raw")
    with tarfile.open(tmp_path / "raw" / "more.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("../../escaped.png")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"bad"))
    with pytest.raises(DataError, match=r"'../../escaped.png' points out of its folder; refused"):
        verify.verify_download("camvid", str(tmp_path / "raw"))
    assert not list(tmp_path.parent.rglob("escaped*"))
