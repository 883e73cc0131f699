"""Preparing data sets: layouts, contents, and every bad input to its message."""

import json
import os
import pathlib
import struct
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import layouts
from duc_dlc_jax import config as configuration
from duc_dlc_jax.data import builders, codec, pipeline
from duc_dlc_jax.data.builders import files, scenes, sources
from duc_dlc_jax.data.labels import IGNORE, DataError, LabelSpec, label_spec
from duc_dlc_jax.data.prepare import count_differences, listing_of, prepare
from duc_dlc_jax.data.records import open_records
from layouts import LAYOUTS, H, W, mask, picture, write
from runs import run

SHARED = os.environ.get("DUC_DLC_SHARED_DATA", "")


def opened(name, folder, split):
    data: Any = configuration.default().data
    data.name, data.dir = name, str(folder)
    return open_records(data, split)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_prepared_and_read_back(name, tmp_path, capsys):
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    maker, ids, labelled, unlabelled = LAYOUTS[name]
    maker(tmp_path / "raw")
    folder = prepare(name, str(tmp_path / "raw"), tmp_path / "data")
    printed = capsys.readouterr().out
    assert "officially" in printed
    assert f"of {label_spec(name).num_classes}" in printed
    assert LabelSpec.from_json((folder / builders.SPEC_FILE).read_text()) == label_spec(name)
    for split in labelled + unlabelled:
        records = opened(name, tmp_path / "data", split)
        example = records[0]
        assert records.labelled == (split in labelled)
        assert example["image"].shape == (H, W, 3)
        assert example["label"].shape == (H, W)
        assert np.unique(example["label"]).tolist() == (ids if split in labelled else [IGNORE])
        if name == "camvid":
            np.testing.assert_array_equal(example["image"], picture(0))  # RGB, name order
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [name]
    prepare(name, None, tmp_path / "data")
    assert "already prepared" in capsys.readouterr().out


def test_records_are_array_record_with_the_original_jpeg(tmp_path):
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    layouts.ade20k(tmp_path)
    folder = prepare("ade20k", str(tmp_path), tmp_path / "data")
    assert json.loads((folder / "dataset_info.json").read_text())["fileFormat"] == "array_record"
    jpeg = (tmp_path / "ADEChallengeData2016/images/training/x.jpg").read_bytes()
    assert opened("ade20k", tmp_path / "data", "train")._opened()[0]._source[0]["image"] == jpeg


def test_reading_needs_no_tensorflow(scenes_dir):
    program = f"""
import sys
from duc_dlc_jax import config
from duc_dlc_jax.data import labels, pipeline, prepare, records, transforms
assert "tensorflow_datasets" not in sys.modules and "grain" not in sys.modules
data = config.default().data
data.name, data.dir, data.base_size, data.crop_size = "scenes", {str(scenes_dir)!r}, 64, 64
records = records.open_records(data, "train")
batch = next(pipeline.train_iterator(data, records, seed=0, batch_size=2, steps=1))
assert batch["image"].shape == (2, 64, 64, 3)
assert next(pipeline.eval_examples(records))["name"] == "train_0000"
assert "tensorflow" not in sys.modules
"""
    run([sys.executable, "-c", program], tensorflow=False)


