"""`duc_dlc_jax.describe`: the figures of a configuration, as JSON and as text."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import describe, forecast, provenance, train_step
from duc_dlc_jax.models import counts, segmenter
from repository import ROOT
from runs import TINY, run, tiny_config


@pytest.fixture(scope="module")
def demo():
    """The configuration and what the command prints for it with --json."""
    command = [sys.executable, "-m", "duc_dlc_jax.describe", "--config=configs/demo.py", "--json"]
    command.append("--config.data.crop_size=160")
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr
    config = config_lib.load("configs/demo.py")
    config.data.crop_size = 160
    return config, json.loads(result.stdout)


def test_json_is_what_the_library_computes(demo):
    config, printed = demo
    assert printed == json.loads(json.dumps(describe.describe(config)))


def test_figures(demo):
    _, printed = demo
    classes, width = printed["classes"], 64 + 4 * 32
    assert printed["data set"] == "scenes"
    assert printed["image"] == [160, 160]
    assert list(printed["grids"].values()) == [[160, 160], [40, 40], [20, 20], [5, 5], [20, 20]]
    assert printed["receptive_field_dlc"] == [7, 19, 43, 79]
    assert set(printed["parameters"]) == {"backbone", "duc", "dlc", "classifier"}
    assert printed["parameters"]["classifier"] == (width + 1) * classes
    assert printed["macs"]["classifier"] == width * classes * 20 * 20
    assert printed["macs"]["dlc"] == 20 * 20 * dlc_weights(16 * 8 + 64, 64, 32)


def dlc_weights(inputs, width, growth) -> int:
    """Weights of DLC's convolutions: the reduction, then 1x1 and 3x3 of four branches."""
    branches = sum((width + i * growth) * growth + 9 * growth * growth for i in range(4))
    return inputs * width + branches


def test_text_has_the_same_figures(demo):
    _, printed = demo
    lines = describe.text(printed).splitlines()
    assert lines[0].startswith(f"scenes, {printed['classes']} classes; ")
    assert "160x160" in lines[0]
    table = dict(re.findall(r"^(\w+) +([\d,]+) +[\d.]+$", "\n".join(lines), re.MULTILINE))
    counts = {part: int(count.replace(",", "")) for part, count in table.items()}
    total = counts.pop("total")
    assert counts == printed["parameters"]
    assert total == sum(counts.values())
    work = next(line for line in lines if line.startswith("total")).split()[-1]
    assert work == f"{sum(printed['macs'].values()) / 1e9:.2f}"
    assert "grid of layer4 (1/32): 5 x 5" in lines
    cascade = (
        "receptive field of DLC's cascade: 7 -> 19 -> 43 -> 79 cells of the grid of context (1/8)"
    )
    assert cascade in lines
    assert lines[-1] == f"train state: {printed['train_state_bytes'] / 2**20:.0f} MiB"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ema", [0.0, 0.99])
def test_bytes_of_the_train_state(dtype, ema):
    """Parameters, momentum, statistics, two int32 counters; EMA adds parameters and statistics."""
    config = tiny_config("", model__dtype=dtype, optimizer__ema_decay=ema)
    model = segmenter.create(config.model, 5)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    params, stats = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes[name]))
        for name in ("params", "batch_stats")
    )
    assert params == sum(counts.parameters(model).values())
    expected = 4 * (2 * params + stats) + 2 * 4
    if ema:
        expected += 4 * (params + stats)
    assert train_step.state_bytes(model, config) == expected


def test_a_configuration_that_cannot_run_is_refused():
    config = config_lib.load("configs/demo.py")
    config.model.output_stride = 4
    with pytest.raises(config_lib.ConfigError, match=r"model\.output_stride=4; allowed: 32, 16, 8"):
        describe.describe(config)


def test_the_paper_network_on_cityscapes_has_its_documented_size():
    config = config_lib.load("configs/cityscapes.py")
    config.model.depth = 14  # the heads do not know the depth
    figures = describe.describe(config)
    assert figures["classes"] == 19
    parts = figures["parameters"]
    assert parts["duc"] == 10_788_224
    assert parts["dlc"] + parts["classifier"] == 1_497_107
    assert figures["image"] == [768, 768]


