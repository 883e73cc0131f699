"""How files name the tensors of a ResNet: which layout it is, and each name as torchvision has it.

torchvision   conv1.weight, bn1.*, layer1.0.conv1.weight, layer1.0.downsample.0.weight (timm's too)
deep stem     conv1.0, conv1.1, conv1.3, conv1.4 and conv1.6 instead of conv1 (timm's resnet50s too)
openmmlab     stem.0, stem.1, stem.3, stem.4, stem.6 and stem.7 instead of conv1 and bn1 (ResNetV1c)
huggingface   embedder.embedder.*, encoder.stages.0.layers.0.layer.0.*, ...shortcut.*

Networks that share these names and compute something else are refused by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.models.resnet import BLOCKS

UNKNOWN = "not recognised"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the tensors of a file are named.

    names: torchvision's name -> the file's, of every tensor; what is not the backbone's keeps its
    own, without the prefix. stem: as `config.model.stem`, "" where the file does not show it.
    source: of `pretrained.SOURCES`, assumed where none is declared.
    """

    name: str
    stem: str
    source: str
    prefix: str
    names: Mapping[str, str]

    def blocks(self) -> tuple[int, ...]:
        """Blocks of layer1..layer4 in the file."""
        return tuple(
            len({name.split(".")[1] for name in self.names if name.startswith(f"layer{stage}.")})
            for stage in (1, 2, 3, 4)
        )

    def depth(self) -> int | None:
        """The `config.model.depth` of these blocks; None where there is none."""
        blocks = self.blocks()
        return next((depth for depth, stages in BLOCKS.items() if stages == blocks), None)


def recognise(tensors: Mapping[str, np.ndarray]) -> Layout:
    """The layout of a file's tensors; `UNKNOWN` has torchvision's names and lacks some.

    Raises ConfigError where the names or shapes are those of another network.
    """
    huggingface = "embedder.embedder.normalization.weight"
    prefix = _prefix(tensors, re.escape(huggingface))
    if prefix is not None:
        names = {_from_huggingface(name.removeprefix(prefix)): name for name in tensors}
        layout = Layout("Hugging Face's", "plain", "huggingface", prefix, names)
    else:
        prefix = _prefix(tensors, r"(?:bn1|stem\.7)\.weight") or ""
        names = {_from_openmmlab(name.removeprefix(prefix)): name for name in tensors}
        if "conv1.0.weight" in names:
            name, source = "torchvision's with a deep stem", "pytorch_encoding"
            if f"{prefix}stem.0.weight" in tensors:
                name, source = "OpenMMLab's", "openmmlab"
            layout = Layout(name, _deep_stem(tensors, names), source, prefix, names)
        elif "conv1.weight" in names:
            layout = Layout("torchvision's", "plain", "torchvision", prefix, names)
        else:
            layout = Layout(UNKNOWN, "", "torchvision", prefix, names)
    shapes = {name: tensors[own].shape for name, own in layout.names.items()}
    for network, is_it in OTHERS.items():
        if found := is_it(shapes):
            raise ConfigError(
                f"{network}: it is another network than config.model can describe, and its weights "
                f"would give other features; told by {layout.names[found]} of shape "
                f"{tuple(shapes[found])}"
            )
    return layout


def _prefix(names: Iterable[str], pattern: str) -> str | None:
    """What stands before the stem's `pattern`: `module.`, `backbone.`, ...; the shortest."""
    matches = [re.fullmatch(rf"(?!.*layers?\.?\d)((?:.*\.)?){pattern}", name) for name in names]
    return min((match[1] for match in matches if match), key=len, default=None)


def _from_openmmlab(name: str) -> str:
    """`stem.3.weight` -> `conv1.3.weight`; `stem.7.weight`, the last BN's, -> `bn1.weight`."""
    match = re.fullmatch(r"stem\.([013467])\.(\w+)", name)
    return name if not match else ("bn1." if match[1] == "7" else f"conv1.{match[1]}.") + match[2]


def _deep_stem(tensors: Mapping[str, np.ndarray], names: Mapping[str, str]) -> str:
    """`config.model.stem` of three convolutions: "narrow" ends as wide as layer1 is inside."""
    last, inside = (names.get(f"{name}.weight") for name in ("conv1.6", "layer1.0.conv1"))
    narrow = last and inside and len(tensors[last]) == len(tensors[inside])
    return "narrow" if narrow else "deep"


_PARTS = {"convolution": "conv", "normalization": "bn"}


def _from_huggingface(name: str) -> str:
    """`encoder.stages.0.layers.2.layer.1.convolution.weight` -> `layer1.2.conv2.weight`."""
    if match := re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", name):
        return f"{_PARTS[match[1]]}1.{match[2]}"
    block = r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|shortcut)\.(\w+)\.(\w+)"
    match = re.fullmatch(block, name)
    if match and match[4] in _PARTS:
        stage, number, conv, part, leaf = match.groups()
        if conv is None:
            module = f"downsample.{list(_PARTS).index(part)}"
        else:
            module = f"{_PARTS[part]}{int(conv) + 1}"
        return f"layer{int(stage) + 1}.{number}.{module}.{leaf}"
    return re.sub(r"^(?:\w+\.)*classifier\.1\.", "fc.", name)


Shapes = dict[str, tuple[int, ...]]


def _first(pattern: str, true: Callable[[Any], bool] = lambda shape: True):
    """Shapes -> the first name that the pattern finds and whose shape is `true`."""
    return lambda shapes: next(
        (name for name in shapes if re.search(pattern, name) and true(shapes[name])), None
    )


def _basic_block(shapes: Shapes) -> str | None:
    own = "layer1.0.conv1.weight"
    return own if own in shapes and not _first(r"^layer\d\.\d+\.conv3\.")(shapes) else None


def _wide_block(shapes: Shapes) -> str | None:
    own = "layer1.0.conv1.weight"
    first, last = shapes.get(own), shapes.get("layer1.0.conv3.weight")
    return own if first and last and last[0] != 4 * first[0] else None


# What to call the network -> the name of a tensor that shows it.
OTHERS: dict[str, Callable[[Shapes], str | None]] = {
    "a ResNet-D, which averages before the shortcut's 1x1 (timm's resnet50d, OpenMMLab's ResNetV1d,"
    " avg_down in PyTorch-Encoding)": _first(
        r"^layer\d\.\d+\.downsample\.1\.weight", lambda s: len(s) == 4
    ),
    "a ResNeSt, with split attention": _first(r"^layer\d\.\d+\.conv2\.(conv|fc1)\."),
    "a ResNet with squeeze and excitation or other attention": _first(
        r"^layer\d\.\d+\.(se|se_module|attn)\."
    ),
    "a ResNet of basic blocks (18 or 34)": _basic_block,
    "a ResNeXt, with grouped convolutions": _first(
        r"^layer\d\.\d+\.conv2\.weight", lambda s: len(s) == 4 and s[0] != s[1]
    ),
    "a wide ResNet": _wide_block,
}
