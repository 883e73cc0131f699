"""Crops that devices cut from images they keep, against those of the input pipeline."""

import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from duc_dlc_jax import config as configuration
from duc_dlc_jax import sharding
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import pipeline, resident
from duc_dlc_jax.data.batches import device_batches
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.data.records import RecordError, open_records
from runs import tiny_config


class Drawn:
    """Records of several sizes: smooth colours, so that neighbouring pixels differ by little."""

    labelled, in_flight, folder, split = True, None, pathlib.Path("drawn"), "train"

    def __init__(self, sizes=((48, 64), (64, 48), (80, 56), (40, 40)), bad=()):
        self._sizes, self._bad = list(sizes), bad

    def __len__(self):
        return len(self._sizes)

    def size(self, index):
        return self._sizes[index]

    def sizes(self):
        return self._sizes

    def __getitem__(self, index):
        if index in self._bad:
            raise RecordError(f"record {index} is broken")
        height, width = self._sizes[index]
        y, x = np.mgrid[:height, :width]
        image = np.stack([4 * y + index, 3 * x, 255 - 3 * y], -1)
        return {"image": (image % 256).astype(np.uint8), "label": ((x + y) // 5).astype(np.uint8)}

    def region(self, index, box):
        top, left, bottom, right = box
        return {name: value[top:bottom, left:right] for name, value in self[index].items()}

    def class_points(self):
        return np.array([(i, i, 7 + i, 20 + i) for i in range(len(self))], np.int32)


def tiny(**changes):
    config = tiny_config("", train__batch_size=4, train__steps=6)
    config.data.update({"base_size": 48, "crop_size": 40} | changes)
    configuration.validate(config)
    return config


def both(config, records: Any, steps=6):
    """The batches of the devices and of the pipeline, as NumPy arrays."""
    positions = pipeline.Positions(
        config.data, records, config.seed, config.train.batch_size, range(steps)
    )
    mesh = sharding.make_mesh()
    cut = [
        jax.device_get(batch) | {"record": indices}
        for batch, indices in resident.batches(config.data, records, positions, mesh)
    ]
    seed, size = config.seed, config.train.batch_size
    host = pipeline.train_iterator(config.data, records, seed=seed, batch_size=size, steps=steps)
    return cut, list(host)


@pytest.mark.parametrize(
    "changes",
    [
        {"antialias": True, "crop_width": 56},
        {"antialias": True, "flip": "up_down", "class_uniform_share": 0.5},
        {"flip": "none", "scale_min": 1.0, "scale_max": 1.0, "crop_size": 56},
        {"bad_records": "mask"},
    ],
    ids=["low-passed", "upside down", "unscaled", "bad"],
)
def test_labels_are_the_pipelines_and_pixels_but_for_rounding(changes):
    records = Drawn(bad=(2,) if "bad_records" in changes else ())
    cut, host = both(tiny(**changes), records)
    assert len(cut) == len(host) == 6
    assert any((batch["label"] == IGNORE).any() for batch in host)  # some are padded
    for ours, theirs in zip(cut, host, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("label", "valid", "record", "bad"):
            np.testing.assert_array_equal(ours[name], theirs[name], name)
        assert ours["image"].dtype == np.uint8
        apart = np.abs(ours["image"].astype(int) - theirs["image"])
        # The colours wrap around, 255 to 0, where a 32nd of a pixel is 8 levels.
        assert (apart > 1).mean() < 0.01
        assert apart.max() <= 8
    if "bad_records" in changes:
        black = [b["image"][b["bad"]] for b in cut]
        assert sum(map(len, black)) > 0
        assert not any(image.any() for image in black)


def test_on_real_crops_no_pixel_is_further_than_one_level(scenes_dir):
    config = tiny(name="scenes", dir=str(scenes_dir), base_size=192, crop_size=128, antialias=True)
    records = open_records(config.data, "train")
    cut, host = both(config, records, steps=4)
    apart = [np.abs(a["image"].astype(int) - b["image"]) for a, b in zip(cut, host, strict=True)]
    assert np.max(apart) == 1
    assert np.mean(apart) < 0.1  # Pillow rounds twice
    assert all((a["label"] == b["label"]).all() for a, b in zip(cut, host, strict=True))
    assert any((a["label"] == IGNORE).any() for a in cut)


def test_training_reads_them_and_starts_in_the_middle_with_the_same_bits():
    config, mesh = tiny(on_device=True), sharding.make_mesh()
    records: Any = Drawn()
    config.model.bn_padding = "masked"
    straight = list(device_batches(config, records, 0, 6, mesh))
    resumed = list(device_batches(config, records, 3 * 4, 3, mesh))
    assert straight[0][0].keys() == {"image", "label", "valid"}
    for (one, first), (other, second) in zip(straight[3:], resumed, strict=True):
        np.testing.assert_array_equal(first, second)
        jax.tree.map(np.testing.assert_array_equal, one, other)
    kept = resident.upload.cache_info().hits
    next(device_batches(config, records, 0, 1, mesh))
    assert resident.upload.cache_info().hits == kept + 1  # decoded and sent once


def test_a_bad_record_ends_the_run_by_default():
    with pytest.raises(RecordError, match="record 1 is broken"):
        both(tiny(), Drawn(bad=(1,)))


@pytest.mark.parametrize("name", ["blur_probability", "rotate_degrees", "photometric_probability"])
def test_what_devices_do_not_do_is_refused(name):
    with pytest.raises(ConfigError, match=rf"data\.{name}=0\.5 and data\.on_device are both set"):
        tiny(on_device=True, **{name: 0.5})


def test_a_set_that_does_not_fit_is_refused_with_the_arithmetic():
    device = SimpleNamespace(process_index=0, memory_stats=lambda: {"bytes_limit": 80 * 2**30})
    mesh: Any = SimpleNamespace(devices=np.array([[device]]))
    records: Any = Drawn()
    with pytest.raises(ConfigError, match=r"take 50\.0 GiB on each device, more than 50% of its"):
        resident._check_memory(50 * 2**30, mesh, records)
    resident._check_memory(30 * 2**30, mesh, records)
