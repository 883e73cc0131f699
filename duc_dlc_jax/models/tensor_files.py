"""Tensors from .npz and .safetensors files and from those of `torch.save`: .pth, .pt, .ckpt, .bin.

None of a file's code runs, and PyTorch is not needed.
"""

from __future__ import annotations

import collections
import math
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors.numpy

from duc_dlc_jax.config import ConfigError


def check(path: Path, what: str = "config.init.weights") -> None:
    """Raises FileNotFoundError or ConfigError where there is no file of a type that is read.

    what: the field or flag that names the file, for the message.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{what}={path}: no such file.")
    if path.suffix not in _READERS:
        raise ConfigError(
            f"{path}: weights of type {path.suffix or '(no suffix)'} are not read; "
            f"{what} takes {', '.join(_READERS)}."
        )


def read_tensors(path: str | Path, what: str = "config.init.weights") -> dict[str, np.ndarray]:
    """Every tensor of a file of these types; none of its code runs.

    what: as in `check`. Raises as `check`, and ConfigError for a file that is damaged or holds
    something else.
    """
    path = Path(path)
    check(path, what)
    return _READERS[path.suffix](path)


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


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    """The state dict that `torch.save` wrote, itself or in dicts beside other things."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content = _ZipUnpickler(archive).load()
        else:
            with path.open("rb") as file:
                content = _load_before_zip(file)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise ConfigError(f"{path}: not a state dict of plain tensors: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not a state dict.")
    return {name: value.copy() for name, value in _state_dict(path, content).items()}


def _state_dict(path: Path, content: dict[Any, Any]) -> dict[str, np.ndarray]:
    """The tensors of a dict among the values, if there is one, or else those of `content`.

    Where there are none either, those of a dict in one of the values.
    """
    dicts, own = _dicts(content), _tensors(content)
    if not own and not any(map(_tensors, dicts.values())):
        dicts = {
            f"{outer}.{key}": value
            for outer, values in dicts.items()
            for key, value in _dicts(values).items()
        }
    inner = {key: tensors for key, value in dicts.items() if (tensors := _tensors(value))}
    found = [key for key in ("state_dict", "model") if key in inner][:1] or list(inner)
    if len(found) == 1:
        return inner[found[0]]
    if found:
        raise ConfigError(
            f"{path}: holds tensors under {', '.join(map(str, found))}. Save those that are meant "
            "alone, or under state_dict or model."
        )
    if not own:
        keys = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise ConfigError(f"{path}: holds no state dict, and no tensor; its keys: {keys}.")
    return own


def _dicts(content: dict[Any, Any]) -> dict[Any, dict[Any, Any]]:
    return {key: value for key, value in content.items() if isinstance(value, dict)}


def _tensors(content: dict[Any, Any]) -> dict[str, np.ndarray]:
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    return {name: value for name, value in named.items() if isinstance(value, np.ndarray)}


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors in ordinary containers; every other global is refused by name.

    The globals it resolves are stand-ins made here for each file, so that nothing of the process is
    within the pickle's reach. Tensors are read-only views of their storages.
    """

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
            f"it asks for {module}.{name}, which is not a tensor; nothing of it was run. Where "
            "PyTorch and what the file asks for are installed, and if its source is trusted, save "
            "the tensors alone: checkpoint = torch.load(OLD, map_location='cpu', "
            "weights_only=False); torch.save(checkpoint['state_dict'], NEW)"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        """('storage', type, key, location, elements, ...) -> flat array of the storage."""
        kind, storage, key, _, count, *rest = pid
        if kind != "storage" or not isinstance(storage, _StorageType) or any(rest):
            raise pickle.UnpicklingError(f"unknown record {kind!r}")
        return self.storage(key, np.dtype(_STORAGES[storage]), count)

    def storage(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        """Only the pickle of the state dict has any; its readers override this."""
        raise pickle.UnpicklingError(f"storage {key} is outside the state dict")


class _ZipUnpickler(_TensorUnpickler):
    """The format since PyTorch 1.6: an archive with a pickle and a file per storage."""

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

    def storage(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        entry = self._archive.getinfo(f"{self._folder}data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != count * dtype.itemsize:
            raise pickle.UnpicklingError(
                f"storage {key} has {entry.file_size} bytes, {count} x {dtype} need "
                f"{count * dtype.itemsize}, uncompressed"
            )
        flat = np.frombuffer(self._archive.read(entry), f"u{dtype.itemsize}")
        return (flat.byteswap() if self._swap else flat).view(dtype)


ZIP = b"PK\x03\x04"  # the first bytes of an archive
MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file from before PyTorch 1.6


class _StreamUnpickler(_TensorUnpickler):
    """The format before PyTorch 1.6: pickles one after the other, then the storages' bytes."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, np.ndarray] = {}
        self._left = os.fstat(file.fileno()).st_size  # bytes that storages can have in all

    def storage(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        """Room for the storage; what it holds comes after the pickles."""
        if key not in self.storages:
            self._left -= count * dtype.itemsize
            if count < 0 or self._left < 0:
                raise pickle.UnpicklingError(f"storage {key} is larger than the file")
            self.storages[key] = np.zeros(count, dtype)
        found = self.storages[key]
        if found.dtype != dtype or found.size != count:
            raise pickle.UnpicklingError(f"storage {key} has two types")
        return found


def _load_before_zip(file: BinaryIO) -> Any:
    if file.read(len(ZIP)) == ZIP:
        raise pickle.UnpicklingError("truncated: the end of the archive is missing")
    file.seek(0)
    if _TensorUnpickler(file).load() != MAGIC or _TensorUnpickler(file).load() != 1001:
        raise pickle.UnpicklingError(
            "neither of the formats that torch.save writes. Where PyTorch is installed: "
            "torch.save(torch.load(OLD, map_location='cpu', weights_only=True), NEW)"
        )
    system = _TensorUnpickler(file).load()
    content = _StreamUnpickler(file)
    loaded, keys = content.load(), _TensorUnpickler(file).load()
    if sorted(keys) != sorted(content.storages):
        raise pickle.UnpicklingError(f"{len(content.storages)} storages, {len(keys)} are listed")
    order = "<" if system.get("little_endian", True) else ">"
    for key in keys:
        storage = content.storages[key]
        count = int.from_bytes(file.read(8), "little" if order == "<" else "big")
        data = file.read(storage.nbytes)
        if count != storage.size or len(data) != storage.nbytes:
            raise pickle.UnpicklingError(f"storage {key} has {len(data)} of {storage.nbytes} bytes")
        width = storage.dtype.itemsize
        storage.view(f"u{width}")[:] = np.frombuffer(data, f"{order}u{width}")
    return loaded


class _StorageType(str):
    """Name of a PyTorch storage class, standing for the class itself."""


def _rebuild(storage, offset, size, stride, *_) -> np.ndarray:
    """A tensor as a view of the flat `storage`; offset and strides in elements."""
    if not isinstance(storage, np.ndarray):
        raise pickle.UnpicklingError("a tensor without a storage")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    count = math.prod(size)
    if min((offset, *size, *stride), default=0) < 0 or (count and last >= storage.size):
        raise pickle.UnpicklingError(f"tensor of size {size} reaches beyond its storage")
    if count > storage.size:  # an expanded tensor: its copy could be of any size
        raise pickle.UnpicklingError(f"tensor of size {size} exceeds its storage of {storage.size}")
    strides = tuple(s * storage.itemsize for s in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), strides, writeable=False)


_READERS = {".npz": _read_npz, ".safetensors": _read_safetensors}
_READERS |= dict.fromkeys((".pth", ".pt", ".ckpt", ".bin"), _read_torch)
