"""data.show: the contact sheet shows the pixels that are stored, the bars have their lengths."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import layouts
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import drawing, pipeline, show
from duc_dlc_jax.data.drawing import HATCH, MARGIN, PAIR, SIDE, SPLIT_COLOURS, Cell
from duc_dlc_jax.data.labels import IGNORE, label_spec
from duc_dlc_jax.data.records import open_records
from layouts import H, W, mask, picture

CAMVID = label_spec("camvid")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A small prepared camvid (2 train, 3 val images) and an augmentation with every part."""
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    config = config_lib.default()
    folder = layouts.prepared(tmp_path_factory.mktemp("prepared"))
    config.data.update({"name": "camvid", "dir": str(folder), "base_size": 24, "crop_size": 20})
    config.data.update({"rotate_degrees": 10.0, "photometric_probability": 0.5})
    return config


def runs_of(image: Image.Image, colour: tuple[int, int, int]) -> list[int]:
    """Returns the lengths of the horizontal bars of a colour, from top to bottom."""
    rows = (np.asarray(image) == colour).all(-1).sum(1).tolist()
    return [n for i, n in enumerate(rows) if n and (i == 0 or n != rows[i - 1])]


def test_photo_and_label_lie_beside_each_other_as_stored():
    photo = np.kron(picture(), np.ones((20, 20, 1), np.uint8))
    label = np.kron(mask(0, 3, IGNORE, 10), np.ones((20, 20), np.uint8))
    cell = Cell("a", photo, label)  # 240x320: at the size that it is shown
    sheet = np.asarray(drawing.contact_sheet([cell], CAMVID, "title"))
    assert sheet.shape[1] == PAIR + 2 * MARGIN
    top = int(np.flatnonzero((sheet[:, MARGIN] == photo[0, 0]).all(-1))[0])
    shown = sheet[top : top + 240, MARGIN : MARGIN + PAIR]
    np.testing.assert_array_equal(shown[:, :SIDE], photo)
    colours, counted = shown[:, -SIDE:], label != IGNORE
    np.testing.assert_array_equal(colours[counted], CAMVID.colourise(label)[counted])
    assert {tuple(pixel) for pixel in colours[~counted].tolist()} == set(HATCH)


def test_resizing_a_label_makes_no_new_colours():
    label = np.random.default_rng(0).choice([0, 3, 10, IGNORE], (45, 70)).astype(np.uint8)
    cell = Cell("a", np.full((45, 70, 3), 255, np.uint8), label)
    sheet = np.asarray(drawing.contact_sheet([cell], CAMVID, ""))[: MARGIN + 260, MARGIN + SIDE :]
    colours = {tuple(pixel) for pixel in sheet.reshape(-1, 3).tolist()}
    allowed = {CAMVID.palette[k] for k in (0, 3, 10)} | {*HATCH, (255, 255, 255)}
    assert colours == allowed


@pytest.mark.parametrize("shape", [(100, 400), (400, 100), (1, 1), (37, 53)])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_any_size_and_number_of_images_fits(shape, count):
    cells = [Cell("a very long name " * 20, picture(0, shape), np.zeros(shape, np.uint8))] * count
    sheet = drawing.contact_sheet(cells, CAMVID, "title")
    border = np.asarray(sheet)[:, -MARGIN + 1 :]
    assert (border == 255).all()
    assert sheet.height > count // 3 * SIDE * shape[0] // max(shape)


@pytest.mark.parametrize("name", ["camvid", "ade20k"])
def test_the_legend_has_every_class_in_its_colour(name):
    spec = label_spec(name)
    key = drawing.legend(spec, 1900, present={0})
    pixels = {colour: count for count, colour in key.getcolors(key.width * key.height)}
    swatch = (drawing.SWATCH[0] - 2) * (drawing.SWATCH[1] - 2)
    for colour in spec.palette:
        same = spec.palette.count(colour)
        assert pixels[colour] >= same * swatch
    assert (np.asarray(key)[:, -2 * drawing.GAP :] == 255).all()  # nothing is cut off
    other = np.asarray(drawing.legend(spec, 1900, present={1}))
    assert (np.asarray(key) != other).any()


