"""Backbone weights from files with torchvision-style names, without importing PyTorch.

A file of tensors does not say where its blocks stride, in which order it takes the colour
channels, how its input is scaled or with which epsilon its BatchNorm divides. `SOURCES` declares
these for each known origin; a configuration that disagrees is refused, not silently adapted.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import math
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import flax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl import logging

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.models.layers import IMAGE_STD
from duc_dlc_jax.models.resnet import BLOCKS

DEFAULT_SOURCE = "torchvision"
_MODEL_FIELDS = ("stem", "stride_on", "bn_epsilon")  # of a source and of config.model alike


@dataclasses.dataclass(frozen=True)
class Source:
    """What a file of tensors cannot say about itself.

    channels: order in which the first convolution reads the colours; "bgr" is turned into RGB here.
    pixels: scale of the input it was trained on, after subtracting the mean: "standard" is
    (x / 255 - mean) / std, "0..255" is x - 255 mean; the difference is folded into the first
    convolution.
    """

    note: str
    stem: str = "plain"  # config.model.stem
    stride_on: str = "3x3"  # config.model.stride_on
    bn_epsilon: float = 1e-5  # config.model.bn_epsilon
    channels: str = "rgb"
    pixels: str = "standard"


SOURCES = {
    "torchvision": Source("torchvision's resnet50, 101, 152"),
    "pytorch_encoding": Source("PyTorch-Encoding and FastFCN", stem="deep"),
    "keras_v1": Source("Keras ResNet v1 converted to torchvision names, RGB", stride_on="1x1"),
    "detectron_caffe": Source(
        "Detectron's and OpenMMLab's 'caffe' ResNets",
        stride_on="1x1",
        channels="bgr",
        pixels="0..255",
    ),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the file's tensors; names are the file's, without its prefix."""

    path: str
    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # wanted by the backbone; `load_backbone` raises unless it is empty
    unexpected: tuple[str, ...]  # in the file, unknown to the backbone
    unused: tuple[str, ...]  # known and not needed: fc.*, num_batches_tracked
    fc: tuple[np.ndarray, np.ndarray] | None  # float32 weight [2048, classes] and bias [classes]

    def lines(self) -> list[str]:
        """The report for a log, one string a line."""
        found = [f"backbone weights: {self.path}, source {self.source}"]
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
      path: .npz, .safetensors or zip-format .pth; convolutions OIHW, in any floating dtype.
      source: a key of `SOURCES`; empty = `DEFAULT_SOURCE`, with a warning.
      params: the `params` collection of `Segmenter` (its `backbone` entry is replaced in a copy).
      batch_stats: its `batch_stats` collection, likewise.
      model_config: `config.model`.

    Returns:
      params and batch_stats of the same structure, shapes and dtypes; the report (also logged).

    Raises:
      FileNotFoundError: no such file.
      ConfigError: unknown source; a configuration that the source contradicts; an unreadable
        file; a missing tensor; a shape that differs.
    """
    name = _source_name(source, path)
    _check_config(name, model_config)
    tensors, prefix = _strip_prefix(read_tensors(path))
    wanted = _wanted({"params": params["backbone"], "batch_stats": batch_stats["backbone"]})
    report = _report(path, name, prefix, tensors, wanted)
    for line in report.lines():
        logging.info("%s", line)
    if report.missing:
        raise ConfigError(_missing_message(report, tensors, model_config))

    first = "conv1.0.weight" if model_config.stem == "deep" else "conv1.weight"
    new = {}
    for tensor in report.loaded:
        key, leaf = wanted[tensor]
        value = tensors[tensor]
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)  # OIHW -> HWIO
        if value.shape != leaf.shape:
            in_file = tuple(tensors[tensor].shape)
            ours = tuple(leaf.shape[i] for i in (3, 2, 0, 1)) if leaf.ndim == 4 else leaf.shape
            raise ConfigError(
                f"{path}: tensor {prefix}{tensor} has shape {in_file}, the network needs "
                f"{tuple(ours)} (config.model.depth={model_config.depth}, "
                f"width={model_config.width}, stem={model_config.stem}). Set these fields to what "
                "the file holds, or give another file in config.init.weights."
            )
        value = value.astype(leaf.dtype)
        if tensor == first:
            value = _adapt_input(value, SOURCES[name])
        new[key] = jnp.asarray(value, leaf.dtype)
    tree = flax.traverse_util.unflatten_dict(new)
    return (
        {**params, "backbone": tree["params"]},
        {**batch_stats, "backbone": tree["batch_stats"]},
        report,
    )


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a .npz, .safetensors or zip-format .pth file; none of its code runs."""
    path = Path(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".pth": _read_pth}
    if path.suffix not in readers:
        raise ConfigError(
            f"{path}: weights of type {path.suffix or '(no suffix)'} are not read; "
            f"config.init.weights takes {', '.join(readers)}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"config.init.weights={path}: no such file.")
    return readers[path.suffix](path)


def _source_name(source: str, path: str | Path) -> str:
    if not source:
        logging.warning(
            "config.init.source is empty: assuming that %s is from '%s' (%s). "
            "If it is not, results will be silently wrong; the known sources are %s.",
            path, DEFAULT_SOURCE, SOURCES[DEFAULT_SOURCE].note, ", ".join(SOURCES),
        )  # fmt: skip
        return DEFAULT_SOURCE
    if source not in SOURCES:
        near = difflib.get_close_matches(source, SOURCES, 1, 0)[0]
        raise ConfigError(
            f"config.init.source={source!r} is not one of {', '.join(SOURCES)}. "
            f"Did you mean config.init.source={near}?"
        )
    return source


def _check_config(name: str, model: ml_collections.ConfigDict) -> None:
    """Raises if `config.model` describes another network than the source's weights belong to."""
    wanted = {field: getattr(SOURCES[name], field) for field in _MODEL_FIELDS}
    wrong = [field for field in _MODEL_FIELDS if model[field] != wanted[field]]
    if wrong:
        raise ConfigError(
            f"Weights from config.init.source={name} belong to a network with other settings: "
            + "; ".join(f"config.model.{f} is {model[f]!r}, must be {wanted[f]!r}" for f in wrong)
            + ". Set "
            + " ".join(f"--config.model.{f}={wanted[f]}" for f in wrong)
            + f", or name another source ({', '.join(SOURCES)})."
        )


def _wanted(backbone: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
    """{torchvision name: (path in {params, batch_stats}, array)} of the backbone."""
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    leaves |= {"mean": "running_mean", "var": "running_var"}
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
        wanted[".".join([*names, leaves[kind]])] = (key, leaf)
    return wanted


def _strip_prefix(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """Removes `module.`, `backbone.`, `pretrained.` or whatever stands before the stem's bn1."""
    stems = [name for name in tensors if re.fullmatch(r"(?!.*layer\d)(.*\.)?bn1\.weight", name)]
    prefix = min(stems, key=len, default="bn1.weight").removesuffix("bn1.weight")
    return {name.removeprefix(prefix): value for name, value in tensors.items()}, prefix


def _report(path, source, prefix, tensors, wanted) -> Report:
    rest = [name for name in tensors if name not in wanted]
    unused = [n for n in rest if n.startswith("fc.") or n.endswith("num_batches_tracked")]
    fc = None
    if "fc.weight" in tensors and "fc.bias" in tensors:
        weight, bias = (tensors[f"fc.{n}"].astype(np.float32) for n in ("weight", "bias"))
        fc = (weight.T, bias)
    return Report(
        path=f"{path} (names without '{prefix}')" if prefix else str(path),
        source=source,
        loaded=tuple(name for name in tensors if name in wanted),
        missing=tuple(name for name in wanted if name not in tensors),
        unexpected=tuple(name for name in rest if name not in unused),
        unused=tuple(unused),
        fc=fc,
    )


def find_depth(path: str | Path) -> int | None:
    """The `config.model.depth` that a file's weights belong to; None where none fits.

    Raises as `read_tensors` does.
    """
    return _blocks_and_depth(_strip_prefix(read_tensors(path))[0])[1]


def _blocks_and_depth(tensors) -> tuple[tuple[int, ...], int | None]:
    blocks = tuple(
        len({name.split(".")[1] for name in tensors if name.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    return blocks, next((depth for depth, stages in BLOCKS.items() if stages == blocks), None)


def _missing_message(report: Report, tensors, model: ml_collections.ConfigDict) -> str:
    blocks, depth = _blocks_and_depth(tensors)
    message = (
        f"{report.path}: {len(report.missing)} backbone tensors are missing: "
        f"{_listed(report.missing)}. The file has {blocks} blocks in layer1..layer4, "
        f"config.model.depth={model.depth} needs {BLOCKS[model.depth]}"
    )
    if depth is not None and depth != model.depth:
        return f"{message}. Set --config.model.depth={depth}."
    held = _listed(tuple(tensors)) or "nothing"
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


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: not a readable .npz of plain arrays: {error}") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable .safetensors file: {error}") from error


_STORAGES = {
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def _read_pth(path: Path) -> dict[str, np.ndarray]:
    """The state dict of `torch.save`'s zip format, itself or under `state_dict` or `model`."""
    if not zipfile.is_zipfile(path):
        raise ConfigError(
            f"{path}: not the zip format that torch.save writes since PyTorch 1.6. Convert it "
            "where PyTorch is installed: torch.save(torch.load(OLD, map_location='cpu', "
            "weights_only=True), NEW)."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            content = _TensorUnpickler(archive).load()
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise ConfigError(f"{path}: not a state dict of plain tensors: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not a state dict.")
    return {n: v for n, v in content.items() if isinstance(n, str) and isinstance(v, np.ndarray)}


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors in ordinary containers; every other global is refused by name.

    The globals it resolves are stand-ins made here for each file, so that nothing of the process is
    within the pickle's reach.
    """

    def __init__(self, archive: zipfile.ZipFile):
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConfigError(f"expected one data.pkl in the archive, found {len(pickles)}")
        self._archive = archive
        self._folder = pickles[0].removesuffix("data.pkl")
        order = f"{self._folder}byteorder"
        stored = archive.read(order).decode() if order in archive.namelist() else "little"
        self._swap = stored != sys.byteorder
        super().__init__(archive.open(pickles[0]))

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *args: _rebuild(*args)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name in _STORAGES:
            return _StorageType(name)
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which is not a tensor; nothing of it was run"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        """('storage', type, key, location, elements) -> flat array of the storage."""
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _StorageType):
            raise pickle.UnpicklingError(f"unknown record {kind!r}")
        entry = self._archive.getinfo(f"{self._folder}data/{key}")
        dtype = np.dtype(_STORAGES[storage])
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != count * dtype.itemsize:
            raise pickle.UnpicklingError(
                f"storage {key} has {entry.file_size} bytes, {count} x {dtype} need "
                f"{count * dtype.itemsize}, uncompressed"
            )
        flat = np.frombuffer(self._archive.read(entry), f"u{dtype.itemsize}")
        return (flat.byteswap() if self._swap else flat).view(dtype)


class _StorageType(str):
    """Name of a PyTorch storage class, standing for the class itself."""


def _rebuild(storage, offset, size, stride, *_) -> np.ndarray:
    """A tensor as a copy of its view of the flat `storage`; offset and strides in elements."""
    if not isinstance(storage, np.ndarray):
        raise pickle.UnpicklingError("a tensor without a storage")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    count = math.prod(size)
    if min((offset, *size, *stride), default=0) < 0 or (count and last >= storage.size):
        raise pickle.UnpicklingError(f"tensor of size {size} reaches beyond its storage")
    if count > storage.size:  # an expanded tensor: its copy could be of any size
        raise pickle.UnpicklingError(f"tensor of size {size} exceeds its storage of {storage.size}")
    strides = tuple(s * storage.itemsize for s in stride)
    view = np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), strides, writeable=False)
    return view.copy()
