"""The benchmark's arithmetic and its command, on the tiny network."""

import json
import sys
import time

import numpy as np
import pytest

import runs
from duc_dlc_jax import benchmark, describe
from duc_dlc_jax.data.labels import label_spec
from duc_dlc_jax.models import segmenter


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    small = [f"--config.{name}={value}" for name, value in runs.TINY.items()]
    command = [sys.executable, "-m", "duc_dlc_jax.benchmark", "--config=configs/demo.py"]
    result = runs.run([*command, *small, "--steps=2", f"--json={file}"], devices=2)
    return json.loads(file.read_text()), result.stdout


def test_devices_and_batches(figures):
    values, printed = figures
    assert (values["devices"], values["image"], values["dtype"]) == (2, [64, 64], "float32")
    assert values["train"]["batch_size"] == runs.TINY["train.batch_size"]
    assert values["inference"]["batch_size"] == 1
    assert f"2 x {values['device']}" in printed
    assert "images/s" in printed
    assert "MiB per device" in printed


def test_rates_follow_from_seconds_and_multiply_adds(figures):
    values, _ = figures
    config = runs.tiny_config("data")
    model = segmenter.create(config.model, label_spec("scenes").num_classes)
    forward = 2 * sum(describe.macs(model, 64, 64).values())
    for kind, passes in (("train", 3), ("inference", 1)):
        f = values[kind]
        assert f["seconds"] > 0
        assert f["images_per_second"] == pytest.approx(f["batch_size"] / f["seconds"])
        assert f["flop_per_second"] == pytest.approx(passes * forward * f["images_per_second"])


def test_peak_memory_is_within_the_estimate(figures):
    config = runs.tiny_config("data")
    model = segmenter.create(config.model, label_spec("scenes").num_classes)
    peak = figures[0]["train"]["peak_bytes_per_device"]
    state, images = describe.state_bytes(config, model), config.train.batch_size // 2
    estimate = state + images * describe.activation_bytes(model, 64, 64)
    assert state < peak
    assert 0.4 * estimate < peak < estimate


def test_warm_up_does_not_count():
    pauses = iter([0.2] * benchmark.WARM_UP + [0.0, 0.01, 0.2])
    assert 0.01 <= benchmark.median_seconds(lambda: time.sleep(next(pauses)), 3) < 0.2


def test_evaluation_holds_neither_logits_nor_probabilities_of_a_whole_image(tmp_path):
    """1024x2048 pixels of 150 classes: in float32 either would be 1.26 GB."""
    file = tmp_path / "figures.json"
    small = runs.TINY | {"data.name": "ade20k"}
    command = [sys.executable, "-m", "duc_dlc_jax.benchmark", "--config=configs/demo.py"]
    command += [f"--config.{name}={value}" for name, value in small.items()]
    command += ["--evaluate=1024x2048", "--protocol=multi_scale", "--set=scales=(0.5,)"]
    own = np.ones(2**28)  # 2 GiB of this process, which are not the command's
    result = runs.run([*command, "--steps=1", f"--json={file}"])
    assert own.any()
    values = json.loads(file.read_text())
    assert values["classes"] == 150
    assert values["programs"]["network"] == 1
    assert values["images_per_second"] == pytest.approx(1 / values["seconds"])
    assert f"150 classes: {values['protocol']}" in result.stdout
    print(f"{values['peak_process_bytes'] / 2**30:.2f} GiB, {values['seconds']:.1f} s")
    assert values["peak_process_bytes"] < 2**30 < 4 * 1024 * 2048 * 150
