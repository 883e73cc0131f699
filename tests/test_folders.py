"""Folders of one's own: pairs, splits, the label contract, and every bad input to its message."""

import dataclasses
import json
import os
import pathlib
import unicodedata

import numpy as np
import pytest
from PIL import Image

from duc_dlc_jax.data import folders
from duc_dlc_jax.data.builders import scenes
from duc_dlc_jax.data.labels import IGNORE, DataError

H, W = 12, 16
RED, GREEN = (255, 0, 0), (0, 128, 0)


def write(path: pathlib.Path, array: np.ndarray, palette=(), **options) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image.putpalette([v for colour in palette for v in colour] + [0] * 3 * (256 - len(palette)))
    image.save(path, **options)
    return path


def picture(height=H, width=W) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)


def ids(*values: int, dtype=np.uint8) -> np.ndarray:
    return np.resize(np.array(values, dtype), (H, W))


def rgb(*colours) -> np.ndarray:
    return np.array(colours, np.uint8)[np.resize(np.arange(len(colours)), (H, W))]


class Folders:
    """Two folders to be filled, and their inspection."""

    def __init__(self, root: pathlib.Path):
        self.images, self.labels, self.classes = root / "images", root / "labels", root / "c.json"

    def add(self, name, mask, palette=(), ending="", suffix=".jpg"):
        write(self.images / f"{name}{suffix}", picture())
        return write(self.labels / f"{name}{ending}.png", mask, palette)

    def fill(self, mask, count=4, palette=()):
        for i in range(count):
            self.add(f"i{i}", mask, palette)
        return self

    def inspect(self, declared=None, **options):
        if declared is not None:
            self.classes.write_text(json.dumps(declared))
            options["classes_file"] = self.classes
        return folders.inspect(self.images, self.labels, **options)


@pytest.fixture
def two(tmp_path) -> Folders:
    return Folders(tmp_path)


# Label contracts


def test_grey_ids(two):
    found = two.fill(ids(0, 7, 7, 255)).inspect()
    assert found.kind == "grey ids"
    assert found.spec.classes == ("class_0", "class_7")
    assert found.spec.raw_to_train == {0: 0, 7: 1, 255: IGNORE}
    assert found.spec.submission_ids == (0, 7)
    assert (0, 0, 0) not in found.spec.palette  # black is what is ignored
    text = "\n".join(found.lines())
    for row in (
        "0  class_0  0  25.00%  4",
        "1  class_7  7  50.00%  4",
        "-  ignored  255  25.00%  4",
    ):
        assert row.split() in [line.split() for line in text.splitlines()]


def test_sixteen_bit_ids(two):
    found = two.fill(ids(3, 1000, 65535, dtype=np.uint16)).inspect()
    assert found.kind == "16-bit ids"
    assert found.spec.raw_to_train == {3: 0, 1000: 1, 255: IGNORE, 65535: IGNORE}


def test_palette_indices_keep_their_colours(two):
    found = two.fill(ids(0, 2, 255), palette=[(9, 9, 9), RED, GREEN]).inspect()
    assert found.kind == "palette ids"
    assert found.spec.raw_to_train == {0: 0, 2: 1, 255: IGNORE}
    assert found.spec.palette == ((9, 9, 9), GREEN)
    assert not found.spec.colours


def test_colours(two):
    found = two.fill(rgb((0, 0, 0), RED, GREEN)).inspect()
    assert found.kind == "RGB colours"
    assert found.spec.colours
    assert found.spec.classes == ("#000000", "#008000", "#ff0000")  # black is a class like others
    assert found.spec.palette == ((0, 0, 0), GREEN, RED)
    assert found.spec.raw_to_train == {0: 0, 0x008000: 1, 0xFF0000: 2}


