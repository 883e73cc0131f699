"""Torchvision's DeepLabv3 as a workdir: its own logits, and a first prediction without training."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle

import jax
import numpy as np
import pytest

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import import_model, workdirs
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import label_spec
from duc_dlc_jax.export import manifest
from duc_dlc_jax.labelling import Predictor
from duc_dlc_jax.models import deeplabv3, segmenter, weights
from duc_dlc_jax.models.tensor_files import read_tensors
from networks import jit

torch = pytest.importorskip("torch", reason="the reference networks need torch")
import file_server  # noqa: E402
import references  # noqa: E402
import torch_twin as twins  # noqa: E402
from weight_files import Call, load, model_config, stream  # noqa: E402

PARAMETERS = {50: 42_004_074, 101: 60_996_202}


def read(path):
    tensors = read_tensors(path)
    layout = deeplabv3.recognised(path, tensors)
    return tensors, layout, deeplabv3.model_fields(tensors, layout)


def differences(path, network, sizes, depth):
    """Ours against the network: (largest relative difference, share of equal arg-max) of a size."""
    tensors, layout, fields = read(path)
    config = config_lib.default()
    config.model.update(fields | {"dtype": "float64", "dropout": 0.0})
    assert config.model.depth == depth
    with jax.enable_x64(True):
        model = segmenter.create(config.model, deeplabv3.num_classes(tensors, layout))
        shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.uint8))
        like = {kind: shapes[kind] for kind in ("params", "batch_stats")}
        variables = deeplabv3.load(path, tensors, layout, like)
        for number, size in enumerate(sizes):
            image = np.random.default_rng(number).integers(0, 256, (1, *size, 3), np.uint8)
            ours = np.asarray(jit(model.apply)(variables, image))
            with torch.no_grad():
                expected = network(twins.normalized(image))["out"].permute(0, 2, 3, 1).numpy()
            assert ours.dtype == np.float64
            error = np.abs(ours - expected).max() / np.abs(expected).max()
            yield error, (ours.argmax(-1) == expected.argmax(-1)).mean()


@pytest.mark.parity
@pytest.mark.parametrize("depth", [50, 101])
def test_logits_equal_torchvisions(tmp_path, depth):
    """The whole network at two sizes, float64, relative 1e-10."""
    network, state = references.deeplab(depth)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[depth]
    path = tmp_path / "deeplab.pth"
    torch.save(state, path)
    found = list(differences(path, network, [(65, 97), (96, 80)], depth))
    worst, same = max(e for e, _ in found), 100 * min(s for _, s in found)
    print(f"\n| torchvision deeplabv3_resnet{depth} | in | {worst:.1e} | {same:.2f} % |")
    assert worst < 1e-10
    assert same == 100


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The same with a ResNet of one block a stage: (network, file)."""
    network, state = references.deeplab(14)
    path = tmp_path_factory.mktemp("deeplab") / "small.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as the published ones are
    return network, path


def test_logits_of_a_small_one_equal_torchvisions(small):
    network, path = small
    for error, same in differences(path, network, [(65, 50)], 14):
        assert error < 1e-10
        assert same == 1


def test_auxiliary_logits_equal_torchvisions(small):
    """In the head's place in training, with the running statistics and without dropout."""
    network, path = small
    tensors, layout, fields = read(path)
    config = config_lib.default()
    config.model.update(fields | {"dtype": "float64", "dropout": 0.0, "bn_frozen": True})
    image = np.random.default_rng(0).integers(0, 256, (1, 40, 33, 3), np.uint8)
    with jax.enable_x64(True):
        model = segmenter.create(config.model, 21)
        shapes = jax.eval_shape(model.init, jax.random.key(0), image)
        like = {kind: shapes[kind] for kind in ("params", "batch_stats")}
        variables = deeplabv3.load(path, tensors, layout, like)

        def auxiliary(variables):
            _, sown = model.apply(
                variables, image, train=True, coarse=True, mutable=["intermediates"],
                rngs={"dropout": jax.random.key(0)},
            )  # fmt: skip
            return sown["intermediates"]["aux_logits"][0]

        ours = np.asarray(jit(auxiliary)(variables))
    with torch.no_grad():
        features = network.backbone(twins.normalized(image))["aux"]
        expected = network.aux_classifier(features).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - expected).max() < 1e-10 * np.abs(expected).max()