@pytest.mark.multiprocess
def test_work_and_traffic_of_a_device_do_not_grow_with_their_number(tmp_path):
    """Two images a device on 8 and on 256 devices: equal FLOPs and equal bytes sent."""
    found = {}
    for devices in (8, 256):
        command = [
            sys.executable,
            "-m",
            "duc_dlc_jax.describe",
            "--config=configs/demo.py",
            "--json",
        ]
        command += [f"--config.{name}={value}" for name, value in TINY.items()]
        command += [f"--config.train.batch_size={2 * devices}", f"--devices={devices}"]
        result = run(command, DUC_DLC_CACHE=str(tmp_path))
        found[devices] = json.loads(result.stdout)
        assert found[devices]["mesh"] == {"data": devices, "space": 1}
        assert run(command, DUC_DLC_CACHE=str(tmp_path)).stdout == result.stdout  # kept
    for name in ("flops_per_device", "collectives_per_device"):
        assert found[8][name] == found[256][name]
    (kind,) = found[8]["collectives_per_device"]
    assert kind == "all-reduce"


@pytest.mark.multiprocess
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_tpu_slice_that_is_not_there(tmp_path):
    """The real compiler takes our options, and we read its program and its memory."""
    command = [sys.executable, "-m", "duc_dlc_jax.describe", "--config=configs/demo.py", "--json"]
    command += [f"--config.{name}={value}" for name, value in TINY.items()]
    found = json.loads(run([*command, "--topology=v5e:2x2"], DUC_DLC_CACHE=str(tmp_path)).stdout)
    assert found["mesh"] == {"data": 4, "space": 1}
    (kind,) = found["collectives_per_device"]
    assert kind == "all-reduce"
    config = tiny_config("")
    model = segmenter.create(config.model, 8)
    gradients = 4 * sum(counts.parameters(model).values())  # bytes
    assert gradients < found["collectives_per_device"][kind]["bytes"] < 1.1 * gradients
    assert found["state_bytes"] > train_step.state_bytes(model, config)
    assert found["fits"]
    assert 0 < found["seconds"]["work"] < found["seconds"]["step"] < 0.1
    assert 0 < found["efficiency"] < 1


def test_a_forecast_names_its_constants_and_the_largest_batch():
    chip = forecast.CHIPS["v5e"]
    found = {
        "mesh": {"data": 16, "space": 1},
        "flops_per_device": 0.4 * 197e12 * 0.1,  # 100 ms
        "bytes_accessed_per_device": 819e9 * 0.05,
        "collectives_per_device": {"all-reduce": {"count": 100, "bytes": 200_000_000}},
        "state_bytes": 1.2e9,
        "temporary_bytes": 4e9,
        "memory_bytes": 5.2e9,
    }
    found |= forecast.predicted(found, 64, chip)
    assert found["fits"]
    assert found["largest_batch"] == 16 * 14  # (0.95 x 16 - 1.2) / 1 GB an image
    assert found["seconds"]["work"] == pytest.approx(0.1)
    assert found["seconds"]["collectives"] == pytest.approx(0.4 / 400 + 100 * 10e-6)
    text = forecast.text(found)
    for word in ("0.4 x 197 TFLOP/s", "819 GB/s", "400 GB/s", "10 us each", "efficiency 98%"):
        assert word in text


def test_a_forecast_is_kept_until_the_code_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("DUC_DLC_CACHE", str(tmp_path))
    config, made = tiny_config(""), []

    def make():
        made.append(len(made))
        return {"made": made[-1]}

    assert [forecast.cached(config, "2 devices", make)["made"] for _ in range(2)] == [0, 0]
    monkeypatch.setattr(provenance, "sources", lambda: "other code")
    assert forecast.cached(config, "2 devices", make)["made"] == 1


def test_an_unknown_topology_lists_the_chips():
    with pytest.raises(config_lib.ConfigError, match="chips: v5e, v5p, v6e"):
        forecast.on_topology(tiny_config(""), "h100:8", effort=False)


def test_two_forecasts_at_a_time_are_refused(monkeypatch):
    args = SimpleNamespace(config=tiny_config(""), devices=4, topology="v5e:2x2", hours=False)
    monkeypatch.setattr(describe.flags, "FLAGS", args)
    with pytest.raises(config_lib.ConfigError, match="--devices, --topology and --hours one at"):
        describe.main([])