def test_palettes_that_disagree_need_colours(two):
    two.add("a", ids(0, 1), palette=[RED, GREEN])
    second = two.add("b", ids(0, 1), palette=[GREEN, RED])
    with pytest.raises(DataError, match=r"index 0 is #ff0000 in .*a\.png and #008000 in .*b\.png"):
        two.inspect()
    found = two.inspect({"plant": "#008000", "fire": [255, 0, 0]})
    assert found.spec.classes == ("plant", "fire")
    raw = folders.codec.read_mask(second.read_bytes(), "b", found.spec.colours)
    assert found.spec.encode(raw)[0, :2].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("declared", "names", "raw_to_train"),
    [
        (["sky", "void", "car"], ("sky", "car"), {0: 0, 2: 1, 1: IGNORE, 255: IGNORE}),
        ({"car": 2, "sky": 0, "tree": 1}, ("car", "sky", "tree"), {2: 0, 0: 1, 1: 2, 255: IGNORE}),
        (
            [
                {"name": "car", "id": 2},
                {"name": "void", "id": 0, "ignore": False},
                {"name": "sky", "id": 1, "ignore": True},
                {"name": "white", "id": 255},
            ],
            ("car", "void", "white"),
            {2: 0, 0: 1, 255: 2, 1: IGNORE},
        ),
        (
            {"2": "car", "0": "facade", "1": "7"},
            ("car", "facade", "7"),
            {2: 0, 0: 1, 1: 2, 255: IGNORE},
        ),
    ],
)
def test_classes_of_ids(two, declared, names, raw_to_train):
    found = two.fill(ids(0, 1, 2)).inspect(declared)
    assert found.spec.classes == names
    assert found.spec.raw_to_train == raw_to_train
    assert str(two.classes) in found.lines()[2]


def test_classes_of_colours(two):
    two.fill(rgb((0, 0, 0), RED, GREEN))
    declared = [
        {"name": "fire", "color": "#ff0000"},
        {"name": "plant", "color": [0, 128, 0]},
        {"name": "unlabelled", "color": "000000"},
    ]
    spec = two.inspect(declared).spec
    assert spec.raw_to_train == {0xFF0000: 0, 0x008000: 1, 0: IGNORE}


def test_ids_with_colours_to_show_them_in(two):
    declared = [{"name": "car", "id": 2, "color": "#0000FF"}, {"name": "sky", "id": 0}]
    spec = two.fill(ids(0, 2)).inspect(declared).spec
    assert spec.raw_to_train == {2: 0, 0: 1, 255: IGNORE}
    assert spec.palette == ((0, 0, 255), (0, 128, 0))  # the second of PASCAL VOC's


def test_classes_in_a_text_file(two):
    file = two.fill(ids(0, 1)).classes.with_suffix(".txt")
    file.write_text("\ufeffsky\n\nroad \n", "utf-8")
    assert two.inspect(classes_file=file).spec.classes == ("sky", "road")
    two.fill(rgb(RED, GREEN))
    file.write_text("# label:color_rgb:parts:actions\nfire:255,0,0::\nplant:0,128,0::\n")
    spec = two.inspect(classes_file=file).spec
    assert spec.classes == ("fire", "plant")
    assert spec.raw_to_train == {0xFF0000: 0, 0x008000: 1}


def test_a_classes_json_beside_the_labels_is_used(two):
    two.fill(ids(0, 1))
    (two.labels.parent / "classes.json").write_text('["road", "car"]')
    assert two.inspect().spec.classes == ("road", "car")
    (two.labels / "classes.json").write_text('["grass", "car"]')
    assert two.inspect().spec.classes == ("grass", "car")


# Masks that are refused


def test_the_trap_of_0_and_255(two):
    two.fill(ids(0, 255))
    for declared in (None, ["background", "thing"]):
        with pytest.raises(DataError, match=r"i0\.png.*only 0 and 255.*ignore.*--binary"):
            two.inspect(declared)
    two.classes.unlink()
    found = two.inspect(binary=True)
    assert found.spec.classes == ("background", "foreground")
    assert found.spec.raw_to_train == {0: 0, 255: 1}
    assert two.inspect({"background": 0, "thing": 255}).spec.raw_to_train == {0: 0, 255: 1}
    with pytest.raises(DataError, match="leave out --classes"):
        two.inspect({"background": 0, "thing": 255}, binary=True)


@pytest.mark.parametrize(
    ("values", "near"),
    [
        ((0, 255, 254), "254"),
        ((0, 128, 255), "128"),
        ((0, 64, 128, 192, 255), "64, 128, 192"),
        ((250, 251, 255), "250, 251"),
    ],
)
def test_grey_levels_below_255_are_the_same_trap(two, values, near):
    two.fill(ids(0, 255))
    bad = two.add("z", ids(*values))
    with pytest.raises(
        DataError, match=rf"hold {near} beside 255, and 255 means ignore.*--binary.*--classes"
    ) as error:
        two.inspect()
    assert str(error.value).startswith(f"{bad}: ")
    spec = two.inspect({"dark": 0, **{str(v): v for v in values if v}}).spec
    assert IGNORE not in spec.raw_to_train.values()


