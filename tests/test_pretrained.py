"""Backbone weights from files: names, formats, sources, refusals, and the real ImageNet ones."""

import functools
import logging
import os
import pathlib
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from duc_dlc_jax import config as default_config
from duc_dlc_jax.models import layers, pretrained, segmenter, tensor_files
from duc_dlc_jax.models.resnet import ResNet
from networks import NARROW


def model_config(**changes):
    c = default_config.default().model
    c.update(NARROW | changes)
    return c


def shapes(c):
    """(params, batch_stats) of the network as shapes, without running it."""
    model = segmenter.create(c, 3)
    image = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return variables["params"], variables["batch_stats"]


def file_tensors(width=4, deep=False, seed=0):
    """A depth-14 backbone under torchvision's or PyTorch-Encoding's names, with fc and counters."""
    random = np.random.default_rng(seed)
    tensors = {}

    def conv(name, outputs, inputs, kernel):
        shape = (outputs, inputs, kernel, kernel)
        tensors[f"{name}.weight"] = random.normal(size=shape).astype(np.float32)

    def bn(name, channels):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{name}.{leaf}"] = random.random(channels).astype(np.float32)
        tensors[f"{name}.num_batches_tracked"] = np.asarray(7)

    inputs = 2 * width if deep else width
    if deep:
        conv("conv1.0", width, 3, 3)
        bn("conv1.1", width)
        conv("conv1.3", width, width, 3)
        bn("conv1.4", width)
        conv("conv1.6", inputs, width, 3)
    else:
        conv("conv1", width, 3, 7)
    bn("bn1", inputs)
    for stage in range(4):
        block, planes = f"layer{stage + 1}.0", width * 2**stage
        sizes = ((planes, inputs, 1), (planes, planes, 3), (4 * planes, planes, 1))
        for number, size in enumerate(sizes, 1):
            conv(f"{block}.conv{number}", *size)
            bn(f"{block}.bn{number}", size[0])
        conv(f"{block}.downsample.0", 4 * planes, inputs, 1)
        bn(f"{block}.downsample.1", 4 * planes)
        inputs = 4 * planes
    tensors["fc.weight"] = random.normal(size=(10, inputs)).astype(np.float32)
    tensors["fc.bias"] = random.normal(size=10).astype(np.float32)
    return tensors


def write(path, tensors):
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(tensors, path)
    else:
        torch = pytest.importorskip("torch", reason="writing a .pth needs torch; reading does not")
        torch.save(
            {name: torch.from_numpy(value) for name, value in tensors.items()},
            path,
            _use_new_zipfile_serialization=path.name != "old.pth",
        )
    return path


def load(path, c, source="torchvision"):
    return pretrained.load_backbone(path, source, *shapes(c), c)


def check(params, batch_stats, tensors, deep=False):
    backbone = params["backbone"]
    first = tensors["conv1.6.weight" if deep else "conv1.weight"]
    np.testing.assert_array_equal(backbone["conv1"]["kernel"], first.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(
        backbone["layer3_0"]["conv2"]["kernel"],
        tensors["layer3.0.conv2.weight"].transpose(2, 3, 1, 0),
    )
    np.testing.assert_array_equal(
        backbone["layer2_0"]["downsample_bn"]["scale"], tensors["layer2.0.downsample.1.weight"]
    )
    np.testing.assert_array_equal(
        batch_stats["backbone"]["layer4_0"]["bn3"]["var"], tensors["layer4.0.bn3.running_var"]
    )
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(backbone))


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


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.init\.weights=.*no such file"):
        load(tmp_path / "none.npz", model_config())
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


# .pth


