"""The input benchmark: both sides do the same work, and its figures are what they say."""

import io
import itertools
import multiprocessing
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import runs
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.benchmark import __main__ as benchmark
from duc_dlc_jax.benchmark import formats as benchmark_formats
from duc_dlc_jax.benchmark import inputs as benchmark_input
from duc_dlc_jax.benchmark import model as benchmark_model
from duc_dlc_jax.data import builders, photos, transforms
from duc_dlc_jax.data.records import open_records
from duc_dlc_jax.data.transforms import Augmentation

pytestmark = pytest.mark.commands

SIZE = (120, 160)


def config(folder, name):
    c = config_lib.default()
    changes = {"name": name, "dir": str(folder), "base_size": 120, "crop_size": 96}
    c.data.update(changes)
    c.train.batch_size = 2
    return c


@pytest.fixture(scope="module", params=["camvid", "ade20k"])
def prepared(request, tmp_path_factory):
    """Photos as PNG and as JPEG."""
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    folder = tmp_path_factory.mktemp(request.param)
    photos.prepare_photos(request.param, folder, 3, SIZE)
    return config(folder, request.param)


def test_photos_repeat_with_their_seed_and_compress_like_photos():
    image, label = photos.photo(360, 480, 1, 11)
    again, _ = photos.photo(360, 480, 1, 11)
    np.testing.assert_array_equal(image, again)
    assert (photos.photo(360, 480, 2, 11)[0] != image).any()
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    assert 0.35 < file.tell() / image.size < 0.55
    assert len(np.unique(label)) > 4
    assert label.max() < 11


def test_photos_are_stored_as_their_data_set_is(prepared):
    records = open_records(prepared.data, "train")
    assert len(records) == 3
    assert records.size(0) == SIZE
    assert records.labelled
    stored = records.tiles(0, (0, 0, *SIZE))[0]["encoding"]
    assert stored == (b"jpeg" if prepared.data.name == "ade20k" else b"raw")


def test_unknown_photos_are_refused(tmp_path):
    with pytest.raises(config_lib.ConfigError, match="no photos imitate 'kitti'; allowed: scenes"):
        photos.prepare_photos("kitti", tmp_path, 1)


def test_written_files_are_the_records(prepared, tmp_path):
    records = open_records(prepared.data, "train")
    for i, (image, label) in enumerate(benchmark_input.write_files(records, tmp_path)):
        np.testing.assert_array_equal(np.asarray(Image.open(label)), records[i]["label"])
        if prepared.data.name == "camvid":
            np.testing.assert_array_equal(np.asarray(Image.open(image)), records[i]["image"])
        else:
            with open(image, "rb") as file:
                assert file.read() == records.tiles(i, (0, 0, *SIZE))[0]["image"]


def test_both_sides_cut_the_same_crops(prepared, tmp_path):
    records = open_records(prepared.data, "train")
    augmentation = Augmentation.from_config(prepared.data)
    files = benchmark_input.write_files(records, tmp_path)
    theirs = benchmark_input.WholeImages(files, augmentation)
    padded = flipped = 0
    agreement = []
    for i in range(24):
        drawn = transforms.draw_geometry(np.random.default_rng(i), SIZE, augmentation)
        padded, flipped = padded + (drawn.height < 96), flipped + drawn.flipped

        def read(box, number=i % 3):
            region = records.region(number, box)
            return region["image"], region["label"]

        image, label = transforms.cut(read, SIZE, drawn, augmentation)
        found = theirs[i]
        assert found["image"].shape == image.shape
        assert np.abs(found["image"].astype(int) - image).mean() < 1
        agreement.append((found["label"] == label).mean())  # theirs is up to half a pixel off
    assert np.mean(agreement) > 0.93
    assert 0 < padded < 24
    assert 0 < flipped < 24
    image = benchmark_input.WholeImages(files, augmentation, normalise=True)[0]["image"]
    assert (image.shape, image.dtype) == ((3, 96, 96), np.float32)


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_rates_count_the_work_after_the_warm_up_and_no_waiting():
    closed = []

    def batches():
        try:
            for number in itertools.count():
                spin(0.2 if number < benchmark_input.WARM_UP else 0.02)
                time.sleep(0.02)
                yield {"image": np.zeros((5, 1))}
        finally:
            closed.append(True)

    assert 180 < benchmark_input.crops_per_second(batches(), 0.6) < 280  # 5 crops in 20 ms
    assert closed


def test_cpu_time_of_worker_processes_counts():
    before = benchmark_input.cpu_seconds()
    worker = multiprocessing.get_context("spawn").Process(target=spin, args=(0.5,))
    worker.start()
    used = 0.0
    while worker.is_alive():
        used = max(used, benchmark_input.cpu_seconds() - before)
        time.sleep(0.02)
    assert used > 0.4


def test_the_command_reports_rates_conditions_and_a_missing_pytorch(prepared, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_input.importlib.util, "find_spec", lambda name: None)
    args = SimpleNamespace(config=prepared, steps=2, seconds=0.1, formats=False, synthetic=False)
    result = benchmark.measure_input(args)
    assert result["rounds"]["pipeline"][0] > 0
    assert result["crops_per_second"]["pipeline"] == np.median(result["rounds"]["pipeline"])
    assert result["ratio"] == {}
    assert {"cpu", "cores", "load_average", "versions"} <= result.keys()
    printed = capsys.readouterr().out
    assert "3 images of 160x120, crops of 96x96, per second of one core" in printed
    assert "PyTorch is not installed" in printed


def test_pytorchs_side_hands_over_batches(prepared, tmp_path):
    torch = pytest.importorskip("torch")
    records = open_records(prepared.data, "train")
    files = benchmark_input.write_files(records, tmp_path)
    images = benchmark_input.WholeImages(files, Augmentation.from_config(prepared.data))
    batch = next(benchmark_input._data_loader(images, 2))
    assert tuple(batch["image"].shape) == (2, 96, 96, 3)
    assert batch["label"].dtype == torch.uint8


def test_formats_hold_the_same_photos(monkeypatch, capsys):
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    monkeypatch.setattr(builders, "TILE", 64)
    monkeypatch.setattr(builders, "TILE_ABOVE", 64**2)
    formats = benchmark_formats.compare(config("", "cityscapes"), 1, 0.05, count=2, size=SIZE)
    assert list(formats) == ["raw tiles", "png tiles", "jpeg tiles", "whole png"]
    for row in formats.values():
        assert row["share_of_raw"] == pytest.approx(row["bytes_per_image"] / (4 * 120 * 160))
        assert row["crops_per_second"] > 0
    benchmark_formats.show(formats)
    assert "whole png" in capsys.readouterr().out


def test_fed_steps_beside_steps_with_one_batch(few_scenes):
    result = benchmark_model.fed(runs.tiny_config(few_scenes), steps=2, rounds=2)
    rates = result["images_per_second"]
    assert set(rates) == {"records", "one_batch"}
    assert len(result["rounds"]["records"]) == 2
    assert result["ratio"] == pytest.approx(rates["records"] / rates["one_batch"])
    assert 0 < result["cpu_ratio"] < 3