def test_sixteen_bit_levels_are_the_same_trap(two):
    with pytest.raises(DataError, match="hold 300 beside 255, and 255 means ignore"):
        two.fill(ids(0, 255, 300, dtype=np.uint16)).inspect()


@pytest.mark.parametrize("values", [(0, 1, 255), (0, 3, 15, 20, 255), (1, 63, 255)])
def test_ids_with_gaps_leave_255_ignored(two, values):
    """A few images of PASCAL VOC have 0, some of 1..20, and 255 as border."""
    spec = two.fill(ids(*values)).inspect().spec
    assert spec.raw_to_train == {v: k for k, v in enumerate(values[:-1])} | {255: IGNORE}


@pytest.mark.parametrize(
    ("mask", "top"), [(rgb((0, 0, 0), (255,) * 3), 0xFFFFFF), (ids(0, 1).astype(bool), 1)]
)
def test_binary_masks_of_other_kinds(two, mask, top):
    spec = two.fill(mask).inspect(binary=True).spec
    assert spec.encode(np.array([[0, top]])).tolist() == [[0, 1]]


def test_binary_refuses_other_values(two):
    with pytest.raises(
        DataError, match=r"i0\.png: 3 in the masks, outside --binary; allowed: 0, 255"
    ):
        two.fill(ids(0, 3, 255)).inspect(binary=True)


def test_smoothed_colours(two):
    two.fill(rgb(RED, GREEN))
    bad = two.add("z", rgb(*[(i, 0, 0) for i in range(100)]))
    with pytest.raises(
        DataError, match=r"102 different values \(RGB colours\).*anti-aliased"
    ) as error:
        two.inspect()
    assert f"{bad} (100)" in str(error.value)
    with pytest.raises(DataError, match=r"outside .*c\.json; allowed: #008000, #ff0000"):
        two.inspect({"fire": "#ff0000", "plant": "#008000"})


def test_one_class_is_nothing_to_learn(two):
    with pytest.raises(DataError, match=r"grey ids\) hold nothing but 7, 255: .*i0\.png"):
        two.fill(ids(7, 255)).inspect()


def test_masks_of_two_kinds(two):
    first, second = two.add("a", ids(0, 1)), two.add("b", rgb(RED, GREEN))
    with pytest.raises(DataError) as error:
        two.inspect()
    assert f"grey ids: {first}; RGB colours: {second}" in str(error.value)


@pytest.mark.parametrize(
    ("declared", "mask", "message"),
    [
        (["a", "b"], rgb(RED, GREEN), r'names ids, the masks hold colours .*"color": "#FF0000"'),
        ({"a": "#FF0000", "b": "#00FF00"}, ids(0, 1), r'names colours, the masks hold ids .*"id"'),
        (["a", "b"], ids(0, 1, 9), r"i0\.png: 9 in the masks, outside .*; allowed: 0, 1, 255"),
    ],
)
def test_masks_that_do_not_fit_the_classes(two, declared, mask, message):
    with pytest.raises(DataError, match=message):
        two.fill(mask).inspect(declared)


def test_a_list_that_is_one_name_short(two):
    two.fill(ids(0, 1, 2))
    with pytest.raises(
        DataError, match=r"c\.json lacks their names.*\"id\": 2, \"ignore\""
    ) as error:
        two.inspect(["a", "b"])
    assert "anti-aliased" not in str(error.value)


def test_a_list_of_classes_that_is_no_json(two):
    two.fill(ids(0, 1)).classes.write_text("sky\nroad\n")
    with pytest.raises(DataError, match=r'c\.json: not readable as JSON.* \["sky", "road"\]'):
        two.inspect(classes_file=two.classes)


def test_transparent_masks(two):
    two.fill(rgb(RED, GREEN))
    clear = np.dstack([rgb(RED, GREEN), np.full((H, W), 255, np.uint8)])
    clear[0, :3, 3] = 0
    write(two.labels / "i0.png", clear)
    with pytest.raises(DataError, match=r"i0\.png: 3 pixels are transparent.*save the mask as RGB"):
        two.inspect()


