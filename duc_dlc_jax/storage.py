"""Paths on disks and in object stores (`gs://`, `s3://`), and what the latter cannot do.

Everything goes through `etils.epath`, over fsspec in a store. An object store has no append, no
rename and no lock: files that grow are uploaded whole (`Lines`), a folder is complete once its
marker is there (`checkpoints`), and nothing keeps two runs out of one workdir.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging
from etils import epath
from etils.epath import gpath

from duc_dlc_jax.config import ConfigError

PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}  # fsspec's file systems
UPLOAD_EVERY = 30.0  # seconds between uploads of a file that grows; stores allow one a second

# Of TensorStore's and fsspec's errors: the store is at fault, not what lies in it.
_TROUBLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED")
_ERRORS = (  # that are no OSError; of modules that are in use
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
)


def is_remote(path: Any) -> bool:
    """Whether a path lies in an object store."""
    return "://" in str(path)


def path(text: str | os.PathLike) -> epath.Path:
    """The path, on a disk or in an object store.

    Raises ConfigError for another store, and where the store's package is missing.
    """
    if is_remote(text):
        scheme = str(text).partition("://")[0]
        if scheme not in PACKAGES:
            raise ConfigError(f"{text}: no such object store; allowed: s3://BUCKET, gs://BUCKET")
        _use_fsspec(scheme)
    return epath.Path(text)


@functools.cache
def _use_fsspec(scheme: str) -> None:
    """Lets epath use fsspec, although TensorFlow is installed, and fsspec ask anew each time."""
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise ConfigError(
            f"{scheme}:// needs the package {PACKAGES[scheme]}: pip install 'duc-dlc-jax[cloud]'"
        )
    import fsspec.config

    os.environ["EPATH_USE_TF"] = "false"  # TensorFlow knows no s3://
    gpath._is_tf_installed.cache_clear()  # epath asks once, perhaps before
    for name in (scheme, "gcs"):
        # TensorStore and other processes write there too: a kept listing would be an old one.
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False


def filesystem(path: epath.Path) -> Any:
    """fsspec's file system of a path in an object store."""
    import fsspec

    return fsspec.url_to_fs(str(path))[0]


def local(flag: str, text: str) -> epath.Path:
    """The path that a flag names; raises ConfigError where it is in an object store."""
    if is_remote(text):
        raise ConfigError(f"{flag}={text} must be on a disk: name a folder there and copy it")
    return epath.Path(text)


def absolute(path: epath.Path) -> epath.Path:
    return path if is_remote(path) else path.absolute()


def move(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder; in an object store each object is copied, then deleted."""
    if is_remote(source):
        store, bare = filesystem(source), str(source).partition("://")[2]
        for name in store.find(bare):
            store.cp_file(name, str(target).partition("://")[2] + name.removeprefix(bare))
        store.rm(bare, recursive=True)
    else:
        target.parent.mkdir(exist_ok=True)
        source.rename(target)


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path, which replaces `path` when the block succeeds; on a disk.

    Readers see the whole file or none. The temporary path is the process's own, so that several
    may write the same file; after an exception it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a text in UTF-8, as a `whole_file`."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_text(path: Any, text: str) -> None:
    """Writes a text in UTF-8, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def errors() -> tuple[type[Exception], ...]:
    """What reading and writing may raise."""
    names = [(sys.modules[m], name) for m, name in _ERRORS if m in sys.modules]
    return (OSError, ValueError, *(getattr(module, name) for module, name in names))


def is_trouble(error: BaseException) -> bool:
    """Whether a store did not answer or refused, so that nothing is known of what lies there."""
    others = tuple(kind for kind in errors() if kind is not ValueError)
    return isinstance(error, others) or any(word in str(error) for word in _TROUBLE)


def check(path: Any, write: bool = False, flag: str = "", file: bool = False) -> None:
    """Raises ConfigError unless the object store lists the folder and, for `write`, takes a file.

    On a disk only writing is checked: the folder, or with `file` the file, exists and can be
    written, or can be made. It leaves nothing there. flag: that named the path, for the message.
    """
    if not is_remote(path):
        if write:
            _check_disk(pathlib.Path(path), f"{flag}={path}" if flag else str(path), file)
        return
    path = epath.Path(path).parent if file else epath.Path(path)
    bucket = "/".join(str(path).split("/")[:3])
    try:
        _list(path, bucket)
        if write:
            probe = path / ".writable"
            probe.write_text("")
            probe.unlink()
    except errors() as error:
        raise ConfigError(f"{path} cannot be used: {_reason(error, bucket)}") from error


def _check_disk(path: pathlib.Path, what: str, file: bool) -> None:
    if path.exists() and path.is_dir() == file:
        raise ConfigError(f"{what} is a {'folder' if file else 'file'}; give another path")
    if file and path.exists():
        if not os.access(path, os.W_OK):
            raise ConfigError(f"{what} cannot be written: its permissions forbid it")
        return
    folder = path.parent if file else path
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # not for good
            raise
        reason = f"no file can be written in {folder} ({error.strerror})"
        raise ConfigError(f"{what} cannot be written: {reason}; give another path") from error


def _list(path: epath.Path, bucket: str) -> None:
    try:
        filesystem(path).ls(str(path))
    except FileNotFoundError:  # of a new folder, and of a bucket that is not there
        filesystem(path).ls(bucket)


def _reason(error: Exception, bucket: str) -> str:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return f"there is no bucket {bucket}. Create it, or name another"
    if isinstance(error, PermissionError):
        return f"{bucket} refuses access ({text}). Check the credentials and their rights"
    return f"{text}. Check the network, the endpoint and the credentials"


class Lines:
    """A text file that grows by lines.

    On a disk each line is there at once. An object cannot grow: it is uploaded anew by `flush`,
    `close`, and by `write` after some seconds. An upload that fails is one warning, and the next
    one has its lines too.
    """

    def __init__(
        self,
        path: epath.Path,
        kept: Sequence[str] | None = None,
        every: float = UPLOAD_EVERY,
    ):
        """kept: the lines that stay of an earlier file; None: all. every: seconds, in a store."""
        self._path, self._every, self._file, self._changed = path, every, None, False
        if not is_remote(path):
            if kept is not None:
                path.write_text(_joined(kept), encoding="utf-8")
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
            return
        self._text = read(path) if kept is None else _joined(kept)
        self._uploaded = time.monotonic()

    def write(self, line: str) -> None:
        if self._file:
            self._file.write(line + "\n")
            self._file.flush()
            return
        self._text += line + "\n"
        self._changed = True
        if time.monotonic() - self._uploaded >= self._every:
            self.flush()

    def flush(self) -> None:
        if not self._changed:
            return
        self._uploaded = time.monotonic()
        try:
            self._path.write_bytes(self._text.encode())
            self._changed = False
        except errors() as error:
            logging.warning("%s is behind, it cannot be uploaded: %s", self._path, error)

    def close(self) -> None:
        if self._file:
            self._file.close()
        self.flush()


def read(path: epath.Path) -> str:
    """The text of a file, "" where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def json_lines(text: str) -> list[dict[str, Any]]:
    """The objects of a text of JSON lines, but for one that a killed process left incomplete."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _joined(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def cache_dir() -> pathlib.Path:
    """$DUC_DLC_CACHE, or ~/.cache/duc_dlc_jax."""
    return pathlib.Path(os.environ.get("DUC_DLC_CACHE") or "~/.cache/duc_dlc_jax").expanduser()


def sha256(path: pathlib.Path) -> str:
    """That of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
