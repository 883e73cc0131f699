"""Records in an object store are copied to this machine: array_record reads from disks alone.

`prepare` writes a manifest beside the records: the size and SHA-256 of every file. What a process
needs of them is copied into a folder named after the manifest, which all processes of the machine
share. A copy that was broken off goes on where it stopped; a file gets its name when its checksum
is right.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import logging
from etils import epath

from duc_dlc_jax import storage
from duc_dlc_jax.data.labels import DataError
from duc_dlc_jax.data.threads import in_order
from duc_dlc_jax.progress import LOG_EVERY, Progress

MANIFEST = "manifest.json"  # {file: {"size": bytes, "sha256": hex}}, written after all others
VERIFIED = ".verified.json"  # of the copy: {file: [size, mtime in ns]} when its checksum was right
PART = ".part"  # ending of a file that is not complete
BLOCK = 2**23  # bytes a request
THREADS = 4  # files at a time
TRIALS = 3  # of a request, and of a file whose checksum is wrong


def write_manifest(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Writes the manifest of a folder of records, and returns it."""
    paths = sorted(
        p for p in folder.iterdir() if p.is_file() and p.name not in (MANIFEST, VERIFIED)
    )
    files = {p.name: {"size": p.stat().st_size, "sha256": storage.sha256(p)} for p in paths}
    storage.write_whole(folder / MANIFEST, json.dumps(files, indent=1) + "\n")
    return files