def test_kinds_of_png_that_are_not_read(two):
    two.fill(ids(0, 1))
    grey_alpha = np.zeros((H, W, 2), np.uint8)
    for array, message in (
        (Image.fromarray(grey_alpha, "LA"), "its pixels are 8-bit grey with alpha"),
        (Image.fromarray(picture(), "RGB"), "a JPEG file"),
    ):
        path = two.labels / "i0.png"
        array.save(path, "JPEG" if array.mode == "RGB" else "PNG")
        with pytest.raises(DataError, match=f"i0.png: {message}"):
            two.inspect()


@pytest.mark.parametrize("length", [0, 8, 25])
def test_a_mask_that_ends_in_its_header_is_named(two, length):
    two.fill(ids(0, 1))
    path = two.labels / "i0.png"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=rf"i0\.png: not a whole PNG file of {length} bytes"):
        two.inspect()


def test_a_photograph_is_no_mask(two):
    two.fill(ids(0, 1))
    write(two.labels / "i0.png", np.arange(90 * 90, dtype=np.uint16).reshape(90, 90))
    write(two.images / "i0.jpg", picture(90, 90))
    with pytest.raises(DataError, match=r"i0\.png: 8100 different values: a photograph"):
        two.inspect()


# Pairs


def test_endings_and_folders(two):
    two.add("day/a", ids(0, 1), ending="_mask")
    two.add("day/b", ids(0, 1), ending="_labelIds")
    two.add("night/a", ids(0, 1), ending="-GT", suffix=".PNG")
    two.add("night/road_mask", ids(0, 1))
    two.add("night/c_gtFine", ids(0, 1), ending="_labelIds")
    (two.images / "night/c_gtFine.jpg").rename(two.images / "night/c_leftImg8bit.jpg")
    two.add("night/d", ids(0, 1), ending="_mask")
    (two.images / "night/d.jpg").rename(two.images / "night/d_image.jpg")
    names = [scan.pair.name for scans in two.inspect().scans.values() for scan in scans]
    of_night = ["night/a", "night/c_leftImg8bit", "night/d_image", "night/road_mask"]
    assert sorted(names) == ["day/a", "day/b", *of_night]


def test_accents_of_two_forms_are_one_name(two):
    two.fill(ids(0, 1), 3)
    for root, form, suffix in ((two.images, "NFD", ".jpg"), (two.labels, "NFC", ".png")):
        path = root / f"i0{suffix}"
        path.rename(root / unicodedata.normalize(form, f"Größe{suffix}"))
    names = [scan.pair.name for scans in two.inspect().scans.values() for scan in scans]
    assert unicodedata.normalize("NFC", "Größe") in names


def test_names_that_are_not_utf_8_are_refused(two):
    two.fill(ids(0, 1))
    (two.images / "i0.jpg").rename(two.images / os.fsdecode(b"stra\xdfe.jpg"))
    with pytest.raises(DataError, match=r"images: the name b'stra\\xdfe\.jpg' in it is not UTF-8"):
        two.inspect()


def test_linked_folders_are_followed_and_no_circle(two, tmp_path):
    """The splits lie elsewhere; a link back to where one is ends there."""
    elsewhere = Folders(tmp_path / "elsewhere").fill(ids(0, 1))
    for here, there in ((two.images, elsewhere.images), (two.labels, elsewhere.labels)):
        here.mkdir()
        for split in ("train", "val"):
            (here / split).symlink_to(there)
        (here / "back").symlink_to(here)
        (there / "up").symlink_to(tmp_path)
    assert two.inspect().counts == {"train": 4, "val": 4}


def test_two_masks_of_one_image(two):
    two.fill(ids(0, 1))
    write(two.labels / "i0_mask.png", ids(0, 1))
    with pytest.raises(DataError, match=r"i0\.png and .*i0_mask\.png are masks of one image"):
        two.inspect()


def test_two_images_of_one_name(two):
    two.fill(ids(0, 1))
    write(two.images / "i0.png", picture())
    with pytest.raises(DataError, match=r"i0\.jpg and .*i0\.png have one name"):
        two.inspect()