def write_pickle(path, content: bytes, storages=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", content)
        for key, data in storages:
            archive.writestr(f"w/data/{key}", data)
    return path


class _Call:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


HOSTILE = pytest.mark.parametrize("function", [os.system, eval, getattr, pathlib.Path, np.zeros])


@HOSTILE
def test_hostile_pickle_runs_nothing(tmp_path, function, capfd):
    path = write_pickle(tmp_path / "w.pth", pickle.dumps({"a": _Call(function, "echo run")}))
    with pytest.raises(ValueError, match="nothing of it was run"):
        tensor_files.read_tensors(path)
    assert capfd.readouterr().out == ""


def stream(*, system=None, content=b"", keys=(), storages=b"", magic=tensor_files.MAGIC):
    """A file as torch.save wrote it before PyTorch 1.6."""
    system = {"little_endian": True} if system is None else system
    pickles = [pickle.dumps(part, 2) for part in (magic, 1001, system)]
    return b"".join([*pickles, content, pickle.dumps(list(keys), 2), storages])


@HOSTILE
@pytest.mark.parametrize("place", ["magic", "system", "content", "keys"])
def test_hostile_pickles_before_the_zip_format_run_nothing(tmp_path, function, place, capfd):
    call = _Call(function, "echo run")
    content = pickle.dumps({"a": call} if place == "content" else {}, 2)
    parts = {"magic": call} if place == "magic" else {"system": call} if place == "system" else {}
    path = tmp_path / "w.pth"
    path.write_bytes(stream(content=content, keys=[call] if place == "keys" else [], **parts))
    with pytest.raises(ValueError, match="nothing of it was run"):
        tensor_files.read_tensors(path)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("count", "offset", "size", "stride", "given", "message"),
    [
        (6, 1, (2, 2), (3, 1), 6, None),
        (6, 3, (2, 2), (3, 1), 6, "beyond its storage"),
        (10**12, 0, (2,), (1,), 6, "larger than the file"),
        (6, 0, (2,), (1,), 5, "has 24 of 24 bytes|has 20 of 24 bytes"),
    ],
)
def test_tensors_before_the_zip_format(tmp_path, count, offset, size, stride, given, message):
    for little in (True, False):
        data = np.arange(given, dtype="<f4" if little else ">f4").tobytes()
        storages = given.to_bytes(8, "little" if little else "big") + data
        content = _pickled_tensor("FloatStorage", "0", count, offset, size, stride)
        system = {"little_endian": little}
        path = tmp_path / "w.pth"
        path.write_bytes(stream(system=system, content=content, keys=["0"], storages=storages))
        if message:
            with pytest.raises(ValueError, match=message):
                tensor_files.read_tensors(path)
        else:
            np.testing.assert_array_equal(tensor_files.read_tensors(path)["a"], [[1, 2], [4, 5]])


def test_a_truncated_pth_is_refused(tmp_path):
    for name in ("w.pth", "old.pth"):
        path = write(tmp_path / name, file_tensors())
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match="not a state dict"):
            tensor_files.read_tensors(path)


def _pickled_tensor(storage: str, key: str, count: int, offset: int, size, stride) -> bytes:
    """A protocol-2 pickle of {"a": tensor}, as torch.save writes it, from any numbers."""

    def text(value):
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def number(value):
        return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    record = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu")
    record += number(count) + b"tQ"
    args = record + number(offset) + numbers(size) + numbers(stride) + b"\x89" + b"N" + b"t"
    return b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + args + b"Rs."


@pytest.mark.parametrize(
    ("count", "offset", "size", "stride", "message"),
    [
        (6, 1, (2, 2), (3, 1), None),
        (6, 3, (2, 2), (3, 1), "beyond its storage"),
        (6, 0, (10**9, 10**6), (0, 0), "exceeds its storage"),
        (6, -1, (2,), (1,), "beyond its storage"),
        (6, 5, (2,), (-1,), "beyond its storage"),
        (9, 0, (2,), (1,), "has 24 bytes, 9 x float32 need 36"),
    ],
)
def test_pth_views_stay_within_their_storage(tmp_path, count, offset, size, stride, message):
    data = np.arange(6, dtype="<f4")
    content = _pickled_tensor("FloatStorage", "0", count, offset, size, stride)
    path = write_pickle(tmp_path / "w.pth", content, [("0", data.tobytes())])
    if message:
        with pytest.raises(ValueError, match=message):
            tensor_files.read_tensors(path)
    else:
        np.testing.assert_array_equal(tensor_files.read_tensors(path)["a"], [[1, 2], [4, 5]])


def test_big_endian_pth(tmp_path):
    content = _pickled_tensor("FloatStorage", "0", 3, 0, (3,), (1,))
    path = write_pickle(tmp_path / "w.pth", content, [("0", np.arange(3, dtype=">f4").tobytes())])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("w/byteorder", "big")
    np.testing.assert_array_equal(tensor_files.read_tensors(path)["a"], [0, 1, 2])


def test_pth_of_every_dtype_views_and_wrappers(tmp_path):
    torch = pytest.importorskip("torch", reason="writing a .pth needs torch; reading does not")
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "half": whole.half(),
        "bfloat": whole.bfloat16(),
        "double": whole.double(),
        "long": torch.tensor(3),
        "bool": whole > 3,
        "view": whole[1:3, ::2].T,
        "parameter": torch.nn.Parameter(whole),
        "empty": torch.zeros(0, 3),
    }
    path = tmp_path / "w.pth"
    torch.save({"epoch": 3, "state_dict": state}, path)
    read = tensor_files.read_tensors(path)
    assert set(read) == set(state)
    for name, value in state.items():
        expected = value.detach()
        if name == "bfloat":
            expected = expected.float()
        np.testing.assert_array_equal(read[name].astype(expected.numpy().dtype), expected.numpy())
    module = torch.nn.Conv2d(3, 4, 1)
    torch.save(module.state_dict(), path)  # an OrderedDict with _metadata
    assert set(tensor_files.read_tensors(path)) == {"weight", "bias"}
    torch.save(module, path)  # a pickled module needs its class
    with pytest.raises(ValueError, match="Conv2d, which is not a tensor"):
        tensor_files.read_tensors(path)


def test_legacy_pth_says_how_to_convert(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(ValueError, match=r"torch\.save\(torch\.load\("):
        tensor_files.read_tensors(path)


# the real weights


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
