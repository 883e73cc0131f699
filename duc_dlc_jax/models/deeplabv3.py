"""Torchvision's DeepLabv3 with a ResNet, as a `Segmenter` with the same logits.

Its network in our fields: no upsampling before ASPP, output stride 8, logits resized with
`resize_grid="half_pixel"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import numpy as np

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.models import pretrained
from duc_dlc_jax.models.layouts import Layout, recognise

HEADS = ("classifier.", "aux_classifier.")
# Convolutions that say what network it is, all [O, I, h, w].
TELLING = (
    "layer1.0.conv1.weight",
    "classifier.0.convs.0.0.weight",
    "classifier.1.weight",
    "classifier.4.weight",
)
MODULES = {  # path in the Segmenter's variables -> torchvision's name
    "aspp/point_conv": "classifier.0.convs.0.0",
    "aspp/point_bn": "classifier.0.convs.0.1",
    **{f"aspp/rate{i}_conv": f"classifier.0.convs.{i}.0" for i in (1, 2, 3)},
    **{f"aspp/rate{i}_bn": f"classifier.0.convs.{i}.1" for i in (1, 2, 3)},
    "aspp/pool_conv": "classifier.0.convs.4.1",
    "aspp/pool_bn": "classifier.0.convs.4.2",
    "aspp/project_conv": "classifier.0.project.0",
    "aspp/project_bn": "classifier.0.project.1",
    "aspp/out_conv": "classifier.1",
    "aspp/out_bn": "classifier.2",
    "classifier": "classifier.4",
    "aux_conv": "aux_classifier.0",
    "aux_bn": "aux_classifier.1",
    "aux_classifier": "aux_classifier.4",
}


def recognised(path: str | Path, tensors: Mapping[str, np.ndarray]) -> Layout:
    """The layout of a file that holds a whole DeepLabv3; its heads keep their names.

    Raises ConfigError for a file of a backbone alone and for another segmenter: what `model_fields`
    and `num_classes` read is there.
    """
    layout = recognise(tensors)
    outer = layout.prefix.removesuffix("backbone.")
    heads = {
        name.removeprefix(outer): own
        for name, own in layout.names.items()
        if name.removeprefix(outer).startswith(HEADS)
    }
    if not heads:
        raise ConfigError(
            f"{path} holds a backbone and no segmenter: give it as config.init.weights and train"
        )
    rest = {name: own for name, own in layout.names.items() if own not in heads.values()}
    whole = Layout(layout.name, layout.stem, layout.source, layout.prefix, rest | heads)
    shapes = {name: tensors[own].shape for name, own in whole.names.items()}
    wrong = [name for name in TELLING if len(shapes.get(name, ())) != 4]
    if wrong or whole.depth() is None:
        lacks = f"no convolution {wrong[0]}" if wrong else f"{whole.blocks()} blocks in its stages"
        raise ConfigError(
            f"{path} is not torchvision's DeepLabv3 with a ResNet-50 or 101, the one segmenter "
            f"that is imported: it has {lacks}; its names look like "
            f"{', '.join([*list(rest)[:2], *list(heads)[:4]])}"
        )
    return whole


def model_fields(tensors: Mapping[str, np.ndarray], layout: Layout) -> dict[str, Any]:
    """The fields of `config.model` of the network that the file belongs to."""

    def shape(name: str) -> tuple[int, ...]:
        return tensors[layout.names[name]].shape

    return {
        **pretrained.model_fields(layout, "torchvision"),
        "depth": layout.depth(),
        "width": shape("layer1.0.conv1.weight")[0],
        "output_stride": 8,
        "upsampling": "none",
        "context": "aspp",
        "context_width": shape("classifier.1.weight")[0],
        "resize_grid": "half_pixel",
        "aux_head": "aux_classifier.4.weight" in layout.names,
        "bn_running_variance": "unbiased",
    }


def num_classes(tensors: Mapping[str, np.ndarray], layout: Layout) -> int:
    return len(tensors[layout.names["classifier.4.weight"]])


def load(
    path: str | Path,
    tensors: dict[str, np.ndarray],
    layout: Layout,
    variables: dict[str, Any],
) -> dict[str, Any]:
    """{params, batch_stats} of the file, with the structure, shapes and dtypes of `variables`.

    Raises ConfigError unless every tensor of the file has its place and every place its tensor.
    """
    backbone = {kind: variables[kind]["backbone"] for kind in ("params", "batch_stats")}
    wanted = {
        name: ((key[0], "backbone", *key[1:]), leaf)
        for name, (key, leaf) in pretrained.backbone_names(backbone).items()
    }
    for key, leaf in flax.traverse_util.flatten_dict(variables).items():
        if key[1] != "backbone":
            name = f"{MODULES['/'.join(key[1:-1])]}.{pretrained.LEAVES[key[-1]]}"
            wanted[name] = (key, leaf)
    counters = {name for name in layout.names if name.endswith("num_batches_tracked")}
    missing, unexpected = set(wanted) - set(layout.names), set(layout.names) - set(wanted)
    unexpected -= counters | {"fc.weight", "fc.bias"}
    if missing or unexpected:
        raise ConfigError(
            f"{path} is not a whole DeepLabv3 of torchvision: {len(missing)} tensors are missing "
            f"({', '.join(sorted(missing)[:3])}), {len(unexpected)} are unexpected "
            f"({', '.join(sorted(unexpected)[:3])})"
        )
    return pretrained.as_variables(path, tensors, layout, wanted, pretrained.SOURCES["torchvision"])
