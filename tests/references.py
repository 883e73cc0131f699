"""Networks of other projects with random weights: what imported weights must answer like."""

from __future__ import annotations

import functools
import importlib
import sys

import pytest

torch = pytest.importorskip("torch", reason="the reference networks need torch")
import torch_twin as twins  # noqa: E402

# Of the sorted names of ResNetForImageClassification(ResNetConfig()) in transformers 5.24.0.
HUGGINGFACE_NAMES = "f492016f5375df4e9126479800bd87b510f2c62ae50e24a701863a78e9f6ed34"


@functools.cache
def _declare_operators():
    """torchvision beside a torch without its C++ operators imports once two are declared."""
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # its life is the operators' life


def imported(name: str):
    """A module of torchvision, timm or transformers; skips where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: pip install {error.name}")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for loaded in [n for n in sys.modules if n.partition(".")[0] in ("torchvision", "timm")]:
        del sys.modules[loaded]
    _declare_operators()
    return importlib.import_module(name)


def randomized(build, seed: int = 0):
    """`build()` in float64 for inference, with random float32 values that keep features near 1."""
    with torch.device("meta"):
        network = build()
    network = network.to_empty(device="cpu")
    twins.randomize(network, seed)
    for name, value in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            value.zero_()
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, 0, 0.05)
            torch.nn.init.normal_(module.bias, 0, 0.05)
    return network.double().eval()


def state32(network) -> dict:
    """The state dict in float32, which `randomized` made exact."""
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }


def deeplab(depth: int, classes: int = 21, aux: bool = True):
    """Torchvision's DeepLabv3 with random values, and its state dict."""
    resnet = imported("torchvision.models.resnet")
    module = imported("torchvision.models.segmentation.deeplabv3")

    def build():
        backbone = resnet.ResNet(
            resnet.Bottleneck, twins.BLOCKS[depth], replace_stride_with_dilation=[False, True, True]
        )
        return module._deeplabv3_resnet(backbone, classes, aux)

    network = randomized(build, depth)
    return network, state32(network)


def features(network, x):
    """Outputs of layer1..layer4 of a ResNet in the manner of torchvision, timm or Hugging Face."""
    with torch.no_grad():
        if hasattr(network, "resnet"):
            outputs = network.resnet(x, output_hidden_states=True).hidden_states[1:]
            return list(outputs)
        x = network.maxpool((network.act1 if hasattr(network, "act1") else network.relu)(
            network.bn1(network.conv1(x))
        ))  # fmt: skip
        outputs = []
        for number in (1, 2, 3, 4):
            x = getattr(network, f"layer{number}")(x)
            outputs.append(x)
        return outputs


def to_huggingface(state: dict) -> dict:
    """A state dict with torchvision's names under those of Hugging Face's ResNets."""
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] in ("conv1", "bn1"):
            kind = {"conv1": "convolution", "bn1": "normalization"}[parts[0]]
            new = f"resnet.embedder.embedder.{kind}.{parts[1]}"
        elif parts[0] == "fc":
            new = f"classifier.1.{parts[1]}"
        else:
            block = f"resnet.encoder.stages.{int(parts[0][5:]) - 1}.layers.{parts[1]}"
            if parts[2] == "downsample":
                new = f"{block}.shortcut.{['convolution', 'normalization'][int(parts[3])]}"
            else:
                kind = "convolution" if parts[2].startswith("conv") else "normalization"
                new = f"{block}.layer.{int(parts[2][-1]) - 1}.{kind}"
            new = f"{new}.{parts[-1]}"
        renamed[new] = value
    return renamed
