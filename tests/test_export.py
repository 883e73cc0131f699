"""Networks that leave: folded exactly, the same in both formats, checked before written."""

from __future__ import annotations

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import evaluate, protocols, workdirs
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.builders import scenes
from duc_dlc_jax.data.labels import DataError, label_spec
from duc_dlc_jax.export import __main__ as command
from duc_dlc_jax.export import bundle as bundles
from duc_dlc_jax.export import folding, gate, manifest, onnx_graph, runtimes, stablehlo
from duc_dlc_jax.models import layers, segmenter
from networks import NARROW, images_of, jit, random_variables
from runs import untrained_workdir

NETWORKS = {  # fields of config.model beside NARROW
    "as published": {},
    "stride grid, 1/8, deep stem": {
        "resize_grid": "stride",
        "output_stride": 8,
        "stem": "deep",
        "guidance_kernel": 5,
        "guidance_stride": 2,
    },
    "1/16, not commuted, auxiliary head": {
        "output_stride": 16,
        "commute_coefficients": False,
        "aux_head": True,
        "stride_on": "1x1",
    },
    "stride grid, coefficients upsampled": {
        "resize_grid": "stride",
        "duc_upsampled": "coefficients",
    },
    "half-pixel grid, output upsampled": {"resize_grid": "half_pixel", "duc_upsampled": "output"},
    "pixel shuffle, ASPP": {
        "upsampling": "pixel_shuffle",
        "context": "aspp",
        "context_width": 8,
    },
}
SMALL, ODD = (64, 96), (61, 45)


@functools.cache
def network(name="as published", dtype="float32"):
    with jax.enable_x64(dtype == "float64"):
        c = config_lib.default()
        c.model.update(NARROW | {"dtype": dtype} | NETWORKS[name])
        model = segmenter.create(c.model, 11)
        return model, random_variables(model)


@functools.cache
def example(name, size):
    """Two images, and the network's logits in float64."""
    image = np.stack(images_of(size, size))
    with jax.enable_x64(True):
        model, variables = network(name, "float64")
        return image, np.asarray(jit(model.apply)(variables, image))


def relative(ours, expected):
    return np.abs(np.asarray(ours, np.float64) - expected).max() / np.abs(expected).max()


def run_onnx(content: bytes, image):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})[0]


# The function


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_changes_no_function(name):
    image, expected = example(name, ODD)
    with jax.enable_x64(True):
        folded = folding.FoldedNetwork(*network(name, "float64"), np.float64)
        assert 0 < relative(jit(folded.logits)(image), expected) < 1e-10
    assert not any("aux" in path for path in folded.convolutions)


def test_a_bn_after_something_else_stays():
    class Module(layers.nn.Module):
        @layers.nn.compact
        def __call__(self, image):
            x = layers.Conv(4, name="conv")(layers.normalize(image, jnp.float32))
            x = layers.BatchNorm(use_running_average=True, name="after")(x)
            return layers.BatchNorm(use_running_average=True, name="late")(layers.nn.relu(x))

    model = Module()
    variables = random_variables(model)
    convolutions, included = folding.fold(model, variables)
    assert (list(convolutions), included) == (["conv"], {"after"})


@pytest.mark.parametrize(("name", "size"), [*((n, ODD) for n in NETWORKS), ("as published", SMALL)])
def test_onnx_of_any_size_says_what_the_network_says(name, size):
    image, expected = example(name, size)
    folded = folding.FoldedNetwork(*network(name, "float64"))
    ours = run_onnx(onnx_graph.build(folded, None, np.uint8, "logits"), image)
    assert relative(ours, expected) < 5e-6
    ids = run_onnx(onnx_graph.build(folded, None, np.uint8, "ids"), image)
    assert ids.dtype == np.uint8
    assert (ids == expected.argmax(-1)).mean() > 0.9999


def test_onnx_of_one_size():
    image, expected = example("stride grid, coefficients upsampled", ODD)
    folded = folding.FoldedNetwork(*network("stride grid, coefficients upsampled", "float64"))
    ours = run_onnx(onnx_graph.build(folded, ODD, np.uint8, "logits"), image)
    assert relative(ours, expected) < 5e-6