def test_files_without_partner(two):
    two.fill(ids(0, 1))
    (two.labels / "i1.png").unlink()
    (two.images / "i2.jpg").unlink()
    with pytest.raises(DataError, match=r"2 of the files in .* cannot be used") as error:
        two.inspect()
    for words in ("i1.jpg: an image without a mask", "i2.png: a mask without", "--skip_bad"):
        assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 3
    found = two.inspect(skip_bad=True)
    assert sum(found.counts.values()) == 2
    assert len(found.skipped) == 2


def test_files_of_other_types_are_named_and_counted(two):
    two.fill(ids(0, 1), 6)
    (two.images / "i1.jpg").rename(two.images / "i1.webp")
    (two.labels / "i2.png").rename(two.labels / "i2_mask.tif")
    (two.images / "notes.txt").write_text("")
    (two.labels / "classes.json").write_text('["a", "b"]')
    with pytest.raises(DataError) as error:
        two.inspect()
    for words in (
        f"{two.labels / 'i1.png'}: its image is {two.images / 'i1.webp'}; only PNG or JPEG is read",
        f"{two.images / 'i2.jpg'}: its mask is {two.labels / 'i2_mask.tif'}; only PNG is read",
    ):
        assert words in str(error.value)
    lines = two.inspect(skip_bad=True).lines()
    assert "Not read  1 .tif, 1 .txt, 1 .webp: images are PNG or JPEG, masks PNG" in lines


def test_folders_that_hold_nothing_fitting(two):
    with pytest.raises(FileNotFoundError, match="--images="):
        two.inspect()
    two.fill(ids(0, 1))
    with pytest.raises(DataError, match="--images and --labels are both"):
        folders.inspect(two.images, two.images)
    with pytest.raises(DataError, match=r"no PNG masks below it; it has 4 \.jpg|4 masks are JPEG"):
        folders.inspect(two.labels, two.images)
    for path in two.labels.iterdir():
        path.rename(path.with_stem("other_" + path.stem))
    with pytest.raises(DataError, match=r"4 images, first .*i0\.jpg; 4 masks, first .*other_i0"):
        two.inspect()


def test_masks_saved_as_jpeg(two):
    two.fill(ids(0, 1))
    Image.open(two.labels / "i1.png").save(two.labels / "i1.jpg")
    two.inspect()  # a picture beside its mask
    (two.labels / "i1.png").unlink()
    with pytest.raises(DataError, match=r"1 masks are JPEG files, first .*i1\.jpg.*PNG"):
        two.inspect()


