"""What `prepare` finds: every layout of each data set, in folders and in archives."""

import io
import os
import pathlib
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.io

import layouts
from duc_dlc_jax.data import codec
from duc_dlc_jax.data.builders import files, sources
from duc_dlc_jax.data.builders.examples import read_label
from duc_dlc_jax.data.labels import IGNORE, DataError, label_spec
from duc_dlc_jax.data.prepare import count_differences, listing_of
from layouts import LAYOUTS, H, W, mask, picture, write

SHARED = os.environ.get("DUC_DLC_SHARED_DATA", "")


def train_ids(name, root, split="train"):
    """The masks' kind, and the train ids of each item of a split by name."""
    with listing_of(name, str(root)) as (listing, spec):
        found = {
            item.name: sorted(set(read_label(item, spec, (H, W)).ravel().tolist()))
            for item in listing.splits[split]
        }
        return listing.masks, found


def packed(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """Packs a folder's content into one archive beside it."""
    archive = folder.parent / f"{folder.name}{kind}"
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    if kind == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
            for path in paths:
                out.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, "w:gz" if kind == ".tar.gz" else "w") as out:
            for path in paths:
                out.add(path, path.relative_to(folder))
    return archive


@pytest.mark.parametrize("kind", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("name", ["camvid", "cityscapes", "ade20k", "pascal_context"])
def test_archives_hold_the_same_items_as_folders(name, kind, tmp_path):
    LAYOUTS[name][0](tmp_path / "raw")
    expected = train_ids(name, tmp_path / "raw")
    archive = packed(tmp_path / "raw", kind)
    assert train_ids(name, archive) == expected
    (tmp_path / "downloads").mkdir()
    archive.rename(tmp_path / "downloads" / archive.name)
    assert train_ids(name, tmp_path / "downloads") == expected


def test_several_archives_join_and_unpacked_files_come_first(tmp_path):
    layouts.cityscapes(tmp_path / "raw")
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    for top in ("leftImg8bit", "gtFine"):
        (tmp_path / top).mkdir()
        (tmp_path / "raw" / top).rename(tmp_path / top / top)
        packed(tmp_path / top, ".zip").rename(downloads / f"{top}_trainvaltest.zip")
    assert train_ids("cityscapes", downloads)[1] == {"ulm_000001_000002": [0, 18, IGNORE]}
    write(downloads / "gtFine/train/ulm/ulm_000001_000002_gtFine_labelIds.png", mask(8))
    assert train_ids("cityscapes", downloads)[1] == {"ulm_000001_000002": [1]}


@pytest.mark.parametrize("kind", ["", ".zip", ".tar", ".tar.gz"])
def test_what_macos_adds_is_passed_over(kind, tmp_path):
    layouts.camvid(tmp_path / "raw")
    expected = train_ids("camvid", tmp_path / "raw")
    for name in ("train/._a.png", "__MACOSX/train/c.png", ".Trashes/trainannot/d.png"):
        write(tmp_path / "raw" / name, picture())
    assert train_ids("camvid", packed(tmp_path / "raw", kind) if kind else tmp_path / "raw") == (
        expected
    )


def test_linked_folders_are_read(tmp_path):
    layouts.camvid(tmp_path / "raw")
    expected = train_ids("camvid", tmp_path / "raw")
    (tmp_path / "links").mkdir()
    for folder in (tmp_path / "raw").iterdir():
        (tmp_path / "links" / folder.name).symlink_to(folder)
    assert train_ids("camvid", tmp_path / "links") == expected


def zip_with(path, name, mode=0):
    with zipfile.ZipFile(path, "w") as out:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        out.writestr(info, b"x")


def tar_with(path, name, kind=tarfile.REGTYPE):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as out:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        out.addfile(info, io.BytesIO())


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/evil.png", "C:/evil.png"])
@pytest.mark.parametrize("kind", [".zip", ".tar", ".tar.gz"])
def test_members_that_leave_the_folder_are_refused(name, kind, tmp_path):
    archive = tmp_path / "inside" / f"download{kind}"
    archive.parent.mkdir()
    (zip_with if kind == ".zip" else tar_with)(archive, name)
    with pytest.raises(DataError, match=r"points out of its folder; refused"):
        train_ids("camvid", archive)
    assert [p.name for p in tmp_path.rglob("*")] == ["inside", archive.name]


def test_links_and_devices_are_refused(tmp_path):
    zip_with(tmp_path / "link.zip", "link", 0o120777)
    tar_with(tmp_path / "link.tar", "link", tarfile.SYMTYPE)
    tar_with(tmp_path / "hard.tar", "hard", tarfile.LNKTYPE)
    tar_with(tmp_path / "device.tar.gz", "device", tarfile.CHRTYPE)
    for archive in sorted(tmp_path.iterdir()):
        with pytest.raises(DataError, match="is a link or device; refused"):
            train_ids("camvid", archive)


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_damaged_archives_are_named(kind, tmp_path):
    LAYOUTS["camvid"][0](tmp_path / "raw")
    archive = packed(tmp_path / "raw", kind)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"raw{kind}: unreadable or incomplete archive"):
        train_ids("camvid", archive)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="neither a folder nor an archive"):
        train_ids("camvid", tmp_path / "notes.txt")


