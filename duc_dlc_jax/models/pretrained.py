"""Backbone weights from files of tensors, without importing PyTorch.

The names of the tensors say the depth and the stem (`layouts.py`). They do not say where the blocks
stride, in which order the colour channels come, how the input is scaled or with which epsilon
BatchNorm divides. `SOURCES` declares these for each known origin; a configuration that disagrees is
refused, not silently adapted.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import flax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.models import weights
from duc_dlc_jax.models.layers import IMAGE_STD
from duc_dlc_jax.models.layouts import Layout, recognise
from duc_dlc_jax.models.resnet import BLOCKS
from duc_dlc_jax.models.tensor_files import read_tensors


@dataclasses.dataclass(frozen=True)
class Source:
    """What a file of tensors cannot say about itself.

    channels: order in which the first convolution reads the colours; "bgr" is turned into RGB here.
    pixels: scale of the input it was trained on, after subtracting the mean: "standard" is
    (x / 255 - mean) / std, "0..255" is x - 255 mean; the difference is folded into the first
    convolution.
    """

    note: str
    licence: str  # of the published weights
    stride_on: str = "3x3"  # config.model.stride_on
    bn_epsilon: float = 1e-5  # config.model.bn_epsilon
    channels: str = "rgb"
    pixels: str = "standard"

    def sentence(self) -> str:
        """What is declared, in words."""
        pixels = {"standard": "standardised", "0..255": "in 0..255 with the mean subtracted"}
        return (
            f"stride on the {self.stride_on} convolutions, BN epsilon {self.bn_epsilon:g}, "
            f"{self.channels.upper()} {pixels[self.pixels]}"
        )


SOURCES = {
    "torchvision": Source("torchvision's resnet50, 101, 152", "BSD-3-Clause"),
    "timm": Source("timm's resnet50, 101, 152 and resnet50s, 101s, 152s", "Apache-2.0"),
    "huggingface": Source(
        "Hugging Face's ResNets with downsample_in_bottleneck=False", "Apache-2.0"
    ),
    "pytorch_encoding": Source("PyTorch-Encoding and FastFCN", "MIT"),
    "openmmlab": Source("OpenMMLab's ResNets and ResNetV1c of style pytorch", "Apache-2.0"),
    "keras_v1": Source(
        "Keras ResNet v1 converted to torchvision names, RGB", "MIT", stride_on="1x1"
    ),
    "detectron_caffe": Source(
        "Detectron's and OpenMMLab's 'caffe' ResNets",
        "Apache-2.0",
        stride_on="1x1",
        channels="bgr",
        pixels="0..255",
    ),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the file's tensors; names are torchvision's, or the file's without prefix."""

    path: str
    layout: str
    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # wanted by the backbone; `load_backbone` raises unless it is empty
    unexpected: tuple[str, ...]  # in the file, unknown to the backbone
    unused: tuple[str, ...]  # known and not needed: fc.*, num_batches_tracked
    fc: tuple[np.ndarray, np.ndarray] | None  # float32 weight [2048, classes] and bias [classes]

    def lines(self) -> list[str]:
        """The report for a log, one string a line."""
        found = [
            f"backbone weights: {self.path}",
            f"  names: {self.layout}",
            f"  source: {self.source}, that is {SOURCES[self.source].sentence()}",
        ]
        for kind in ("loaded", "missing", "unexpected", "unused"):
            names = getattr(self, kind)
            listed = "" if kind == "loaded" else _listed(names)
            found.append(f"  {kind}: {len(names)} tensors{': ' if listed else ''}{listed}")
        return found