def read_manifest(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """Raises FileNotFoundError where there is none, DataError where it is none of ours."""
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(
            f"{folder / MANIFEST} is missing: prepare into the store (--data_dir), or repeat "
            "`prepare` on the folder that was uploaded, which adds it, and upload it last"
        )
    try:
        files = json.loads((folder / MANIFEST).read_text())
        return {
            str(name): {"size": int(f["size"]), "sha256": f["sha256"]} for name, f in files.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{folder / MANIFEST} is no manifest: {error}") from error


def upload(folder: pathlib.Path, target: epath.Path) -> None:
    """Copies prepared records into an object store, the manifest last."""
    files = write_manifest(folder)
    total = sum(f["size"] for f in files.values())
    with _progress(total, f"to {target}: MB") as add:

        def put(name: str) -> None:
            source, there = str(folder / name), f"{target}/{name}"
            _tried(there, lambda: storage.filesystem(target).put_file(source, there))
            add(files[name]["size"])

        for _ in in_order(put, files, THREADS):
            pass
    (target / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())


def staged(remote: epath.Path, splits: Iterable[str], where: str = "") -> pathlib.Path:
    """The folder on this machine with what the splits need, copied where it is not there yet.

    remote: of one prepared data set; where: folder of all copies, "" takes the user's cache.

    Raises FileNotFoundError without a manifest; DataError where the disk is too small, and for a
    file that cannot be copied or is not what `prepare` wrote.
    """
    files = read_manifest(remote)
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    name = f"{remote.parent.name}-{digest}"
    if where:
        copies = pathlib.Path(storage.local("config.data.staging_dir", where)).expanduser()
    else:
        copies = storage.cache_dir() / "records"
    folder = copies / name / remote.name
    needed = _pattern(remote.parent.name, splits)
    wanted = {n: f for n, f in files.items() if needed.fullmatch(n)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _copy(remote, folder, wanted)
    except OSError as error:
        raise DataError(f"{remote} cannot be copied to {folder}: {_sentence(error)}") from error
    return folder


def _pattern(name: str, splits: Iterable[str]) -> re.Pattern[str]:
    """Of the files that belong to one of the splits, or to none."""
    these = "|".join(re.escape(split) for split in splits)
    return re.compile(
        rf"index-({these})\.npz|{re.escape(name)}-({these})\.array_record.*|"
        r"(?!index-)(?!.*\.array_record).*"
    )


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with this process at the latest."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("another process copies records to %s; waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _copy(remote: epath.Path, folder: pathlib.Path, files: dict[str, dict[str, Any]]) -> None:
    verified = _read_verified(folder)
    missing = [n for n, f in files.items() if not _is_there(folder / n, f, verified)]
    if not missing:
        return
    total = sum(files[n]["size"] for n in missing)
    done = sum(_size(folder / (n + PART)) for n in missing)
    free = shutil.disk_usage(folder).free
    if total - done > free:
        raise OSError(
            errno.ENOSPC, f"{(total - done) / 2**20:,.0f} MiB are needed, {_free(folder)}"
        )
    logging.info("%d files of %s are copied to %s", len(missing), remote, folder)
    with _progress(total, f"records of {remote.parent.name}: MB") as add:
        for _ in in_order(
            lambda name: _fetch(remote, folder, name, files[name], add), missing, THREADS
        ):
            pass
    verified |= {n: _stamp(folder / n) for n in missing}
    storage.write_whole(folder / VERIFIED, json.dumps(verified))


def _is_there(path: pathlib.Path, file: dict[str, Any], verified: dict[str, list[int]]) -> bool:
    """Whether a copy is right: untouched since its checksum was, or by its checksum now.

    What changes on the disk by itself, array_record's own checksums tell when it is read.
    """
    if _size(path) != file["size"]:
        return False
    return verified.get(path.name) == _stamp(path) or storage.sha256(path) == file["sha256"]


def _fetch(
    remote: epath.Path,
    folder: pathlib.Path,
    name: str,
    file: dict[str, Any],
    add: Callable[[int], None],
) -> None:
    """Copies one file, from where an earlier call stopped; raises DataError if it stays wrong."""
    store, source, part = storage.filesystem(remote), f"{remote}/{name}", folder / (name + PART)
    size = file["size"]
    found = _tried(source, lambda: store.info(source)["size"])
    if found != size:
        raise DataError(f"{source} has {found} bytes instead of {size}: upload the records again")
    for trial in range(TRIALS):
        with open(part, "ab") as target:
            if target.tell() > size:
                target.truncate(0)
            add(target.tell() if trial == 0 else 0)
            while (start := target.tell()) < size:
                end = min(start + BLOCK, size)
                block = _tried(
                    source, lambda s=start, e=end: store.cat_file(source, start=s, end=e)
                )
                target.write(block)
                add(len(block) if trial == 0 else 0)
        if _size(part) == size and storage.sha256(part) == file["sha256"]:
            part.replace(folder / name)
            return
        logging.warning("%s has another SHA-256 than in %s: copied again", source, MANIFEST)
        part.unlink()
    raise DataError(
        f"{source} has another SHA-256 than in {MANIFEST}, {TRIALS} times: upload the records again"
    )


def _tried(name: str, request: Callable[[], Any]) -> Any:
    """The request's answer, tried up to `TRIALS` times; a failure is an OSError with the name."""
    for trial in range(TRIALS):
        try:
            return request()
        except storage.errors() as error:
            if isinstance(error, FileNotFoundError | PermissionError) or trial == TRIALS - 1:
                raise OSError(f"{name}: {error or type(error).__name__}") from error
            time.sleep(2**trial)
    raise AssertionError


@contextlib.contextmanager
def _progress(total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yields a function that counts bytes from any thread."""
    line, lock, done, last = (
        Progress(round(total / 1e6), unit),
        threading.Lock(),
        0,
        time.monotonic(),
    )

    def add(count: int) -> None:
        nonlocal done, last
        with lock:
            done += count
            log = time.monotonic() - last > LOG_EVERY or done == total
            last = time.monotonic() if log else last
            line.show(round(done / 1e6), "", log)

    yield add


def _read_verified(folder: pathlib.Path) -> dict[str, list[int]]:
    try:
        return json.loads((folder / VERIFIED).read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _stamp(path: pathlib.Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _free(folder: pathlib.Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free"


def _sentence(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        reason = error.strerror or "the disk is full"
        return f"{reason}. Make room, or set data.staging_dir to a folder on another disk"
    return str(error)