def test_normalised_input():
    image, expected = example("as published", ODD)
    folded = folding.FoldedNetwork(*network(dtype="float64"))
    floats = np.asarray(layers.normalize(jnp.asarray(image), jnp.float32))
    ours = run_onnx(onnx_graph.build(folded, None, np.float32, "logits"), floats)
    assert relative(ours, expected) < 5e-6


def test_onnx_has_native_operators_alone():
    onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
    folded = folding.FoldedNetwork(*network())
    content = onnx_graph.build(folded, ODD, np.uint8, "ids")
    graph = onnx.load_from_string(content).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("Conv") == len(folded.convolutions)
    assert operators.count("MaxPool") == 1
    assert operators.count("Resize") == 3  # G~, the low half of the coefficients, the logits
    assert not {"BatchNormalization", "MatMul", "Gemm", "Gather"} & set(operators)
    used = {name for node in graph.node for name in node.input}
    assert used >= {tensor.name for tensor in graph.initializer}


def test_what_onnx_lacks_is_refused_by_name():
    pytest.importorskip("onnx", reason="the export extra is not installed")
    c = config_lib.default()
    c.model.update(NARROW | {"context": "psp", "context_width": 8})
    model = segmenter.create(c.model, 11)
    folded = folding.FoldedNetwork(model, random_variables(model))
    message = r"operator 'dot_general' in Segmenter/psp.*--format=stablehlo"
    with pytest.raises(ConfigError, match=message):
        onnx_graph.build(folded, ODD, np.uint8, "logits")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("as published", SMALL),
        ("stride grid, 1/8, deep stem", ODD),
        ("half-pixel grid, output upsampled", ODD),
    ],
)
def test_stablehlo_of_any_size_says_what_the_network_says(name, size):
    image, expected = example(name, size)
    content = stablehlo.build(
        folding.FoldedNetwork(*network(name, "float64")), None, np.uint8, "logits"
    )
    exported = jax_export.deserialize(bytearray(content))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert relative(jit(exported.call)(image), expected) < 5e-6


def test_stablehlo_finds_ids_alike_on_every_platform():
    """What a CPU runs, and what GPUs and TPUs run: both here."""
    name = "half-pixel grid, output upsampled"
    image, expected = example(name, ODD)
    folded = folding.FoldedNetwork(*network(name))
    logits = jit(functools.partial(folded.logits, coarse=True))(image)
    for way in (stablehlo.by_class, stablehlo.at_once):
        ids = jit(functools.partial(way, folded.model, ODD))(logits)
        assert ids.dtype == np.uint8
        assert (ids == expected.argmax(-1)).mean() > 0.9999


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("float16", 1e-5, 5e-3), ("bfloat16", 1e-4, 3e-2)]
)
def test_narrow_dtypes_lose_what_the_gate_allows(dtype, least, most):
    image, expected = example("as published", ODD)
    folded = folding.FoldedNetwork(*network(dtype="float64"), jnp.dtype(dtype))
    outputs = [jit(folded.logits)(image)]
    if dtype == "float16":
        outputs.append(run_onnx(onnx_graph.build(folded, None, np.uint8, "logits"), image))
    for output in outputs:
        assert least < relative(output, expected) < most < gate.TOLERANCE[dtype]


