"""The benchmark's arithmetic and its command, on the tiny network."""

import importlib.util
import json
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import networks as networks_of_tests
import runs
from duc_dlc_jax import programs, train_step
from duc_dlc_jax.benchmark import __main__ as benchmark
from duc_dlc_jax.benchmark import (
    bundles,
    floor,
    layers,
    memory,
    networks,
    profile,
    tables,
    timing,
)  # fmt: skip
from duc_dlc_jax.benchmark.figures import Figures
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import label_spec
from duc_dlc_jax.models import counts, segmenter
from repository import ROOT

pytestmark = pytest.mark.commands

UNKNOWN = "xla_of_another_version=true"
OTHER = "14/32@65x2+model.remat=blocks"


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    small = [f"--config.{name}={value}" for name, value in runs.TINY.items()]
    command = [sys.executable, "-m", "duc_dlc_jax.benchmark", "--config=configs/demo.py", *small]
    command += ["--steps=1", "--rounds=2", "--size=64x96", "--profile", f"--json={file}"]
    networks = [f"--networks={OTHER}", f"--xla_options={UNKNOWN}"]
    result = runs.run([*command, "--what=train,infer,networks", *networks], devices=2)
    values = json.loads(file.read_text())
    again = runs.run([*command, "--what=train,infer"], devices=2)
    return values, result.stdout, json.loads(file.read_text()), again.stdout


def test_devices_and_batches(figures):
    values, printed = figures[:2]
    assert (values["devices"], values["dtype"]) == (2, "float32")
    assert (values["train"]["image"], values["infer"]["image"]) == ([64, 64], [64, 96])
    assert values["train"]["batch_size"] == runs.TINY["train.batch_size"]
    assert values["infer"]["batch_size"] == 1
    assert f"2 x {values['device']}" in printed
    assert "of the layer-wise floor" in printed
    assert "MiB per device" in printed


def test_rates_follow_from_seconds_and_multiply_adds(figures):
    values = figures[0]
    config = runs.tiny_config("data")
    model = segmenter.create(config.model, label_spec("scenes").num_classes)
    for kind, passes, size in (("train", 3, (64, 64)), ("infer", 1, (64, 96))):
        f, forward = values[kind], 2 * sum(counts.macs(model, *size).values())
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
    values, printed = figures[:2]
    other = values["networks"][OTHER]
    assert (other["image"], other["batch_size"]) == ([65, 65], 2)
    assert other["seconds"] == np.median(other["rounds"]) > 0
    assert UNKNOWN.split("=")[0] in values["networks"][UNKNOWN]["failed"]
    assert f"{UNKNOWN}: failed: " in printed


def test_tables_have_what_was_measured(figures):
    page = tables.page(figures[0])
    train, other = figures[0]["train"], figures[0]["networks"][OTHER]
    assert f"| train, 4 of 64x64 | {tables.rate(train)}, " in page
    ratio = other["seconds"] / train["seconds"]
    assert f"| {OTHER} | {tables.rate(other)} | {ratio:.3f} | " in page
    assert f"| {UNKNOWN} | " in page
    assert "| guidance | " in page
    row = {"seconds": 0.001, "temporary_bytes": 2**20, "flop": 1}
    kinds = dict.fromkeys(("forward", "input gradient", "weight gradient"), 2e-3)
    torch = {"1 -> 2, 3x3, 4": kinds | {"clock": "graph"}}
    layer = {"1 -> 2, 3x3, 4": {"flop": 1, "calls": 50, "forward": 1e-3, "error": 0}}
    page = tables.page({"layers": layer, "layers_torch": torch, "losses": {"19 classes": row}})
    assert "| 1 -> 2, 3x3, 4 | 1.000 | 2.000 | 2.000 | 2.000 |" in page
    assert "| 19 classes | 1 ms | 1 MiB |" in page
    memory = {
        "a": {"images_per_device": 7, "limit_bytes": 2**30, "failed": "so"},
        "b": {"half": {}},
    }
    fed = {"on_device": {"images_per_second": {"records": 1, "one_batch": 2}, "ratio": 0.5}}
    page = tables.page({"memory": memory, "fed": fed})
    assert "| a | 7 | 1.0 GiB | so |" in page
    assert "| on_device | 1.0 | 2.0 | 0.500 |" in page


def test_the_page_of_speed_has_the_figures_of_its_files():
    page = (ROOT / "docs" / "performance.md").read_text()
    for file in (ROOT / "docs" / "results" / "speed").iterdir():
        values = json.loads(file.read_text())
        for row in (values[what] for what in ("train", "infer") if what in values):
            assert tables.ms(row["seconds"]).replace(" ms", "") in page
            for way in row["peer"]["ways"].values():
                assert ", ".join(f"{ratio:.2f}" for ratio in way["ratios"]) in page


