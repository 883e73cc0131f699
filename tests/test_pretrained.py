"""Backbone weights from files: names, formats, sources, refusals, and the real ImageNet ones."""

import functools
import logging
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duc_dlc_jax import config as default_config
from duc_dlc_jax.models import layers, tensor_files
from duc_dlc_jax.models.resnet import ResNet
from weight_files import check, file_tensors, load, model_config, shapes, write


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors", "w.pth", "old.pth"])
def test_every_format_loads_the_same(tmp_path, name):
    tensors, c = file_tensors(), model_config()
    params, batch_stats, report = load(write(tmp_path / name, tensors), c)
    check(params, batch_stats, tensors)
    before = shapes(c)
    assert jax.tree.structure((params, batch_stats)) == jax.tree.structure(before)
    assert params["duc"] == before[0]["duc"]
    assert len(report.loaded) == len(
        jax.tree.leaves((before[0]["backbone"], before[1]["backbone"]))
    )
    assert report.missing == report.unexpected == ()
    assert {"fc.weight", "fc.bias", "bn1.num_batches_tracked"} <= set(report.unused)
    np.testing.assert_array_equal(report.fc[0], tensors["fc.weight"].T)


def test_deep_stem(tmp_path):
    tensors, c = file_tensors(deep=True), model_config(stem="deep")
    params, batch_stats, _ = load(write(tmp_path / "w.npz", tensors), c, "pytorch_encoding")
    check(params, batch_stats, tensors, deep=True)
    np.testing.assert_array_equal(
        batch_stats["backbone"]["stem_bn2"]["mean"], tensors["conv1.4.running_mean"]
    )


def test_half_precision_becomes_float32(tmp_path):
    tensors = file_tensors()
    tensors["conv1.weight"] = tensors["conv1.weight"].astype(np.float16)
    check(*load(write(tmp_path / "w.npz", tensors), model_config())[:2], tensors)


def test_prefixes_and_other_heads(tmp_path):
    """FastFCN's `module.pretrained.*`, with a head of its own in the same file."""
    tensors = {f"module.pretrained.{name}": value for name, value in file_tensors().items()}
    tensors["module.head.conv.weight"] = np.zeros(3, np.float32)
    params, batch_stats, report = load(write(tmp_path / "w.npz", tensors), model_config())
    check(params, batch_stats, file_tensors())
    assert report.unexpected == ("module.head.conv.weight",)
    assert "module.pretrained." in report.path
    assert any("unexpected: 1" in line and "module.head" in line for line in report.lines())


def test_bgr_pixels_are_folded_into_the_first_convolution(tmp_path):
    """detectron_caffe reads BGR, x - mean in 0..255: its first features come from our input."""
    tensors, c = file_tensors(), model_config(stride_on="1x1")
    params, _, _ = load(write(tmp_path / "w.npz", tensors), c, "detectron_caffe")
    image = np.random.default_rng(0).integers(0, 256, (1, 7, 7, 3), np.uint8)
    ours = np.asarray(layers.normalize(image, jnp.float32), np.float64)
    theirs = (image - 255 * np.array(layers.IMAGE_MEAN))[..., ::-1]
    kernel = tensors["conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_allclose(
        np.einsum("bhwc,hwco->bo", ours, params["backbone"]["conv1"]["kernel"]),
        np.einsum("bhwc,hwco->bo", theirs, kernel),
        rtol=1e-4,
    )


def test_empty_source_is_assumed_aloud(tmp_path, caplog):
    path = write(tmp_path / "w.npz", file_tensors())
    with caplog.at_level(logging.WARNING, "absl"):
        *_, report = load(path, model_config(), "")
    assert report.source == "torchvision"
    assert "config.init.source is empty" in caplog.text
    assert "torchvision" in caplog.text


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("torchvison", {}, r"Did you mean config\.init\.source=torchvision\?"),
        ("keras_v1", {}, r"config\.model\.stride_on is '3x3', must be '1x1'"),
        ("torchvision", {"stride_on": "1x1"}, r"--config\.model\.stride_on=3x3"),
        ("torchvision", {"stem": "deep"}, r"--config\.model\.stem=plain"),
        ("torchvision", {"bn_epsilon": 1e-3}, r"--config\.model\.bn_epsilon=1e-05"),
        ("torchvision", {"depth": 26}, r"Set --config\.model\.depth=14"),
        (
            "torchvision",
            {"width": 8},
            r"tensor conv1\.weight has shape \(4, 3, 7, 7\).*\(8, 3, 7, 7\)",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path, source, changes, message):
    path = write(tmp_path / "w.npz", file_tensors())
    with pytest.raises(ValueError, match=message):
        load(path, model_config(**changes), source)