@pytest.mark.export
@pytest.mark.parametrize("context", config_lib.CHOICES["model.context"])
@pytest.mark.parametrize("upsampling", config_lib.CHOICES["model.upsampling"])
def test_every_network_in_every_format(upsampling, context):
    """Any size, and one size, of each module beside the published one."""
    if upsampling != "duc" and context != "dlc":
        pytest.skip("modules are independent: each is tried once")
    fields = {"upsampling": upsampling, "context": context}
    c = config_lib.default()
    c.model.update(NARROW | fields | {"context_width": 8, "dupsampling_width": 8})
    model = segmenter.create(c.model, 11)
    variables, image = random_variables(model), np.stack(images_of(ODD, ODD))
    expected = gate.reference(model, variables, image)
    folded = folding.FoldedNetwork(model, variables)
    for size, kind in ((None, "logits"), (ODD, "ids")):  # ids are found in a way of their own
        content = stablehlo.build(folded, size, np.uint8, kind)
        output = jit(jax_export.deserialize(bytearray(content)).call)(image)
        if kind == "logits":
            assert relative(output, expected) < 5e-6
        else:
            assert (output == expected.argmax(-1)).mean() > 0.9999
        if context == "psp" or upsampling == "guided_filter":
            with pytest.raises(ConfigError, match=f"in Segmenter/({context}|{upsampling})"):
                onnx_graph.build(folded, size, np.uint8, "logits")
        else:
            ours = run_onnx(onnx_graph.build(folded, size, np.uint8, "logits"), image)
            assert relative(ours, expected) < 5e-6


# The gate


def test_expectations_tell_ties_from_faults():
    logits = np.zeros((1, 2, 3, 2), np.float32)
    logits[..., 0], logits[0, 0, 0, 1] = 1.0, 0.999
    expected = gate.Expected.of(logits, 1e-2)
    swapped = logits.argmax(-1).astype(np.uint8)
    swapped[0, 0, 0] = 1
    assert gate.passes(expected.compare(swapped), 1e-2)  # within the tolerance, a tie
    swapped[0, 1, 1] = 1
    assert not gate.passes(expected.compare(swapped), 1e-2)
    assert gate.passes(expected.compare(logits + 0.009), 1e-2)
    assert not gate.passes(expected.compare(logits + 0.011), 1e-2)
    assert not gate.passes(expected.compare(logits * np.nan), 1e-2)
    for broken in (np.nan, np.inf):
        with pytest.raises(gate.GateError, match="the trained network's own logits are not finite"):
            gate.Expected.of(np.where(logits > 0, broken, 0), 1e-2)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = untrained_workdir(tmp_path_factory.mktemp("run"), NARROW)
    line = {"step": 0, "val/mIoU": 0.25, "val_iou/pole": None}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 3, "tr')  # cut off
    return folder


@pytest.fixture(scope="module")
def small_sizes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "SIZES", (SMALL, ODD))
        yield


@pytest.fixture(scope="module")
def bundle(workdir, small_sizes, tmp_path_factory):
    """The default bundle, written by the command's own function; its gate ran."""
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    path = tmp_path_factory.mktemp("bundles") / "scenes"
    command.export(workdirs.load(workdir), path, manifest.Options())
    return path


def test_a_bundle_says_what_it_is(bundle, workdir):
    read = bundles.read(bundle)
    assert sorted(p.name for p in bundle.iterdir()) == sorted(
        ["SHA256SUMS", "bundle.json", "check.npz", "model.onnx", "model.stablehlo"]
    )
    assert read.spec == label_spec("scenes")
    assert read.manifest["evaluation"]["val/mIoU"] == 0.25
    assert read.manifest["evaluation"]["protocol"].startswith("single scale, whole image")
    assert read.manifest["weights"] == {
        "file": None,
        "origin": "trained from scratch",
        "licence": "the trainer's",
    }
    for form in ("stablehlo", "onnx"):
        figures = read.manifest["gate"][form]
        assert [(one["height"], one["width"]) for one in figures] == [SMALL, ODD]
        assert all(one["wrong"] == 0 and one["agreement"] > 0.999 for one in figures)
    assert read.manifest["gate"]["stablehlo_platform"] == jax.default_backend()
    assert str(workdir) not in (bundle / "bundle.json").read_text()
    figures = gate.verify(bundle)
    assert {one["wrong"] for listed in figures.values() for one in listed} == {0}
    image = np.stack(images_of(SMALL))
    ids = [runtimes.load(read, form)(image) for form in read.formats]
    assert (ids[0] == ids[1]).mean() > 0.999