def test_what_the_file_holds_is_not_measured_again(figures):
    first, _, second, printed = figures
    assert second == first
    assert "train: in " in printed
    assert f"{1000 * first['train']['seconds']:.1f} ms" in printed


def test_names_of_networks_and_options():
    config = runs.tiny_config("data")
    changed = networks.network(config, "101/8@768x16")
    assert (changed.model.depth, changed.model.output_stride) == (101, 8)
    assert (changed.data.crop_size, changed.train.batch_size) == (768, 16)
    changed = networks.network(config, "50/32@64x4+model.remat=blocks+train.accumulate=2")
    assert (changed.model.remat, changed.train.accumulate) == ("blocks", 2)
    assert networks.option("xla_a_b=true") == {"xla_a_b": True}
    assert networks.option("xla_a_b=3") == {"xla_a_b": "3"}
    for function, text in (
        (lambda t: networks.network(config, t), "101x8"),
        (lambda t: networks.network(config, f"50/32@64x4+{t}=1"), "model.remap"),
        (lambda t: networks.network(config, f"50/32@64x4+model.remat={t}"), "some"),
        (lambda t: networks.network(config, f"50/32@64x4+train.accumulate={t}"), "x2"),
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
    busy = counts.Convolution(("dlc", "a"), 1, 2, 3, 1000)
    moving = counts.Convolution(("dlc", "b"), 100, 50, 350, 10)
    first = counts.Convolution(("backbone", "conv1"), 1, 1, 1, 500)
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
    paper = {c.path[-1]: c for c in counts.convolutions(model, 64, 64)}
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
    state, images = train_step.state_bytes(model, config), config.train.batch_size // 2
    estimate = state + images * counts.activation_bytes(model, 64, 64)
    assert state < peak
    assert 0.4 * estimate < peak < estimate


def test_a_figure_is_written_at_once_and_measured_once(tmp_path):
    file, count = tmp_path / "figures.json", iter(range(9))

    def measure():
        return {"seconds": next(count)}

    figures = Figures(str(file))
    assert figures.once(("networks", "a"), {"steps": (1, 2)}, measure)["seconds"] == 0
    assert json.loads(file.read_text())["networks"]["a"]["of"] == {"steps": [1, 2]}
    figures.update({"device": "one"})
    for of, again, seconds in (
        ({"steps": (1, 2)}, False, 0),
        ({"steps": (1, 2)}, True, 1),
        ({"steps": (1, 3)}, False, 2),
    ):
        figures = Figures(str(file), again)
        assert figures.once(("networks", "a"), of, measure)["seconds"] == seconds
    figures.keep(("networks", "b"), {"rounds": [1]})
    assert figures.found(("networks", "b"), {"steps": (1, 3)}) is None
    assert set(json.loads(file.read_text())) == {"networks", "device"}
    figures = Figures(
        str(file), seconds=100
    )  # a row of networks is taken to last 60, of memory 200
    assert figures.once(("memory", "a"), {}, measure) is None
    figures.keep(("networks", "a"), {"took_seconds": 101})
    assert figures.once(("networks", "c"), {}, measure) is None
    figures.keep(("networks", "a"), {"took_seconds": 9})
    assert figures.once(("networks", "c"), {}, measure)["took_seconds"] < 1
    assert figures.left == ["memory a", "networks c"]
    file.write_text("[1, 2")
    with pytest.raises(ConfigError, match="holds no figures"):
        Figures(str(file))


@pytest.mark.parametrize("first", [1, 16, 400])
def test_the_largest_batch_takes_few_programs(first):
    def size(images):  # the rest of a slab makes it no line
        return 600 + 37 * images + 5 * (images % 7)

    tried = {first: size(first)}
    while images := memory.next_batch(tried, 10_000):
        assert images not in tried
        tried[images] = size(images)
    most = max(n for n in tried if tried[n] <= 10_000)
    exact = max(n for n in range(500) if size(n) <= 10_000)
    assert exact - max(1, memory.WITHIN * exact) <= most <= exact
    assert len(tried) <= 6
    assert memory.next_batch({1: 11, 2: 20}, 10) is None


def test_memory_goes_on_with_the_programs_that_are_known(monkeypatch):
    compiled, kept = [], []

    class Work:
        def __init__(self, config, ceilings):
            self.images = config.train.batch_size

        def step(self):
            compiled.append(self.images)
            return SimpleNamespace(peak_bytes=100 + 10 * self.images)

    monkeypatch.setattr(memory.model, "Work", Work)
    monkeypatch.setattr(memory.model, "timed_step", lambda work, *_: {"seconds": work.images})
    devices = jax.device_count()
    config = runs.tiny_config("data", train__accumulate=2, train__batch_size=4 * devices)
    row = memory.largest(config, {}, 100 + 300 * devices, {}, kept.append)
    assert row["images_per_device"] == row["seconds"] // devices == 30
    assert kept[-1]["tried"] == row["tried"]
    known = {int(images): size for images, size in row["tried"].items()}
    done = len(compiled)
    assert memory.largest(config, {}, 100 + 300 * devices, known, kept.append) == row
    assert compiled[done:] == [30 * devices]  # for the clock


def test_calls_in_one_program_are_all_made():
    """None is moved out of the loop or left out: FLOPs grow with the calls, values are the same."""
    operands = tuple(jnp.asarray(a) for a in layers.arrays((4, 8, 9, 2), 2))
    for name, function in layers.functions(2).items():
        fed = 2 if name == "input gradient" else 0
        flops = []
        for calls in (2, 6):
            program = jax.jit(layers.repeated(function, calls, fed)).lower(*operands).compile()
            flops.append(programs.cost(program)[0])
            expected = function(*operands)
            np.testing.assert_allclose(program(*operands), expected, rtol=1e-4, atol=1e-3)
        assert 2.5 < flops[1] / flops[0] < 3.5, name


def test_layers_are_in_the_json_one_by_one(tmp_path, monkeypatch):
    with_torch = importlib.util.find_spec("torch") is not None
    monkeypatch.setattr(layers, "SHAPES", [(4, 8, 9, 2)])
    config = runs.tiny_config("data")
    args = SimpleNamespace(config=config, steps=1, peer="torch" if with_torch else "")
    file = tmp_path / "layers.json"
    benchmark.measure_layers(args, Figures(str(file)))
    values = json.loads(file.read_text())
    assert list(values["layers"]) == ["4 -> 8, 9x9, 2"]
    for row in values["layers"].values():
        assert row["error"] < 1e-4
        assert min(row["forward"], row["weight gradient, columns"]) > 0
    assert len(values["losses"]) == 14
    if with_torch:
        assert list(values["layers_torch"]) == list(values["layers"])
        assert all(row["weight gradient"] > 0 for row in values["layers_torch"].values())
    benchmark.measure_layers(args, Figures(str(file)))
    assert json.loads(file.read_text()) == values


def test_rows_of_fed_are_named_by_what_reads(tmp_path, monkeypatch, capsys):
    rates = {"records": 1.0, "one_batch": 2.0}
    row = {"device": "one", "devices": 1, "images_per_second": rates, "ratio": 0.5, "cpu_ratio": 1}
    monkeypatch.setattr(benchmark.model, "fed", lambda *_: row)
    file = tmp_path / "fed.json"
    for changes in ({"data__threads": 8}, {"data__workers": 4}, {"data__on_device": True}):
        args = SimpleNamespace(config=runs.tiny_config("data", **changes), steps=1)
        benchmark.measure_fed(args, Figures(str(file)))
    assert list(json.loads(file.read_text())["fed"]) == ["threads=8", "workers=4", "on_device"]
    assert "on_device: fed by records 1.0 images/s, by one batch 2.0" in capsys.readouterr().out


def test_bundles_are_in_the_json_after_each_process(tmp_path, monkeypatch):
    file, held = tmp_path / "bundles.json", []

    def apart(*_):
        held.append(json.loads(file.read_text())["seconds"] if file.exists() else {})
        return [0.1, 0.2]

    monkeypatch.setattr(bundles, "apart", apart)
    args = SimpleNamespace(rounds=2, model="", threads=1, calls=2)
    bundles.measure(args, (32, 64), ["stablehlo", "onnx"], Figures(str(file)))
    assert held[1] == {"32x64": {"stablehlo": [0.1, 0.2], "onnx": []}}
    assert len(json.loads(file.read_text())["seconds"]["32x64"]["onnx"]) == 4


def test_warm_up_does_not_count():
    pauses = iter([0.2] * timing.WARM_UP + [0.0, 0.01, 0.2])
    assert 0.01 <= timing.median_seconds(lambda: time.sleep(next(pauses)), 3) < 0.2


def test_evaluation_holds_neither_logits_nor_probabilities_of_a_whole_image(tmp_path):
    """1024x2048 pixels of 150 classes: in float32 either would be 1.26 GB."""
    file = tmp_path / "figures.json"
    small = runs.TINY | {"data.name": "ade20k", "model.context": "none"}
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
