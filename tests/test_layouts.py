"""How files name their tensors: each layout against the network that it comes from.

The rows "in" of docs/conversion.md: pytest -s -m parity tests/test_layouts.py
"""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duc_dlc_jax import config as default_config
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.models import layers, layouts, pretrained, segmenter
from duc_dlc_jax.models.resnet import BLOCKS, ResNet
from networks import jit, shapes_of

torch = pytest.importorskip("torch", reason="the reference networks need torch")
import references  # noqa: E402
import torch_twin as twins  # noqa: E402


def resnet(library, depth=50, **fields):
    """A ResNet of torchvision or timm in float64 with random values, and its state dict."""
    models = references.imported(f"{library}.models.resnet")
    network = references.randomized(
        lambda: models.ResNet(models.Bottleneck, list(BLOCKS[depth]), **fields), depth
    )
    return network, references.state32(network)


def huggingface_resnet():
    """transformers' own where it is installed, else torchvision's under its names."""
    try:
        import transformers
    except ImportError:
        network, state = resnet("torchvision")
        return network, references.to_huggingface(state)
    network = references.randomized(
        lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig()), 50
    )
    return network, references.state32(network)


def load(path, source, depth, **fields):
    """(backbone params, batch_stats, report) in float64 of a file."""
    config = default_config.default()
    config.model.update({"dtype": "float64", "depth": depth} | fields)
    model = segmenter.create(config.model, 2)
    variables = shapes_of(model)
    params, batch_stats, report = pretrained.load_backbone(
        path, source, variables["params"], variables["batch_stats"], config.model
    )
    return params["backbone"], batch_stats["backbone"], report


DEEP = {"stem_type": "deep", "stem_width": 64}
NARROW = {"stem_type": "deep", "stem_width": 32}
CASES = [
    # row, source, stem, depth, the network and its state dict
    ("torchvision resnet50", "torchvision", "plain", 50, lambda: resnet("torchvision")),
    ("timm resnet50", "timm", "plain", 50, lambda: resnet("timm")),
    ("timm resnet50s", "timm", "deep", 50, lambda: resnet("timm", **DEEP)),
    ("timm resnet50c", "timm", "narrow", 50, lambda: resnet("timm", **NARROW)),
    ("Hugging Face resnet-50", "huggingface", "plain", 50, huggingface_resnet),
    (
        "PyTorch-Encoding resnet269",
        "pytorch_encoding",
        "deep",
        269,
        lambda: resnet("timm", 269, **DEEP),
    ),
]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("row", "source", "stem", "depth", "build"), CASES, ids=[c[0] for c in CASES]
)
def test_features_equal_the_reference(tmp_path, row, source, stem, depth, build):
    """From a .pth to the features, float64: relative 1e-10, the strongest channel of each cell."""
    network = build()
    network, state = (
        network if isinstance(network, tuple) else (network, references.state32(network))
    )
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    batch = np.random.default_rng(0).integers(0, 256, (1, 33, 40, 3), np.uint8)
    x = twins.normalized(batch)
    with jax.enable_x64(True):
        params, batch_stats, report = load(path, source, depth, stem=stem)
        assert not report.unexpected
        ours = ResNet(
            depth, 64, stem, "3x3", 32,
            conv=lambda *a, **k: layers.Conv(*a, **k, dtype=jnp.float64),
            norm=lambda **k: layers.BatchNorm(**k, dtype=jnp.float64, use_running_average=True),
        )  # fmt: skip
        found = jit(ours.apply)(
            {"params": params, "batch_stats": batch_stats}, x.permute(0, 2, 3, 1).numpy()
        )
        worst, same = 0.0, []
        for feature, expected in zip(found, references.features(network, x), strict=True):
            feature, expected = np.asarray(feature), expected.permute(0, 2, 3, 1).numpy()
            assert feature.dtype == np.float64
            worst = max(worst, np.abs(feature - expected).max() / np.abs(expected).max())
            same.append((feature.argmax(-1) == expected.argmax(-1)).mean())
    print(f"\n| {row} | in | {worst:.1e} | {100 * np.mean(same):.2f} % |")
    assert worst < 1e-10
    assert np.mean(same) == 1


# names, without compiling