def test_a_flipped_byte_in_a_zip_is_found_by_its_checksum(tmp_path):
    write(tmp_path / "raw" / "a.png", picture())
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as out:
        out.write(tmp_path / "raw" / "a.png", "a.png")
    data = bytearray((tmp_path / "raw.zip").read_bytes())
    data[120] ^= 1
    (tmp_path / "raw.zip").write_bytes(data)
    with files.find(tmp_path / "raw.zip") as found, pytest.raises(DataError, match="damaged"):
        found["a.png"].read()


def test_cityscapes_with_train_ids_and_coarse_labels(tmp_path):
    write(tmp_path / "leftImg8bit/train/ulm/ulm_000001_000002_leftImg8bit.png", picture())
    write(
        tmp_path / "gtFine/train/ulm/ulm_000001_000002_gtFine_labelTrainIds.png", mask(0, 18, 255)
    )
    assert train_ids("cityscapes", tmp_path) == (
        "train_ids",
        {"ulm_000001_000002": [0, 18, IGNORE]},
    )
    write(tmp_path / "leftImg8bit/train_extra/graz/graz_1_2_leftImg8bit.png", picture())
    write(tmp_path / "gtCoarse/train_extra/graz/graz_1_2_gtCoarse_labelTrainIds.png", mask(13, 255))
    found = train_ids("cityscapes", tmp_path, "train_extra")
    assert found == ("train_ids", {"graz_1_2": [13, IGNORE]})
    lines = count_differences(sources.SOURCES["cityscapes"], {"train": 2975, "train_extra": 1})
    assert "split train_extra: 1 images, officially 19998" in lines


def test_ade20k_test_images_have_no_labels(tmp_path):
    LAYOUTS["ade20k"][0](tmp_path)
    write(tmp_path / "release_test/testing/ADE_test_00000001.jpg", picture())
    with listing_of("ade20k", str(tmp_path)) as (listing, _):
        (item,) = listing.splits["test"]
    assert (item.name, item.label) == ("ADE_test_00000001", None)


def test_pascal_context_from_its_original_mat_files(tmp_path):
    layouts.pascal_context(tmp_path, mats=True)
    found = train_ids("pascal_context", tmp_path)
    assert found == ("source_ids", {"2008_000000": [0, IGNORE]})
    assert train_ids("pascal_context_60", tmp_path)[1] == {"2008_000000": [0, 1]}
    lists = tmp_path / "VOCdevkit/VOC2010/ImageSets"
    (lists / "SegmentationContext").rename(lists / "Main")  # VOC2010's own lists
    assert train_ids("pascal_context", tmp_path) == found


def test_mat_files_without_a_label_map_are_named():
    data = io.BytesIO()
    scipy.io.savemat(data, {"other": np.zeros((2, 2))})
    for content in (data.getvalue(), b"no mat file"):
        with pytest.raises(DataError, match=r"x.mat: no readable array LabelMap"):
            codec.read_mask(content, "x.mat")


def colour_mask(*colours):
    return np.resize(np.array(colours, np.uint8), (H, W, 3))


@pytest.mark.parametrize("layout", ["folders", "flat"])
def test_camvid_with_32_colours(layout, tmp_path):
    names = {"train": "0001TP_006690", "val": "0016E5_07959", "test": "Seq05VD_f00000"}
    for split, name in names.items():
        image, label = f"{split}/{name}.png", f"{split}_labels/{name}_L.png"
        if layout == "flat":
            image, label = f"701_StillsRaw_full/{name}.png", f"LabeledApproved_full/{name}_L.png"
        write(tmp_path / image, picture())
        write(tmp_path / label, colour_mask((128, 128, 128), (0, 128, 192), (0, 0, 0)))
    for split, name in names.items():
        assert train_ids("camvid", tmp_path, split) == ("colours", {name: [0, 10, IGNORE]})


@pytest.mark.real_data
@pytest.mark.skipif(not SHARED, reason="DUC_DLC_SHARED_DATA is not set: no real CamVid")
def test_the_split_by_sequence_and_frame_is_that_of_the_real_folders():
    for split in ("train", "val"):
        names = [p.stem for p in (pathlib.Path(SHARED) / "camvid" / split).glob("*.png")]
        assert {sources._camvid_split(name) for name in names} == {split}


def test_the_cityscapes_table_is_that_of_the_official_scripts():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    spec = label_spec("cityscapes")
    official = {label.id: label for label in labels if label.id >= 0}
    assert {i: IGNORE if x.ignoreInEval else x.trainId for i, x in official.items()} == (
        spec.raw_to_train
    )
    for k, (name, colour, raw) in enumerate(
        zip(spec.classes, spec.palette, spec.submission_ids, strict=True)
    ):
        assert (official[raw].trainId, official[raw].name) == (k, name)
        assert official[raw].color == colour