def load_backbone(
    path: str | Path,
    source: str,
    params: dict[str, Any],
    batch_stats: dict[str, Any],
    model_config: ml_collections.ConfigDict,
) -> tuple[dict[str, Any], dict[str, Any], Report]:
    """Replaces the backbone's parameters and running statistics with those of a file.

    Args:
      path: a file that `tensor_files` reads, convolutions OIHW, in any floating dtype; or a name
        of `weights.TABLE`, which is downloaded.
      source: a key of `SOURCES`; empty = the one that the layout of names suggests, with a warning.
      params: the `params` collection of `Segmenter` (its `backbone` entry is replaced in a copy).
      batch_stats: its `batch_stats` collection, likewise.
      model_config: `config.model`.

    Returns:
      params and batch_stats of the same structure, shapes and dtypes; the report (also logged).

    Raises:
      FileNotFoundError: no such file.
      ConfigError: unknown source; a configuration that the source or the file contradicts; another
        network's file or an unreadable one; a missing tensor; a shape that differs.
    """
    path, source = weights.find(path, source)
    tensors = read_tensors(path)
    layout = recognise(tensors)
    name = _source_name(source, path, layout)
    _check_config(name, layout, model_config)
    wanted = backbone_names({"params": params["backbone"], "batch_stats": batch_stats["backbone"]})
    report = _report(path, name, layout, tensors, wanted)
    for line in report.lines():
        logging.info("%s", line)
    if report.missing:
        raise ConfigError(_missing_message(report, layout, model_config))

    tree = as_variables(path, tensors, layout, wanted, SOURCES[name])
    return (
        {**params, "backbone": tree["params"]},
        {**batch_stats, "backbone": tree["batch_stats"]},
        report,
    )


Wanted = dict[str, tuple[tuple[str, ...], Any]]  # name -> (path in {params, batch_stats}, array)


def as_variables(
    path: str | Path,
    tensors: dict[str, np.ndarray],
    layout: Layout,
    wanted: Wanted,
    source: Source,
) -> dict[str, Any]:
    """The tensors as a tree with the structure, shapes and dtypes of `wanted`.

    tensors: of the file `path`, by its own names; convolutions OIHW. Every name of `wanted` is one
    of `layout.names`. Raises ConfigError for a shape that differs, for values that are not finite
    and for negative variances.
    """
    new = {}
    for name in (name for name in layout.names if name in wanted):
        key, leaf = wanted[name]
        value = tensors[layout.names[name]]
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)  # OIHW -> HWIO
        if value.shape != leaf.shape:
            in_file = tuple(tensors[layout.names[name]].shape)
            ours = tuple(leaf.shape[i] for i in (3, 2, 0, 1)) if leaf.ndim == 4 else leaf.shape
            raise ConfigError(
                f"{path}: tensor {layout.names[name]} has shape {in_file}, the network needs "
                f"{tuple(ours)} by config.model.depth, width and stem. Set these fields to what "
                "the file holds, or give another file."
            )
        value = value.astype(leaf.dtype)
        finite = np.isfinite(value).all()
        if not finite or (key[-1] == "var" and value.min() < 0):
            bad = "negative values" if finite else "values that are not finite"
            raise ConfigError(
                f"{path}: tensor {layout.names[name]} has {bad}: the file is damaged, or its "
                "training diverged. Give another file."
            )
        if name in ("conv1.0.weight", "conv1.weight"):  # what reads the image
            value = _adapt_input(value, source)
        new[key] = jnp.asarray(value, leaf.dtype)
    return flax.traverse_util.unflatten_dict(new)


def inspect(path: str | Path, source: str = "") -> tuple[Layout, str]:
    """How a file's tensors are named, and the source that holds for it: `source` or the likely one.

    path: as in `load_backbone`. Raises as `weights.find`, `read_tensors` and `layouts.recognise`
    do, and for an unknown source.
    """
    path, source = weights.find(path, source)
    layout = recognise(read_tensors(path))
    return layout, _source_name(source, path, layout, quiet=True)


def _source_name(source: str, path: str | Path, layout: Layout, quiet: bool = False) -> str:
    if not source:
        if not quiet:
            logging.warning(
                "config.init.source is empty: assuming that %s is from '%s' (%s). "
                "If it is not, results will be silently wrong; the known sources are %s.",
                path, layout.source, SOURCES[layout.source].note, ", ".join(SOURCES),
            )  # fmt: skip
        return layout.source
    if source not in SOURCES:
        near = difflib.get_close_matches(source, SOURCES, 1, 0)[0]
        raise ConfigError(
            f"config.init.source={source!r} is not one of {', '.join(SOURCES)}. "
            f"Did you mean config.init.source={near}?"
        )
    return source


