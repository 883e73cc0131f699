"""Tensors from .npz, .safetensors and .pth files.

None of a file's code runs, and PyTorch is not needed.
"""

from __future__ import annotations

import collections
import math
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from duc_dlc_jax.config import ConfigError


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
