"""The files of a download, in folders or in the archives they came in."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator

from duc_dlc_jax.data.labels import DataError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


@dataclasses.dataclass(frozen=True)
class File:
    """A file on disk, or a member of a .zip or .tar that is read in place."""

    path: pathlib.Path
    member: str = ""
    start: int = -1  # of a .tar's member in the archive, bytes
    size: int = 0

    def __str__(self) -> str:
        return f"{self.path}!{self.member}" if self.member else str(self.path)

    def read(self) -> bytes:
        """Raises DataError where the archive is damaged; names it."""
        if not self.member:
            return self.path.read_bytes()
        if self.start >= 0:
            with self.path.open("rb") as archive:
                archive.seek(self.start)
                return archive.read(self.size)
        try:
            return _zip(self.path).read(self.member)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            message = f"{self}: damaged archive ({error}); download it again"
            raise DataError(message, "archive") from error


Files = dict[str, File]  # by path below the folder of the download, "/" between the names


@contextlib.contextmanager
def find(raw_dir: pathlib.Path) -> Iterator[Files]:
    """Yields all files of a download: a folder, its archives as if unpacked in it, or one archive.

    What lies unpacked beside an archive comes first; hidden files are passed over. Members of .zip
    and .tar files are read where they are; a .tar.gz allows no random access and is unpacked into a
    temporary folder until the context ends.

    Raises:
      DataError: an archive is unreadable, or has a member that points out of the folder.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(_zip.cache_clear)
        found: Files = {}
        if raw_dir.is_file():
            archives = [raw_dir]
        else:
            found = _files(raw_dir)
            archives = sorted(
                file.path for name, file in found.items() if "/" not in name and _is_archive(name)
            )
        for archive in archives:
            for name, file in _members(archive, stack).items():
                if _is_shown(*name.split("/")):
                    found.setdefault(name, file)
        yield found


def _is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES)


def walk(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the files below a folder by their path there, "/" between the names, in its order.

    Links to folders are followed, but into none that they lie in themselves. Hidden files and
    folders are passed over, and what macOS packs beside the files.
    """
    found = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = pathlib.Path(parent)
        folders[:] = [f for f in folders if _is_shown(f) and not _leads_back(here / f, folder)]
        for name in filter(_is_shown, names):
            found[(here / name).relative_to(folder).as_posix()] = here / name
    return dict(sorted(found.items()))


def _is_shown(*names: str) -> bool:
    return not any(name.startswith(".") or name == "__MACOSX" for name in names)


def _leads_back(path: pathlib.Path, root: pathlib.Path) -> bool:
    """Whether a folder below root is a link to one that was walked through on the way to it."""
    if not path.is_symlink():
        return False
    way = [root, *(p for p in path.parents if p.is_relative_to(root))]
    return any(p.resolve().is_relative_to(path.resolve()) for p in way)


def _files(folder: pathlib.Path) -> Files:
    return {name: File(path) for name, path in walk(folder).items()}


def _members(archive: pathlib.Path, stack: contextlib.ExitStack) -> Files:
    name = archive.name.lower()
    try:
        if name.endswith(".zip"):
            return _zip_members(archive)
        if name.endswith(".tar"):
            with tarfile.open(archive) as tar:
                members = [m for m in tar if _is_regular(m, archive)]
                return {
                    _inside(m.name, archive): File(archive, m.name, m.offset_data, m.size)
                    for m in members
                }
        if name.endswith((".tar.gz", ".tgz")):
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with tarfile.open(archive) as tar:
                for member in tar:
                    if _is_regular(member, archive):
                        _inside(member.name, archive)
                        tar.extract(member, folder, filter="data")
            return _files(folder)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DataError(
            f"{archive}: unreadable or incomplete archive ({error}); download it again"
        ) from error
    raise DataError(f"{archive} is neither a folder nor an archive ({', '.join(ARCHIVES)})")


def _zip_members(archive: pathlib.Path) -> Files:
    found = {}
    for info in _zip(archive).infolist():
        if info.is_dir():
            continue
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise DataError(f"{archive}: member {info.filename!r} is a link or device; refused")
        found[_inside(info.filename, archive)] = File(archive, info.filename)
    return found


def _is_regular(member: tarfile.TarInfo, archive: pathlib.Path) -> bool:
    if member.isdir():
        return False
    if not member.isreg():
        raise DataError(f"{archive}: member {member.name!r} is a link or device; refused")
    return True


def _inside(name: str, archive: pathlib.Path) -> str:
    """Returns a member's path without "./"; raises DataError where it leaves the folder."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
        raise DataError(f"{archive}: member {name!r} points out of its folder; refused")
    return "/".join(part for part in parts if part not in ("", "."))


@functools.lru_cache(maxsize=16)
def _zip(path: pathlib.Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)