@pytest.mark.parametrize(
    ("weights", "source", "licence", "origin"),
    [
        ("deeplabv3_resnet50", "torchvision", "BSD-3-Clause", "trained on COCO"),
        (
            "some/where/backbone.npz",
            "keras_v1",
            "MIT if the file is theirs: not verified",
            "Keras ResNet v1",
        ),
        ("some/where/backbone.npz", "", "unknown", "the file backbone.npz, of unknown origin"),
    ],
)
def test_the_licence_of_the_first_weights_goes_along(weights, source, licence, origin):
    c = config_lib.default()
    c.init.update({"weights": weights, "source": source})
    said = manifest._weights(c)
    assert said["licence"] == licence
    assert origin in said["origin"]
    assert "/" not in said["file"]


def test_the_licence_goes_along_through_runs(tmp_path, monkeypatch):
    """Also from a home folder, and not for ever round a circle."""
    monkeypatch.setenv("HOME", str(tmp_path))
    first, second = config_lib.default(), config_lib.default()
    first.init.weights, second.init.checkpoint = "resnet50", "~/first"

    def said(config):
        (tmp_path / "first").mkdir(exist_ok=True)
        (tmp_path / "first" / "config.json").write_text(config_lib.to_json(config))
        return manifest._weights(second)

    assert (said(first)["licence"], said(first)["through"]) == ("BSD-3-Clause", "first")
    assert said(second)["origin"] == "the run first, which starts from itself"
    second.init.checkpoint = "~/gone"
    assert said(first)["origin"] == "the run gone, which cannot be read"


def test_one_flipped_bit_is_noticed(bundle, tmp_path):
    for file in sorted(bundle.iterdir()):
        copy = tmp_path / file.stem
        shutil.copytree(bundle, copy)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        (copy / file.name).write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            gate.verify(copy)
        shutil.rmtree(copy)
    copy = tmp_path / "more"
    shutil.copytree(bundle, copy)
    (copy / "model.onnx").unlink()
    (copy / "other").touch()
    with pytest.raises(DataError, match=r"(?s)other: not in SHA256SUMS.*model.onnx: missing"):
        gate.verify(copy)


@pytest.fixture(scope="module")
def normalised(workdir, tmp_path_factory):
    """A bundle of float32 images and logits, in ONNX, whose gate did not run."""
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    path, run = tmp_path_factory.mktemp("normalised") / "bundle", workdirs.load(workdir)
    options = manifest.Options(("onnx",), input="float32", output_kind="logits")
    network = folding.FoldedNetwork(run.model, run.variables)
    command._write_models(path, run, network, options)
    batches = gate.pairs(images_of(SMALL), SMALL)
    expected = [gate.Expected.of(gate.reference(run.model, run.variables, batches[0]), 1e-4)]
    gate.write_check(path, batches, expected)
    content = bundles.read(path).manifest
    content["gate"]["tolerance"] = 1e-4
    bundles.write(path, content)
    return path


@pytest.fixture
def changed(normalised, tmp_path):
    """Writes a copy of `normalised` with another part of its manifest, and valid checksums."""

    def change(part, **values):
        path = tmp_path / "bundle"
        shutil.copytree(normalised, path)
        content = bundles.read(path).manifest
        bundles.write(path, content | {part: content[part] | values})
        return path

    return change


def test_the_gate_proves_mean_and_deviation(normalised, changed):
    [figures] = gate.verify(normalised)["onnx"]
    assert figures["max_difference"] < 1e-5
    path = changed("input", mean=layers.IMAGE_STD, std=layers.IMAGE_MEAN)
    with pytest.raises(gate.GateError, match="onnx model does not answer"):
        gate.verify(path)


def test_a_model_that_does_not_run_does_not_pass(changed):
    with pytest.raises(gate.GateError, match=r"onnx does not run: .*data type"):
        gate.verify(changed("input", dtype="uint8"))