def test_one_broken_file_and_one_of_another_size(two):
    two.fill(ids(0, 1), 6)
    data = (two.images / "i1.jpg").read_bytes()
    (two.images / "i1.jpg").write_bytes(data[: len(data) // 2])
    write(two.labels / "i3.png", ids(0, 1)[:, :9])
    with pytest.raises(DataError) as error:
        two.inspect()
    for words in (
        "2 of the files",
        "i1.jpg: unreadable or truncated",
        "i3.png: the mask is 9x12",
        "16x12",
    ):
        assert words in str(error.value)
    found = two.inspect(skip_bad=True)
    assert sum(found.counts.values()) == 4
    assert "Left out  2:" in "\n".join(found.lines())


def test_nothing_labelled_is_left(two):
    """But an image of test, which needs no mask."""
    for i in range(3):
        two.add(f"train/{i}", ids(0, 1)[:, :9])
    write(two.images / "test" / "a.png", picture())
    with pytest.raises(DataError, match=r"3 of the files .*Without them no mask is left"):
        two.inspect(skip_bad=True)


# Splits


def test_the_split_follows_from_names_and_seed(two):
    def val(seed=0):
        return {s.pair.name for s in two.inspect(seed=seed).scans["val"]}

    two.fill(ids(0, 1), 40)
    before = val()
    assert 1 <= len(before) <= 12
    assert before != val(seed=1)
    for i in range(40, 60):
        two.add(f"i{i}", ids(0, 1))
    after = val()
    assert {name for name in after if int(name[1:]) < 40} == before


def test_the_share_that_is_held_back_is_the_one_asked_for():
    scans = [folders.Scan(folders.Pair(f"i{i}", pathlib.Path(), None), (H, W)) for i in range(400)]
    for share in (0.15, 0.4):
        held = len(folders._split(scans, 0, share)[0]["val"])
        assert abs(held / 400 - share) < 0.04


@pytest.mark.parametrize("count", [2, 3])
def test_both_splits_have_an_image(two, count):
    for share in (0.001, 0.15, 0.999):
        counts = two.fill(ids(0, 1), count).inspect(val_share=share).counts
        assert min(counts["train"], counts["val"]) >= 1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_that_leaves_one_split_empty_is_refused(two, share):
    with pytest.raises(DataError, match=rf"--val_share={share:g}; allowed: above 0 and below 1"):
        two.fill(ids(0, 1)).inspect(val_share=share)


def test_folders_of_splits(two):
    for name in ("training/a", "training/b", "valid/a"):
        two.add(name, ids(0, 1))
    write(two.images / "test" / "a.png", picture())  # its masks are not there
    found = two.inspect()
    assert found.counts == {"train": 2, "val": 1, "test": 1}
    assert found.items()["test"][0].label is None
    assert not any(line.startswith("Absent") for line in found.lines())
    two.add("training/c", ids(0, 1, 2))
    lines = two.inspect().lines()
    assert [line for line in lines if line.startswith("Absent")] == [
        "Absent    1 of the classes in val, not scored: class_2"
    ]
    two.add("b", ids(0, 1))
    with pytest.raises(DataError, match=r"lies in a folder of a split, .*b\.jpg does not"):
        two.inspect()


def test_a_val_that_is_lost_is_not_drawn_anew(two):
    for i in range(4):
        two.add(f"train/{i}", ids(0, 1))
    bad = two.add("validation/a", ids(0, 1)[:, :9])
    with pytest.raises(DataError, match=r"images/validation: no image in it can be used"):
        two.inspect(skip_bad=True)
    bad.unlink()
    with pytest.raises(DataError, match=r"images/validation: no image in it can be used"):
        two.inspect(skip_bad=True)
    two.add("validation/b", ids(0, 1))
    assert two.inspect(skip_bad=True).counts == {"train": 4, "val": 1}


def test_a_folder_train_alone_gives_its_val(two):
    for i in range(8):
        two.add(f"train/{i}", ids(0, 1))
    two.add("test/a", ids(0, 1))
    counts = two.inspect().counts
    assert counts["train"] + counts["val"] == 8
    assert counts["test"] == 1


def test_records_of_real_scenes_are_what_was_drawn(two, tmp_path):
    """Odd sizes, colours: from folders to records and back."""
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    from duc_dlc_jax.data.prepare import prepare_folders
    from duc_dlc_jax.data.records import Records

    colours = np.array([(30 * i, 255 - 20 * i, i) for i in range(8)] + [(0, 0, 0)], np.uint8)
    for i in range(3):
        image, label = scenes.draw("train", i)
        image, label = image[: 91 + i, : 75 + 2 * i], label[: 91 + i, : 75 + 2 * i]
        write(two.images / f"{i}.png", image)
        write(two.labels / f"{i}.png", colours[np.minimum(label, 8)])
    declared = {f"scene_{i}": [int(v) for v in colours[i]] for i in range(8)} | {"void": "#000000"}
    found = two.inspect(declared, name="drawn")
    folder = prepare_folders(found, tmp_path / "data")
    assert prepare_folders(found, tmp_path / "data") == folder
    other = dataclasses.replace(found.spec, classes=found.spec.classes[::-1])
    with pytest.raises(DataError, match=r"prepared with other classes; delete that folder"):
        prepare_folders(dataclasses.replace(found, spec=other), tmp_path / "data")
    renamed = {
        split: [dataclasses.replace(s, pair=dataclasses.replace(s.pair, name="x")) for s in scans]
        for split, scans in found.scans.items()
    }
    with pytest.raises(DataError, match="prepared from images of other names or splits; delete"):
        prepare_folders(dataclasses.replace(found, scans=renamed), tmp_path / "data")
    fewer = {"val": found.scans["val"]}
    with pytest.raises(DataError, match=r"--images: 1 val images, but .* prepared from 2 train"):
        prepare_folders(dataclasses.replace(found, scans=fewer), tmp_path / "data")
    for split, scans in found.scans.items():
        records = Records(folder, split)
        assert records.spec == found.spec
        for i, scan in enumerate(scans):
            image, label = scenes.draw("train", int(scan.pair.name))
            height, width = scan.size
            np.testing.assert_array_equal(records[i]["label"], label[:height, :width])
            np.testing.assert_array_equal(records[i]["image"], image[:height, :width])