def tiny(stem="plain"):
    """A narrow 14-layer ResNet of torchvision or, with a deep stem, of timm: its state dict."""
    if stem == "plain":
        models = references.imported("torchvision.models.resnet")
        network = models.ResNet(models.Bottleneck, [1, 1, 1, 1], num_classes=7)
    else:
        models = references.imported("timm.models.resnet")
        fields = {"deep": DEEP, "narrow": NARROW}[stem]
        network = models.ResNet(models.Bottleneck, [1, 1, 1, 1], 7, **fields)
    return {name: value.numpy() for name, value in network.state_dict().items()}


def shaped(state):
    """Tensors of these shapes without their memory."""
    return {name: np.broadcast_to(np.float32(0), value.shape) for name, value in state.items()}


def test_huggingface_names_are_those_of_transformers():
    models = references.imported("torchvision.models.resnet")
    with torch.device("meta"):
        state = models.resnet50().state_dict()
    renamed = references.to_huggingface(state)
    digest = hashlib.sha256("\n".join(sorted(renamed)).encode()).hexdigest()
    assert digest == references.HUGGINGFACE_NAMES
    layout = layouts.recognise(shaped(renamed))
    assert (layout.name, layout.depth(), layout.stem) == ("Hugging Face's", 50, "plain")
    assert set(layout.names) == set(state)


@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
def test_huggingface_weights_are_torchvisions(tmp_path, prefix):
    state = tiny()
    renamed = {f"{prefix}{name}": v for name, v in references.to_huggingface(state).items()}
    np.savez(tmp_path / "a.npz", **state)
    np.savez(tmp_path / "b.npz", **renamed)
    with jax.enable_x64(True):
        *ours, report = load(tmp_path / "a.npz", "torchvision", 14)
        *theirs, other = load(tmp_path / "b.npz", "", 14)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert other.source == "huggingface"
    assert other.missing == other.unexpected == ()
    if not prefix:
        np.testing.assert_array_equal(other.fc[0], report.fc[0])
    assert "Hugging Face" in "\n".join(other.lines())


def test_what_is_recognised_and_declared_is_printed(tmp_path):
    np.savez(tmp_path / "deep.npz", **tiny("deep"))
    with jax.enable_x64(True):
        *_, report = load(tmp_path / "deep.npz", "timm", 14, stem="deep")
    text = "\n".join(report.lines())
    assert "torchvision's with a deep stem" in text
    assert "timm, that is stride on the 3x3 convolutions, BN epsilon 1e-05, RGB standard" in text
    layout, source = pretrained.inspect(tmp_path / "deep.npz")
    assert (layout.depth(), source) == (14, "pytorch_encoding")
    assert pretrained.model_fields(layout, source)["stem"] == "deep"
    with jax.enable_x64(True), pytest.raises(ConfigError, match=r"--config\.model\.stem=deep"):
        load(tmp_path / "deep.npz", "timm", 14)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50d", "ResNet-D"),
        ("resnet34", "basic blocks"),
        ("resnext50_32x4d", "ResNeXt"),
        ("wide_resnet50_2", "wide ResNet"),
        ("seresnet50", "squeeze and excitation"),
        ("resnest50d", "ResNeSt|ResNet-D"),
    ],
)
def test_other_networks_are_refused_by_name(name, message):
    timm = references.imported("timm")
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    with pytest.raises(ConfigError, match=message):
        layouts.recognise(shaped(state))


def test_openmmlabs_names_of_timms_narrow_stem(tmp_path):
    state = tiny("narrow")
    names = {name: name.replace("conv1.", "stem.") for name in state if name.startswith("conv1.")}
    names |= {name: name.replace("bn1.", "stem.7.") for name in state if name.startswith("bn1.")}
    renamed = {f"backbone.{names.get(name, name)}": value for name, value in state.items()}
    np.savez(tmp_path / "a.npz", **state)
    np.savez(tmp_path / "b.npz", **renamed, **{"decode_head.conv_seg.bias": np.zeros(3)})
    layout, source = pretrained.inspect(tmp_path / "b.npz")
    assert (layout.name, source) == ("OpenMMLab's", "openmmlab")
    assert pretrained.model_fields(layout, source)["stem"] == "narrow"
    with jax.enable_x64(True):
        *ours, _ = load(tmp_path / "a.npz", "timm", 14, stem="narrow")
        *theirs, report = load(tmp_path / "b.npz", "", 14, stem="narrow")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert report.unexpected == ("decode_head.conv_seg.bias",)
