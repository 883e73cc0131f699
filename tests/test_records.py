"""Stored records: encodings, tiles, and reading a part of a large image."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from duc_dlc_jax import config as configuration
from duc_dlc_jax.data import builders, codec, pipeline
from duc_dlc_jax.data.builders import files, sources
from duc_dlc_jax.data.labels import IGNORE, label_spec
from duc_dlc_jax.data.prepare import build
from duc_dlc_jax.data.records import open_records

SIZE = (700, 1600)  # H, W: more than one row and column of tiles, none of them whole multiples
SPEC = label_spec("scenes")


def large(seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 8, (SIZE[0] // 20, SIZE[1] // 20)).astype(np.uint8)
    label = np.kron(coarse, np.ones((20, 20), np.uint8))
    image = (label[..., None] * 25 + rng.integers(0, 50, (*SIZE, 3))).astype(np.uint8)
    label[0, :9] = IGNORE
    return image, label


def opened(folder, split, **changes):
    data: Any = configuration.default().data
    data.update({"name": "large", "dir": str(folder), "base_size": 700, "crop_size": 96} | changes)
    return data, open_records(data, split)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two large images and a small one, stored in each encoding."""
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    folder = tmp_path_factory.mktemp("large")
    small = large(2)[0][:50, :60], large(2)[1][:50, :60]
    arrays = [large(0), small, large(1)]
    items = [sources.Item(f"i{k}", *pair) for k, pair in enumerate(arrays)]
    for encoding in ("auto", "png", "jpeg"):
        build("large", {"train": items}, SPEC, folder / encoding, {"train": 3}, encoding)
    return folder, arrays


@pytest.mark.parametrize("encoding", ["auto", "png"])
def test_tiles_are_lossless(stored, encoding):
    folder, arrays = stored
    _, records = opened(folder / encoding, "train")
    assert len(records) == 3
    for k, (image, label) in enumerate(arrays):
        assert records.size(k) == label.shape
        np.testing.assert_array_equal(records[k]["image"], image)
        np.testing.assert_array_equal(records[k]["label"], label)
        assert records[k]["name"] == f"i{k}"


def test_jpeg_tiles_lose_little(stored):
    folder, arrays = stored
    _, records = opened(folder / "jpeg", "train")
    error = np.abs(records[0]["image"].astype(int) - arrays[0][0])
    assert 0 < error.mean() < 10  # noise is the worst that JPEG can meet
    np.testing.assert_array_equal(records[0]["label"], arrays[0][1])


def test_any_region_reads_only_the_tiles_it_touches(stored):
    folder, arrays = stored
    _, records = opened(folder / "auto", "train")
    source, asked = records._opened()[0]._source, []

    class Counting:
        def __getitem__(self, number):
            asked.append(number)
            return source[number]

        def __getitems__(self, numbers):
            asked.extend(numbers)
            return source.__getitems__(numbers)

    records._opened()[0]._source = Counting()
    tiles = -(-SIZE[0] // builders.TILE) * -(-SIZE[1] // builders.TILE)
    assert len(source) == 2 * tiles + 1
    rng = np.random.default_rng(0)
    for _ in range(40):
        top, bottom = np.sort(rng.choice(SIZE[0] + 1, 2, replace=False)).tolist()
        left, right = np.sort(rng.choice(SIZE[1] + 1, 2, replace=False)).tolist()
        asked.clear()
        region = records.region(2, (top, left, bottom, right))
        np.testing.assert_array_equal(region["image"], arrays[2][0][top:bottom, left:right])
        np.testing.assert_array_equal(region["label"], arrays[2][1][top:bottom, left:right])
        spans = [
            (high - 1) // builders.TILE - low // builders.TILE + 1
            for low, high in ((top, bottom), (left, right))
        ]
        assert len(asked) == spans[0] * spans[1]
        assert min(asked) > tiles  # the last image's


def test_crops_of_tiles_equal_crops_of_whole_images(stored):
    folder, _ = stored
    crops = {}
    for in_memory in (False, True):
        data, records = opened(folder / "auto", "train", in_memory=in_memory)
        batches = pipeline.train_iterator(data, records, seed=0, batch_size=4, steps=3)
        crops[in_memory] = list(batches)
    for tiled, whole in zip(crops[False], crops[True], strict=True):
        for key in tiled:
            np.testing.assert_array_equal(tiled[key], whole[key])


def test_class_points_lie_on_their_class(stored):
    folder, arrays = stored
    _, records = opened(folder / "auto", "train")
    points = records.class_points()
    assert {(k, train) for k, train in points[:, :2].tolist() if k != 1} == {
        (k, train) for k in (0, 2) for train in range(8)
    }
    for record, train, y, x in points:
        assert arrays[record][1][y, x] == train


def test_jpeg_files_stay_as_they_are(tmp_path):
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    from duc_dlc_jax.data.builders.examples import make_example

    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    Image.fromarray(large(0)[0]).save(tmp_path / "x.jpg", exif=exif)
    label = np.zeros(SIZE[::-1], np.uint8)
    item = sources.Item("x", files.File(tmp_path / "x.jpg"), label)
    kept = make_example(item, SPEC)
    assert [r["image"] for r in kept.records] == [(tmp_path / "x.jpg").read_bytes()]
    assert (kept.height, kept.width) == SIZE[::-1]
    cut = make_example(item, SPEC, "raw")
    whole = codec.decode_image((tmp_path / "x.jpg").read_bytes(), "x")
    last = cut.records[-1]
    tile = np.frombuffer(last["image"], np.uint8).reshape(last["height"], last["width"], 3)
    np.testing.assert_array_equal(tile, whole[last["top"] :, last["left"] :])


def test_a_second_preparation_at_the_same_time_is_refused(tmp_path):
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    from duc_dlc_jax.data.labels import DataError

    def items():
        yield sources.Item("a", *large(0))
        with pytest.raises(DataError, match="another process is preparing"):
            build("large", {"train": []}, SPEC, tmp_path, {"train": 0})

    leftover = tmp_path / "large" / "incomplete.ABC_2.0.0"
    leftover.mkdir(parents=True)
    build("large", {"train": items()}, SPEC, tmp_path, {"train": 1})
    assert [p.name for p in (tmp_path / "large").iterdir()] == [builders.VERSION]