def test_bars_have_the_length_of_their_share():
    pixels = [0] * 256
    pixels[:3], pixels[IGNORE] = [900, 90, 10], 1000
    rows = {
        "train": {"images": 1, "labelled": 1, "pixels": pixels},
        "val": {"images": 1, "labelled": 1, "pixels": [0, 0, 7, *[0] * 253]},
        "test": {"images": 1, "labelled": 0, "pixels": [0] * 256},
    }
    plot = drawing.balance(rows, CAMVID, "title")
    scale = drawing._Scale(drawing.BARS, 2)  # the rarest class has 1%
    assert [scale(share) for share in (1, 0.1, 0.01)] == [300, 150, 0]
    key = drawing.SWATCH[0] + 1
    train = [scale(share) + 1 for share in (0.9, 0.09, 0.01, 0.5)]
    train[2] = 2  # a share of the axis' first value can be seen all the same
    assert runs_of(plot, SPLIT_COLOURS[0]) == [key, *train]
    assert runs_of(plot, SPLIT_COLOURS[1]) == [key, 301]
    assert runs_of(plot, SPLIT_COLOURS[2]) == []


@pytest.mark.parametrize("name", ["scenes", "ade20k"])
def test_a_plot_without_labelled_pixels_is_drawn(name):
    rows = {"test": {"images": 3, "labelled": 0, "pixels": [0] * 256}}
    assert drawing.balance(rows, label_spec(name), "title").width < 2500


def test_whole_images_are_a_choice_that_the_seed_makes(config):
    records = open_records(config.data, "val")
    names = [[cell.caption for cell in show.whole(records, 2, seed)] for seed in range(9)]
    assert names[0] == [cell.caption for cell in show.whole(records, 2, 0)]
    assert len({tuple(chosen) for chosen in names}) > 1
    assert all(chosen == sorted(set(chosen)) for chosen in names)
    every = show.whole(records, 12, 0)
    assert [cell.caption for cell in every] == [f"a  {W}x{H}", f"b  {W}x{H}", "c  1000x1100"]
    np.testing.assert_array_equal(every[0].image, picture(0))
    np.testing.assert_array_equal(every[1].label, records[1]["label"])


def test_crops_are_the_first_that_training_sees(config):
    records = open_records(config.data, "train")
    cells = show.crops(config, records, 6, seed=3)
    batches = list(pipeline.train_iterator(config.data, records, seed=3, batch_size=2, steps=3))
    for key in ("image", "label"):
        expected = np.concatenate([batch[key] for batch in batches])
        np.testing.assert_array_equal([getattr(cell, key) for cell in cells], expected)
    order = np.concatenate([batch["record"] for batch in batches]).tolist()
    assert [cell.caption for cell in cells] == [f"{'ab'[record]}  crop 20x20" for record in order]


def test_pictures_are_written_for_every_split(config, tmp_path):
    for split, augmented in (("train+val", False), ("train", True)):
        show.show(config, split, tmp_path / "new" / "folder", augmented, images=4)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "camvid-balance.png",
        "camvid-train+val.png",
        "camvid-train-augmented.png",
    ]
    with pytest.raises(ConfigError, match=r"no split 'tran' in .*camvid.*it has: train, val"):
        show.show(config, "tran", tmp_path)


def test_the_command_takes_the_augmentation_of_a_configuration(config, tmp_path):
    root = pathlib.Path(__file__).parent.parent
    command = [sys.executable, "-m", "duc_dlc_jax.data.show", f"--output={tmp_path}"]
    command += ["--config=configs/camvid.py", "--augmented", "--images=2", "--seed=5"]
    command += [f"--data_dir={config.data.dir}"]
    command += [f"--config.data.{k}={config.data[k]}" for k in ("base_size", "crop_size")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sheet, plot = (pathlib.Path(line) for line in done.stdout.splitlines())
    assert plot.is_file()
    expected = config_lib.load(str(root / "configs" / "camvid.py"))
    expected.data.update({k: config.data[k] for k in ("dir", "base_size", "crop_size")})
    (again, _) = show.show(expected, "train", tmp_path / "again", True, images=2, seed=5)
    assert sheet.read_bytes() == again.read_bytes()