def test_scenes_are_deterministic_and_lossless(scenes_dir):
    train, val = (opened("scenes", scenes_dir, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (200, 40)
    for index in (0, 7):
        image, label = scenes.draw("train", index)
        np.testing.assert_array_equal(train[index]["image"], image)
        np.testing.assert_array_equal(train[index]["label"], label)
    assert (val[0]["image"] != train[0]["image"]).any()
    assert (scenes.draw("train", 0, seed=1)[0] != scenes.draw("train", 0)[0]).any()
    summary = json.loads((train.folder / builders.SUMMARY_FILE).read_text())
    share = np.array(summary["train"]["pixels"]) / (200 * 192 * 256)
    assert share[:8].min() > 0.005
    assert 0.001 < share[IGNORE] < 0.05


def test_an_interrupted_build_does_not_look_finished(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    layouts.camvid(tmp_path)
    write(tmp_path / "valannot" / "b.png", mask(0, 12))
    with pytest.raises(DataError, match=r"valannot/b.png: label values 12 .* allowed: 0\.\.11"):
        prepare("camvid", str(tmp_path), tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"data.prepare --dataset=camvid"):
        opened("camvid", tmp_path / "data", "train")


def test_what_is_prepared_is_not_taken_for_another_download(tmp_path, capsys):
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    raw, data = tmp_path / "raw", tmp_path / "data"
    layouts.camvid(raw)
    prepare("camvid", str(raw), data)
    prepare("camvid", str(raw), data)
    assert "warning" not in capsys.readouterr().out
    raw.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"--raw_dir=.*/raw is no folder"):
        prepare("camvid", str(raw), data)
    prepare("camvid", str(tmp_path / "moved"), data)
    assert f"warning: it was prepared from {raw}; nothing of" in capsys.readouterr().out
    for folder in ("train", "trainannot"):
        (tmp_path / "moved" / folder / "a.png").unlink()
    with pytest.raises(DataError, match=r"1 train, 2 val images, but .* prepared from 2 train, 2"):
        prepare("camvid", str(tmp_path / "moved"), data)


def test_unofficial_counts_are_listed_and_refused_under_strict(tmp_path):
    layouts.camvid(tmp_path)
    lines = count_differences(sources.SOURCES["camvid"], {"train": 2, "val": 101})
    assert lines == [
        "split train: 2 images, officially 367",
        "split test: missing, officially 233 images",
    ]
    pascal = sources.SOURCES["pascal_context"]
    assert count_differences(pascal, {"train": 4996, "val": 5104}) == []
    with pytest.raises(DataError, match="with --strict: split train: 2 images, officially 367"):
        prepare("camvid", str(tmp_path), tmp_path / "data", strict=True)
    assert not (tmp_path / "data").exists()


def items(name, root):
    with listing_of(name, str(root)) as (listing, _):
        return listing.splits


def test_missing_or_empty_folders_say_what_was_looked_for(tmp_path):
    with pytest.raises(
        DataError, match=r"nowhere is no folder and no archive.*train,val,test.*SegNet"
    ):
        items("camvid", tmp_path / "nowhere")
    (tmp_path / "something.txt").touch()
    for name in ("camvid", "cityscapes", "ade20k", "pascal_context"):
        with pytest.raises(DataError, match=r"Looked for .* there is something.txt. Download"):
            items(name, tmp_path)


def test_images_without_masks_are_counted_and_named(tmp_path):
    layouts.cityscapes(tmp_path)
    write(tmp_path / "leftImg8bit/train/ulm/ulm_3_4_leftImg8bit.png", picture())
    with pytest.raises(DataError, match=r"split train: 1 images without a mask .*first .*ulm_3_4"):
        items("cityscapes", tmp_path)


def test_masks_without_images_are_named(tmp_path):
    layouts.camvid(tmp_path)
    (tmp_path / "train" / "a.png").unlink()
    with pytest.raises(
        DataError, match=r"1 masks without an image \(1 images, 2 masks\), first .*trainannot/a.png"
    ):
        items("camvid", tmp_path)


def test_a_listed_image_that_is_not_there_is_named(tmp_path):
    layouts.pascal_context(tmp_path)
    (tmp_path / "VOCdevkit/VOC2010/JPEGImages/2008_000001.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of the 1 images in .*val.txt .* first 2008_000001.jpg"):
        items("pascal_context", tmp_path)


def test_the_other_ade20k_annotations_are_refused_by_name(tmp_path):
    write(tmp_path / "annotations_instance/training/x.png", mask(1))
    with pytest.raises(DataError, match="annotations_instance, the 100-category"):
        items("ade20k", tmp_path)
    write(tmp_path / "images/training/a/abbey/ADE_train_1_seg.png", picture())
    with pytest.raises(DataError, match=r"full ADE20K archive.*ADEChallengeData2016"):
        items("ade20k", tmp_path)


def read_mask(path, colours=False):
    return codec.read_mask(path.read_bytes(), str(path), colours)


def test_masks_of_the_wrong_kind_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"rgb.png: a colour mask \(mode RGB\)"):
        read_mask(write(tmp_path / "rgb.png", picture()))
    with pytest.raises(DataError, match=r"grey.png: a mask of mode L where RGB colours"):
        read_mask(write(tmp_path / "grey.png", mask(1)), colours=True)
    deep = write(tmp_path / "deep.png", np.full((H, W), 300, np.uint16))
    with pytest.raises(DataError, match=r"deep.png: a 16-bit PNG"):
        codec.check_image(deep.read_bytes(), str(deep))


def test_16_bit_masks_are_read_exactly(tmp_path):
    ids = np.resize(np.array([0, 300, 65535], np.uint16), (H, W))
    np.testing.assert_array_equal(read_mask(write(tmp_path / "deep.png", ids)), ids)
    with pytest.raises(DataError, match=r"label values 300, 65535 are outside"):
        label_spec("ade20k").encode(ids)


def raw_png(bits: int, colour_type: int, rows: list[bytes], width: int) -> bytes:
    """A PNG of any bit depth, which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_masks_of_few_bits_keep_their_ids():
    four = raw_png(4, 0, [bytes([0x01, 0x2F]), bytes([0xA3, 0x74])], width=4)
    assert codec.read_mask(four, "four.png").tolist() == [[0, 1, 2, 15], [10, 3, 7, 4]]
    two = raw_png(2, 0, [bytes([0b00011011])], width=4)
    assert codec.read_mask(two, "two.png").tolist() == [[0, 1, 2, 3]]
    one = raw_png(1, 0, [bytes([0b01100000])], width=4)
    assert codec.read_mask(one, "one.png").tolist() == [[0, 1, 1, 0]]


def test_colours_of_16_bits_are_refused():
    deep = raw_png(16, 2, [bytes(12)], width=2)
    with pytest.raises(DataError, match=r"deep.png: 16 bits a channel; colours must have 8"):
        codec.read_mask(deep, "deep.png", colours=True)


def test_colour_masks_become_one_number_a_pixel(tmp_path):
    rgb = np.zeros((H, W, 3), np.uint8)
    rgb[:, 3:] = (0x80, 0x40, 0xC0)
    expected = np.where(np.arange(W) < 3, 0, 0x8040C0)
    opaque = np.dstack([rgb, np.full((H, W), 255, np.uint8)])
    for name, array in (("rgb", rgb), ("rgba", opaque)):
        found = read_mask(write(tmp_path / f"{name}.png", array), colours=True)
        np.testing.assert_array_equal(found, np.broadcast_to(expected, (H, W)))
    opaque[0, 0, 3] = 9
    with pytest.raises(DataError, match=r"clear\.png: 1 pixels are transparent"):
        read_mask(write(tmp_path / "clear.png", opaque), colours=True)


def test_palette_masks_are_read_as_indices(tmp_path):
    indexed = Image.fromarray(mask(0, 7, 200)).convert("P")
    indexed.putpalette([value for i in range(256) for value in (255 - i, 3, i)])
    indexed.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "p.png"), mask(0, 7, 200))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_files_are_named(tmp_path, suffix):
    path = write(tmp_path / f"cut.{suffix}", np.resize(picture(), (200, 200, 3)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"cut.{suffix}: unreadable or truncated image"):
        codec.check_image(path.read_bytes(), str(path))
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=f"cut.{suffix}: unreadable"):
        read_mask(path)
    with pytest.raises(DataError, match="record 3: 5 bytes that are not"):
        codec.decode_image(b"wrong", "record 3")


def test_two_sizes_are_both_given(tmp_path):
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    from duc_dlc_jax.data.builders.examples import make_example

    image = write(tmp_path / "i.png", picture())
    label = write(tmp_path / "m.png", mask(0)[:, :-2])
    with pytest.raises(DataError, match=r"m.png: the mask is 14x12, its image 16x12"):
        make_example(sources.Item("i", files.File(image), files.File(label)), label_spec("camvid"))


def oriented(value: int, kind: int = 3) -> bytes:
    """EXIF data with an orientation; kind: of the number, 3 for the usual short."""
    entry = struct.pack("<HHI", 274, kind, 1) + struct.pack("<I", value)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description
 xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize(
    ("options", "orientation"),
    [
        ({"exif": oriented(6)}, 6),  # to be turned by 90 degrees
        ({"xmp": XMP}, 1),
        ({"exif": oriented(1), "xmp": XMP}, 1),
        ({"exif": oriented(9)}, 1),
        ({"exif": oriented(0, kind=2)}, 1),  # text
        ({"exif": b"Exif\0\0II*\0"}, 1),
    ],
)
def test_the_decoder_alone_says_how_an_image_lies(tmp_path, options, orientation):
    path = write(tmp_path / "turned.jpg", picture(), **options)
    kind, image = codec.check_image(path.read_bytes(), str(path))
    assert kind == "jpeg"
    assert image.shape == ((W, H, 3) if orientation == 6 else (H, W, 3))
    np.testing.assert_array_equal(image, codec.decode_image(path.read_bytes(), "turned"))
    with Image.open(path) as header:
        assert codec.exif_orientation(header) == orientation


def test_a_photo_with_a_second_picture_in_it_is_the_first(tmp_path):
    """MPO, as phones write it."""
    path, alone = tmp_path / "a.jpg", write(tmp_path / "b.jpg", picture())
    rest = Image.fromarray(picture(1)[:6])
    Image.fromarray(picture()).save(path, "MPO", save_all=True, append_images=[rest])
    kind, image = codec.check_image(path.read_bytes(), str(path))
    assert kind == "jpeg"
    np.testing.assert_array_equal(image, codec.decode_image(alone.read_bytes(), "b"))


def test_whatever_pillow_raises_names_the_file(tmp_path):
    """Text that unpacks to more than 1 MB is a ValueError of Pillow's."""
    text = PngInfo()
    text.add_text("much", "x" * 2_000_000, zip=True)
    path = write(tmp_path / "much.png", picture(), pnginfo=text)
    with pytest.raises(DataError, match=r"much\.png: unreadable or truncated image: Decompressed"):
        codec.check_image(path.read_bytes(), str(path))


def test_what_opencv_does_not_decode_is_found_when_preparing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jpg", picture())
    monkeypatch.setattr(codec.cv2, "imdecode", lambda data, how: None)
    with pytest.raises(DataError, match=r"a\.jpg: \d+ bytes that are not a readable image"):
        codec.check_image(path.read_bytes(), str(path))


@pytest.mark.real_data
@pytest.mark.skipif(not SHARED, reason="DUC_DLC_SHARED_DATA is not set: no real CamVid")
def test_real_camvid_is_listed_and_read():
    listed = items("camvid", pathlib.Path(SHARED) / "camvid")
    found = {split: list(found) for split, found in listed.items()}
    assert {split: len(rows) for split, rows in found.items()} == {"train": 367, "val": 101}
    from duc_dlc_jax.data.builders.examples import make_example

    for item in found["val"][::25]:
        example = make_example(item, label_spec("camvid"))
        assert (example.height, example.width) == (360, 480)
        assert example.pixels.sum() == 360 * 480
        assert example.pixels[11:IGNORE].sum() == 0
        label = np.frombuffer(example.records[0]["label"], np.uint8)
        np.testing.assert_array_equal(np.bincount(label, minlength=256), example.pixels)


@pytest.mark.real_data
@pytest.mark.skipif(not SHARED, reason="DUC_DLC_SHARED_DATA is not set: no real ADE20K")
def test_real_ade20k_masks_follow_the_contract():
    from duc_dlc_jax.data.builders.examples import make_example

    folder = pathlib.Path(SHARED) / "ade20k_sample"
    for path in sorted((folder / "images").glob("*.jpg")):
        label = folder / "annotations" / f"{path.stem}.png"
        item = sources.Item(path.stem, files.File(path), files.File(label))
        example = make_example(item, label_spec("ade20k"))
        raw = np.array(Image.open(label))
        assert example.pixels[IGNORE] == (raw == 0).sum()
        assert example.pixels[0] == (raw == 1).sum()
        assert example.records[0]["image"] == path.read_bytes()
        for train, y, x in example.points:
            assert raw[y, x] == train + 1


@pytest.fixture(scope="module")
def narrow_step():
    """State and step of a network with as many classes as any of the data sets has."""
    from duc_dlc_jax import optimizer, train_step
    from duc_dlc_jax.models import segmenter
    from networks import NARROW, jit, random_variables

    config = configuration.default()
    config.model.update(NARROW | {"upsampling": "bilinear", "context": "none"})
    model = segmenter.create(config.model, label_spec("ade20k").num_classes)
    rule = optimizer.create(config.optimizer, 1)
    state = train_step.create_state(model, rule, config, random_variables(model))
    return state, jit(train_step.make_train_step(model, rule, config))


@pytest.mark.parametrize("name", ["camvid", "cityscapes", "ade20k", "pascal_context"])
def test_each_layout_reaches_a_training_step(name, tmp_path, narrow_step):
    """From the official layout to a loss of every class that is not ignored, and new parameters."""
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    import jax

    LAYOUTS[name][0](tmp_path / "raw")
    prepare(name, str(tmp_path / "raw"), tmp_path / "data")
    config = configuration.default()
    config.data.update({"name": name, "dir": str(tmp_path / "data"), "crop_size": 32})
    config.data.update({"base_size": 32, "class_uniform_share": 1.0})
    records = open_records(config.data, "train")
    batch = next(pipeline.train_iterator(config.data, records, seed=0, batch_size=2, steps=1))
    labels = {name: batch[name] for name in ("image", "label")}
    state, step = narrow_step
    new, metrics = step(state, labels, 0)
    assert (batch["label"] != IGNORE).any()
    assert 0 < float(metrics["loss"]) < 50
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, new.params)
    assert moved["classifier"]["kernel"]
    assert moved["backbone"]["conv1"]["kernel"]
