"""The benchmark's arithmetic and its command, on the tiny network."""

import json
import sys
import time

import numpy as np
import pytest

import networks as networks_of_tests
import runs
from duc_dlc_jax import describe
from duc_dlc_jax.benchmark import floor, networks, profile, timing
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import label_spec
from duc_dlc_jax.models import segmenter

pytestmark = pytest.mark.commands

UNKNOWN = "xla_of_another_version=true"


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    small = [f"--config.{name}={value}" for name, value in runs.TINY.items()]
    command = [sys.executable, "-m", "duc_dlc_jax.benchmark", "--config=configs/demo.py", *small]
    command += ["--steps=1", "--rounds=2", "--size=64x96", "--profile", f"--json={file}"]
    command += ["--what=train,infer,networks", "--networks=14/32@65x2", f"--xla_options={UNKNOWN}"]
    result = runs.run(command, devices=2)
    return json.loads(file.read_text()), result.stdout


def test_devices_and_batches(figures):
    values, printed = figures
    assert (values["devices"], values["dtype"]) == (2, "float32")
    assert (values["train"]["image"], values["infer"]["image"]) == ([64, 64], [64, 96])
    assert values["train"]["batch_size"] == runs.TINY["train.batch_size"]
    assert values["infer"]["batch_size"] == 1
    assert f"2 x {values['device']}" in printed
    assert "of the layer-wise floor" in printed
    assert "MiB per device" in printed


def test_rates_follow_from_seconds_and_multiply_adds(figures):
    values, _ = figures
    config = runs.tiny_config("data")
    model = segmenter.create(config.model, label_spec("scenes").num_classes)
    for kind, passes, size in (("train", 3, (64, 64)), ("infer", 1, (64, 96))):
        f, forward = values[kind], 2 * sum(describe.macs(model, *size).values())
        assert f["seconds"] == np.median(f["rounds"]) > 0
        assert f["images_per_second"] == pytest.approx(f["batch_size"] / f["seconds"])
        assert f["flop_per_second"] == pytest.approx(passes * forward * f["images_per_second"])
        assert f["floor_share"] == pytest.approx(f["floor_seconds"] / f["seconds"])
        assert f["floor_seconds"] == pytest.approx(sum(f["floor_by_group"].values()))
        assert f["peak_bytes_per_device"] > 0
    assert 0 < values["infer"]["folded_floor_seconds"] < values["infer"]["floor_seconds"]


def test_the_profile_knows_the_parts_of_the_network(figures):
    rows = figures[0]["train"]["profile"]
    found = {(row["group"], row["direction"]) for row in rows if row["seconds"] > 0}
    for part in ("stem", "layer1", "layer4", "guidance", "duc", "dlc", "loss"):
        assert {(part, "forward"), (part, "backward")} <= found
    assert ("optimizer", "forward") in found
    unknown = sum(row["seconds"] for row in rows if row["group"] == "other")
    assert unknown < 0.1 * sum(row["seconds"] for row in rows)


def test_other_networks_and_options(figures):
    values, printed = figures
    other = values["networks"]["14/32@65x2"]
    assert (other["image"], other["batch_size"]) == ([65, 65], 2)
    assert other["seconds"] == np.median(other["rounds"]) > 0
    assert UNKNOWN.split("=")[0] in values["networks"][UNKNOWN]["failed"]
    assert f"{UNKNOWN}: failed: " in printed


def test_names_of_networks_and_options():
    config = runs.tiny_config("data")
    changed = networks.network(config, "101/8@768x16")
    assert (changed.model.depth, changed.model.output_stride) == (101, 8)
    assert (changed.data.crop_size, changed.train.batch_size) == (768, 16)
    assert networks.option("xla_a_b=true") == {"xla_a_b": True}
    assert networks.option("xla_a_b=3") == {"xla_a_b": "3"}
    for function, text in (
        (lambda t: networks.network(config, t), "101x8"),
        (networks.option, "a=b"),
    ):
        with pytest.raises(ConfigError, match=text):
            function(text)


def test_groups_of_operations():
    name = "jit(train_step)/transpose(jvp(Segmenter))/backbone/layer2_3/conv1/dot_general"
    assert profile.group(name, ["backbone", "duc"]) == ("layer2", "backward")
    name = "jit(train_step)/jvp(Segmenter)/duc/duc._guidance/duc._strided/g_bn/reduce_sum"
    assert profile.group(name, ["backbone", "duc"]) == ("guidance", "forward")
    assert profile.group("jit(train_step)/add", ["backbone"]) == ("other", "forward")


def test_floor_by_hand():
    """A convolution bound by arithmetic, one bound by memory, and the image's, without gradient."""
    ceilings = {"flop_per_second": 100.0, "byte_per_second": 10.0}
    busy = describe.Convolution(("dlc", "a"), 1, 2, 3, 1000)
    moving = describe.Convolution(("dlc", "b"), 100, 50, 350, 10)
    first = describe.Convolution(("backbone", "conv1"), 1, 1, 1, 500)
    norms = {moving.path, first.path}
    found = floor.seconds([busy, moving, first], norms, 2, 4, ceilings, training=False)
    moved = (2 * 100 + 2 * 350 + 50) * 4 / 10
    bn = {layer: 2 * 2 * layer.outputs * 4 / 10 for layer in (moving, first)}
    assert found["dlc"] == pytest.approx(2 * 2 * 1000 / 100 + moved + bn[moving])
    assert found["stem"] == pytest.approx(2 * 2 * 500 / 100 + bn[first])
    training = floor.seconds([first], norms, 2, 4, ceilings, training=True)
    assert training["stem"] == pytest.approx(2 * 20 + 3.5 * bn[first])


def test_the_floor_knows_which_convolutions_have_a_bn():
    model = segmenter.create(runs.tiny_config("data").model, 5)
    layers = floor.executed(model, 64, 64)
    stats = networks_of_tests.shapes_of(model)["batch_stats"]
    without = {c.path[-1] for c in layers} - {p[-1] for p in floor.with_norm(layers, stats)}
    assert without == {"classifier", "coefficients_guidance", "coefficients_low"}


def test_the_floor_has_less_of_the_guidance_than_the_paper():
    model = segmenter.create(runs.tiny_config("data").model, 5)
    names = [c.path[-1] for c in floor.executed(model, 64, 64)]
    paper = {c.path[-1]: c for c in describe.convolutions(model, 64, 64)}
    assert names.count("guidance_conv") == 1
    assert not {"g_conv1", "g_conv2"} & set(names)
    (ours,) = (c for c in floor.executed(model, 64, 64) if c.path[-1] == "guidance_conv")
    taps = 16 * 16 * 9
    assert ours.macs == paper["guidance_conv"].macs + taps * 3 * 8
    assert ours.inputs == 3 * taps < paper["g_conv1"].inputs


def test_peak_memory_is_within_the_estimate(figures):
    config = runs.tiny_config("data")
    model = segmenter.create(config.model, label_spec("scenes").num_classes)
    peak = figures[0]["train"]["peak_bytes_per_device"]
    state, images = describe.state_bytes(config, model), config.train.batch_size // 2
    estimate = state + images * describe.activation_bytes(model, 64, 64)
    assert state < peak
    assert 0.4 * estimate < peak < estimate


def test_warm_up_does_not_count():
    pauses = iter([0.2] * timing.WARM_UP + [0.0, 0.01, 0.2])
    assert 0.01 <= timing.median_seconds(lambda: time.sleep(next(pauses)), 3) < 0.2


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