def test_a_first_prediction_needs_no_training(small, tmp_path, monkeypatch):
    """By name, from a server on this machine, to the mask of a picture."""
    network, path = small
    content = path.read_bytes()
    monkeypatch.setenv("DUC_DLC_CACHE", str(tmp_path / "cache"))
    with file_server.serving() as server:
        server.files["small-x.pth"] = content
        digest = hashlib.sha256(content).hexdigest()
        entry = weights.Weights(
            server.url("small-x.pth"), digest, "torchvision", "us", "none", classes="voc"
        )
        monkeypatch.setitem(weights.TABLE, "small", entry)
        import_model.import_model("small", tmp_path / "model")
    assert json.loads((tmp_path / "model" / "labels.json").read_text())["classes"][15] == "person"
    run = workdirs.load(tmp_path / "model")
    assert (run.step, run.spec) == (0, label_spec("voc"))
    assert run.config.init.weights == "small"
    image = np.random.default_rng(0).integers(0, 256, (40, 33, 3), np.uint8)
    with torch.no_grad():
        logits = network(twins.normalized(image[None]))["out"][0].permute(1, 2, 0).numpy()
    [(labelled, _)] = Predictor(run.model).batches(run.variables, [{"image": image}])
    ids = labelled[0]["prediction"]
    first, second = np.sort(logits, -1)[..., -1], np.sort(logits, -1)[..., -2]
    clear = first - second > 1e-3 * np.abs(logits).max()  # float32 here, float64 there
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ids[clear], logits.argmax(-1)[clear])
    with pytest.raises(ConfigError, match="holds a run already"):
        import_model.import_model("small", tmp_path / "model")


def test_a_file_has_no_licence_that_nobody_declared(small, tmp_path, monkeypatch):
    monkeypatch.setattr(import_model.workdirs, "create", lambda *_: None)
    config = import_model.import_model(str(small[1]), tmp_path / "model", "voc")
    said = manifest._weights(config)
    assert said["licence"] == "unknown"
    assert said["origin"] == "the file small.pth, of unknown origin"


def test_the_flag_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^--weights=.*w\.pth: no such file"):
        import_model.import_model(str(tmp_path / "w.pth"), tmp_path / "model")
    (tmp_path / "w.h5").touch()
    with pytest.raises(ConfigError, match=r"--weights takes \.npz"):
        import_model.import_model(str(tmp_path / "w.h5"), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"^--weights=something is neither"):
        import_model.import_model("something", tmp_path / "model")


def test_files_that_are_no_deeplab(small, tmp_path):
    _, path = small
    tensors = read_tensors(path)

    def refused(content, message, **labels):
        np.savez(tmp_path / "w.npz", **content)
        with pytest.raises(ConfigError, match=message):
            import_model.import_model(str(tmp_path / "w.npz"), tmp_path / "new", **labels)
        assert not (tmp_path / "new").exists()

    backbone = {name: v for name, v in tensors.items() if name.startswith("backbone.")}
    refused(backbone, r"holds a backbone and no segmenter: give it as config\.init\.weights")
    fcn = {"classifier.0.weight": np.zeros((8, 2048, 3, 3), np.float32)}
    refused(backbone | fcn, "is not torchvision's DeepLabv3")
    head = {name: v for name, v in tensors.items() if name not in backbone}
    mobile = {"backbone.0.0.weight": np.zeros((16, 3, 3, 3), np.float32)}
    refused(mobile | head, r"names look like backbone\.0\.0\.weight, classifier\.0", labels="voc")
    for name in ("classifier.1.weight", "classifier.4.weight"):
        refused(tensors | {name: np.float32(1)}, f"has no convolution {name}", labels="voc")
    three = {name: v for name, v in tensors.items() if "layer4" not in name}
    refused(three, r"has \(1, 1, 1, 0\) blocks in its stages", labels="voc")
    unstemmed = {name: v for name, v in tensors.items() if name != "backbone.bn1.weight"}
    refused(unstemmed, "has no convolution layer1.0.conv1.weight", labels="voc")
    refused(tensors, "21 classes and does not name them: give --labels")
    refused(tensors, "camvid has 11 classes, the network of .* 21", labels="camvid")
    del tensors["classifier.0.convs.2.1.running_var"]
    tensors["classifier.0.more.weight"] = np.zeros(3)
    refused(tensors, "1 tensors are missing .*running_var.*1 are unexpected", labels="voc")


@pytest.mark.parametrize("way", ["file", "name", "backbone"])
def test_a_hostile_file_runs_nothing(tmp_path, monkeypatch, capfd, way):
    """Given as a file, or by name with the right hash, to `import_model` or as a backbone."""
    content = stream(content=pickle.dumps({"a": Call(os.system, "echo run")}, 2))
    path = tmp_path / "hostile-x.pth"
    path.write_bytes(content)
    name = str(path)
    if way == "name":
        monkeypatch.setenv("DUC_DLC_CACHE", str(tmp_path))
        digest = hashlib.sha256(content).hexdigest()
        entry = weights.Weights(
            "https://nowhere/hostile-x.pth", digest, "torchvision", "us", "none"
        )
        monkeypatch.setitem(weights.TABLE, "hostile", entry)
        name = "hostile"
    if way == "backbone":
        call = functools.partial(load, path, model_config())
    else:
        call = functools.partial(import_model.import_model, name, tmp_path / "new", labels="voc")
    with pytest.raises(ConfigError, match=r"asks for posix\.system.*nothing of it was run"):
        call()
    assert capfd.readouterr().out == ""
    assert not (tmp_path / "new").exists()