@pytest.mark.parametrize(
    "name", ["layer2.0.conv2.weight", "layer1.0.bn1.running_var", "bn1.weight"]
)
def test_a_missing_tensor_is_refused_by_name(tmp_path, name):
    tensors = file_tensors()
    del tensors[name]
    with pytest.raises(ValueError, match=rf"1 backbone tensors are missing: {name}\."):
        load(write(tmp_path / "w.npz", tensors), model_config())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer2.0.conv2.weight", np.nan, "not finite"),
        ("bn1.running_mean", np.inf, "not finite"),
        ("layer4.0.bn3.running_var", -1e-3, "negative"),
    ],
)
def test_values_that_no_network_has_are_refused(tmp_path, name, value, message):
    tensors = file_tensors()
    tensors[name].flat[-1] = value
    with pytest.raises(ValueError, match=rf"w\.npz: tensor {name} has .*{message}"):
        load(write(tmp_path / "w.npz", tensors), model_config())


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.init\.weights=.*no such file"):
        load(tmp_path / "none.npz", model_config())
    (tmp_path / "weights.h5").touch()
    with pytest.raises(ValueError, match=r"takes \.npz, \.safetensors, \.pth"):
        load(tmp_path / "weights.h5", model_config())
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"text{suffix}"
        path.write_text("not weights at all, only a line of text")
        with pytest.raises(ValueError, match="not a readable"):
            load(path, model_config())
    objects = tmp_path / "objects.npz"
    np.savez(objects, a=np.array([{}], object))
    with pytest.raises(ValueError, match="not a readable"):
        tensor_files.read_tensors(objects)


# The real weights


@pytest.fixture(scope="module")
def classify():
    """PNG path -> 1000 probabilities: backbone, global average pool, the file's fc, softmax."""
    root = os.environ.get("DUC_DLC_SHARED_DATA")
    if not root:
        pytest.skip("set DUC_DLC_SHARED_DATA to the folder that holds resnet50_imagenet.npz")
    image_module = pytest.importorskip("PIL.Image")
    root = pathlib.Path(root)
    c = default_config.default().model
    c.stride_on = "1x1"
    params, batch_stats, report = load(root / "resnet50_imagenet.npz", c, "keras_v1")
    assert len(report.loaded) == 265
    assert report.unused == ("fc.weight", "fc.bias")
    norm = functools.partial(layers.BatchNorm, use_running_average=True)
    network = ResNet(50, 64, "plain", "1x1", 32, conv=layers.Conv, norm=norm)
    variables = {"params": params["backbone"], "batch_stats": batch_stats["backbone"]}
    weight, bias = report.fc

    def probabilities(name):
        """Short side 256 with Pillow's (antialiased) bilinear filter, centre crop 224."""
        image = image_module.open(root / "photos" / name).convert("RGB")
        scale = 256 / min(image.size)
        size = [round(n * scale) for n in image.size]
        pixels = np.asarray(image.resize(size, image_module.Resampling.BILINEAR))
        top, left = ((n - 224) // 2 for n in pixels.shape[:2])
        crop = layers.normalize(pixels[None, top : top + 224, left : left + 224], jnp.float32)
        features = network.apply(variables, crop)[-1].mean((1, 2))
        return jax.nn.softmax(features @ weight + bias[None])[0]

    return probabilities


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("photo", "label", "probability"), [("chelsea.png", 285, 0.754), ("coffee.png", 967, 0.993)]
)
def test_imagenet_weights_classify_the_photos(classify, photo, label, probability):
    result = classify(photo)
    assert int(result.argmax()) == label
    assert float(result[label]) == pytest.approx(probability, abs=1e-3)