def test_the_last_check_is_of_what_was_written(workdir, small_sizes, tmp_path, monkeypatch):
    """The images in check.npz are not those that were judged: nothing is left."""
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    write = gate.write_check

    def mirrored(path, batches, expected):
        write(path, [batch[:, ::-1] for batch in batches], expected)

    monkeypatch.setattr(gate, "check", lambda *_: [])
    monkeypatch.setattr(gate, "write_check", mirrored)
    options = manifest.Options(("onnx",), output_kind="logits")
    with pytest.raises(gate.GateError, match="onnx model does not answer"):
        command.export(workdirs.load(workdir), tmp_path / "bundle", options)
    assert list(tmp_path.iterdir()) == []


def test_planted_fault_a_swapped_channel_writes_no_bundle(
    workdir, small_sizes, tmp_path, monkeypatch
):
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    fold = folding.fold

    def swapped(model, variables):
        convolutions, included = fold(model, variables)
        kernel = convolutions["dlc/d6_conv2"].kernel  # deep inside: nothing but the numbers tells
        kernel[..., [0, 1]] = kernel[..., [1, 0]]
        return convolutions, included

    monkeypatch.setattr(folding, "fold", swapped)
    with pytest.raises(gate.GateError, match="onnx model does not answer"):
        command.export(
            workdirs.load(workdir), tmp_path / "out" / "bundle", manifest.Options(("onnx",))
        )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "no bfloat16 convolution"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        manifest.Options(**options).check()


@pytest.mark.parametrize("size", ["480", "480X640", "0x640", "16x640"])
def test_sizes_that_cannot_be(size):
    with pytest.raises(ConfigError, match=f"--size={size}"):
        command._size(size)


def test_a_bundle_takes_the_sizes_that_it_says(bundle):
    read = bundles.read(bundle)
    with pytest.raises(DataError, match="sides from 32"):
        runtimes.check_size(read, (20, 64))
    fixed = dict(read.manifest, input=read.manifest["input"] | {"height": 48, "width": 64})
    with pytest.raises(DataError, match="takes 48x64 alone"):
        runtimes.check_size(bundles.Bundle(bundle, fixed), (64, 48))
    with pytest.raises(FileNotFoundError, match=r"is not a bundle: .*bundle\.json is missing"):
        bundles.read(bundle.parent)


def test_the_commands_take_bundles(bundle, tmp_path):
    """As `predict` and `evaluate` open them: same ids and counts as the workdir's network."""
    image, label = scenes.draw("val", 3)
    examples = [{"image": image, "label": label, "name": "scene"}]
    for form in ("stablehlo", "onnx"):
        run = workdirs.load_any(bundle, form=form)
        assert run.config.data.name == "scenes"
        assert run.config.model.depth == NARROW["depth"]
        evaluator = evaluate.Evaluator(run.model, run.spec)
        scores, (kept,) = evaluator.run(run.variables, examples, keep=1)
        assert evaluator.programs() == {"network": 1, "other": 0}
        np.testing.assert_array_equal(kept["prediction"], run.model(image[None])[0])
        counted = label != 255
        assert scores["matrix"].sum() == counted.sum()
        assert scores["PA"] == (kept["prediction"] == label)[counted].mean()
        assert scores["protocol"].startswith("single scale, whole image at its own size")
        with pytest.raises(ConfigError, match="--protocol=single"):
            evaluate.Evaluator(run.model, run.spec, 1, protocols.Protocol(flip=True))
    with pytest.raises(FileNotFoundError, match="not the workdir of a run"):
        workdirs.load_any(tmp_path)
    with pytest.raises(ConfigError, match="holds stablehlo, onnx, not 'tflite'"):
        workdirs.load_any(bundle, form="tflite")


def test_a_gate_that_stays_shut_ends_with_1(monkeypatch, capsys):
    def shut(argv):
        raise gate.GateError("the onnx model does not answer")

    monkeypatch.setattr(command, "main", shut)
    with pytest.raises(SystemExit) as ended:
        command.guarded([])
    assert ended.value.code == 1
    assert "does not answer" in capsys.readouterr().err


def test_existing_outputs_stay(bundle, workdir):
    with pytest.raises(ConfigError, match="exists: remove it"):
        command.export(workdirs.load(workdir), bundle, manifest.Options())