def model_fields(layout: Layout, source: str) -> dict[str, Any]:
    """The fields of `config.model` that weights of this layout and source fix."""
    declared = SOURCES[source]
    fields = {"stride_on": declared.stride_on, "bn_epsilon": declared.bn_epsilon}
    return fields | ({"stem": layout.stem} if layout.stem else {})


def _check_config(name: str, layout: Layout, model: ml_collections.ConfigDict) -> None:
    """Raises if `config.model` describes another network than the weights belong to."""
    wanted = model_fields(layout, name)
    wrong = [field for field in wanted if model[field] != wanted[field]]
    if wrong:
        raise ConfigError(
            f"Weights from config.init.source={name} with names like {layout.name} belong to a "
            "network with other settings: "
            + "; ".join(f"config.model.{f} is {model[f]!r}, must be {wanted[f]!r}" for f in wrong)
            + ". Set "
            + " ".join(f"--config.model.{f}={wanted[f]}" for f in wrong)
            + f", or name another source ({', '.join(SOURCES)})."
        )


LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
LEAVES |= {"mean": "running_mean", "var": "running_var"}


def backbone_names(backbone: dict[str, Any]) -> Wanted:
    """Torchvision's names of {params, batch_stats} of the backbone."""
    deep = "stem_conv1" in backbone["params"]
    modules = {"stem_conv1": "conv1.0", "stem_bn1": "conv1.1"}
    modules |= {"stem_conv2": "conv1.3", "stem_bn2": "conv1.4"}
    stem_conv = "conv1.6" if deep else "conv1"
    modules |= {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}
    wanted = {}
    for key, leaf in flax.traverse_util.flatten_dict(backbone).items():
        _, *path, kind = key
        if path == ["conv1"]:
            path = [stem_conv]
        names = [modules.get(name, name).replace("_", ".") for name in path]
        wanted[".".join([*names, LEAVES[kind]])] = (key, leaf)
    return wanted


def _report(path, source, layout, tensors, wanted) -> Report:
    names = layout.names
    rest = [name for name in names if name not in wanted]
    unused = [n for n in rest if n.startswith("fc.") or n.endswith("num_batches_tracked")]
    fc = None
    if "fc.weight" in names and "fc.bias" in names:
        weight, bias = (tensors[names[f"fc.{n}"]].astype(np.float32) for n in ("weight", "bias"))
        fc = (weight.T, bias)
    return Report(
        path=f"{path} (names without '{layout.prefix}')" if layout.prefix else str(path),
        layout=layout.name,
        source=source,
        loaded=tuple(name for name in names if name in wanted),
        missing=tuple(name for name in wanted if name not in names),
        unexpected=tuple(name for name in rest if name not in unused),
        unused=tuple(unused),
        fc=fc,
    )


def _missing_message(report: Report, layout: Layout, model: ml_collections.ConfigDict) -> str:
    blocks, depth = layout.blocks(), layout.depth()
    message = (
        f"{report.path}: {len(report.missing)} backbone tensors are missing: "
        f"{_listed(report.missing)}. The file has {blocks} blocks in layer1..layer4, "
        f"config.model.depth={model.depth} needs {BLOCKS[model.depth]}"
    )
    if depth is not None and depth != model.depth:
        return f"{message}. Set --config.model.depth={depth}."
    held = _listed(tuple(layout.names)) or "nothing"
    return f"{message}. It holds {held}. Give a complete backbone in config.init.weights."


def _listed(names: tuple[str, ...], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _adapt_input(kernel: np.ndarray, source: Source) -> np.ndarray:
    """First kernel [h, w, 3, O]: to RGB input normalised as `layers.normalize` does it."""
    if source.channels == "bgr":
        kernel = kernel[:, :, ::-1]
    if source.pixels == "0..255":
        kernel = kernel * (255 * np.asarray(IMAGE_STD, kernel.dtype))[:, None]
    return kernel
