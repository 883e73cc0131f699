"""Pretrained weights by name: where each file comes from, and a cache of verified files.

A name of `TABLE` stands for a file at its owner's address. It is downloaded once to `cache_dir`, by
one process of a host while the others wait, and its SHA-256 is checked at every use. Owners publish
the first 8 hex digits of it in the file's name; where the table has all 64 they are those that
several public projects state for the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from duc_dlc_jax import storage
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.progress import Progress

SUFFIXES = (".npz", ".safetensors", ".pth")  # of files that are read
BLOCK, TIMEOUT = 2**20, 30  # bytes at a time; seconds without any


@dataclasses.dataclass(frozen=True)
class Weights:
    """A file of weights, where it is, and whose it is.

    Attributes:
      url: the owner's official address; its last part names the file.
      sha256: the first hex digits of the file's SHA-256, 8 to 64 of them.
      source: of `pretrained.SOURCES`.
      owner: who trained and publishes it.
      licence: of the file, as its owner states it.
      data: what it was trained on; the data's terms may bind its use as well.
      classes: name of the label specification of a whole segmenter; "" for a backbone.
    """

    url: str
    sha256: str
    source: str
    owner: str
    licence: str
    data: str = "ImageNet-1k"
    classes: str = ""

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]


def _torchvision(file: str, sha256: str, **fields: str) -> Weights:
    url = f"https://download.pytorch.org/models/{file}"
    return Weights(url, sha256, "torchvision", "PyTorch's torchvision", "BSD-3-Clause", **fields)


def _timm(path: str, sha256: str) -> Weights:
    url = f"https://github.com/rwightman/{path}"
    return Weights(url, sha256, "timm", "timm, Ross Wightman", "Apache-2.0")


_COCO = {"data": "COCO's images of PASCAL VOC's classes, from an ImageNet-1k backbone"}
_GLUON = "pytorch-pretrained-gluonresnet/releases/download/v0.1"  # GluonCV's, converted
TABLE = {
    "resnet50": _torchvision(
        "resnet50-0676ba61.pth", "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a"
    ),
    "resnet50_v2": _torchvision(
        "resnet50-11ad3fa6.pth", "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca"
    ),
    "resnet101": _torchvision(
        "resnet101-63fe2227.pth", "63fe2227b86e8f1f2063f43a75c84d195911b6a0eace650907dd3dc62dd49a0a"
    ),
    "resnet101_v2": _torchvision("resnet101-cd907fc2.pth", "cd907fc2"),
    "resnet152": _torchvision("resnet152-394f9c45.pth", "394f9c45"),
    "resnet152_v2": _torchvision("resnet152-f82ba261.pth", "f82ba261"),
    "timm_resnet50_a1": _timm(
        "pytorch-image-models/releases/download/v0.1-rsb-weights/resnet50_a1_0-14fe96d1.pth",
        "14fe96d1f9fb311a60490082d2077e6e60427dcfe21839ddf934cce948f72b0f",
    ),
    "timm_resnet50s": _timm(f"{_GLUON}/gluon_resnet50_v1s-1762acc0.pth", "1762acc0"),
    "timm_resnet101s": _timm(f"{_GLUON}/gluon_resnet101_v1s-60fe0cc1.pth", "60fe0cc1"),
    "timm_resnet152s": _timm(f"{_GLUON}/gluon_resnet152_v1s-dcc41b81.pth", "dcc41b81"),
    "deeplabv3_resnet50": _torchvision(
        "deeplabv3_resnet50_coco-cd0a2569.pth",
        "cd0a25694c4a0f7106b38f4938bf90a874f2f241cc410b8f63c7024399538f06",
        classes="voc",
        **_COCO,
    ),
    "deeplabv3_resnet101": _torchvision(
        "deeplabv3_resnet101_coco-586e9e4e.pth",
        "586e9e4e203fcbf17e1ad45533d8d33ab133fc762bf03101c5dd743995c08c0d",
        classes="voc",
        **_COCO,
    ),
}


def find(
    weights: str | Path, source: str = "", what: str = "config.init.weights"
) -> tuple[Path, str]:
    """The file that `config.init.weights` means, and its source: `source`, or that of the name.

    A name of `TABLE` is downloaded unless the cache has it. Paths have a suffix of `SUFFIXES`.
    what: the field or flag that names the weights, for the messages.

    Raises:
      ConfigError: no such name; another source than the name's; the file cannot be had or is not
        the one it should be. Says what to fetch and where to put it.
    """
    known = TABLE.get(str(weights))
    if known is None:
        if Path(weights).suffix in SUFFIXES or len(Path(weights).parts) > 1:
            return Path(weights).expanduser(), source
        near = difflib.get_close_matches(str(weights), TABLE, 1)
        raise ConfigError(
            f"{what}={weights} is neither a file ({', '.join(SUFFIXES)}) nor a known "
            f"name. {f'Did you mean {near[0]}? ' if near else ''}Names: {', '.join(TABLE)}."
        )
    if source not in ("", known.source):
        raise ConfigError(
            f"{what}={weights} comes from {known.source}, config.init.source is "
            f"{source!r}. Leave config.init.source empty."
        )
    return fetched(str(weights), known, what), known.source


def fetched(name: str, weights: Weights, what: str = "config.init.weights") -> Path:
    """The verified file in the cache, downloaded if it is not there.

    Raises ConfigError as `find`.
    """
    path = storage.cache_dir() / weights.file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path.parent}: {error}. Set DUC_DLC_CACHE to a writable folder"
        ) from error
    with _locked(path):
        if not path.exists():
            _download(name, weights, path, what)
        elif not (digest := storage.sha256(path)).startswith(weights.sha256):
            raise ConfigError(
                f"{path} is not {weights.file} as its owner publishes it, or a part of it: its "
                f"SHA-256 begins with {digest[: len(weights.sha256)]}, not {weights.sha256}. "
                "Delete it, and it is downloaded again."
            )
    logging.info(
        "weights %s: %s, %s, trained on %s, licence %s",
        name, path, weights.owner, weights.data, weights.licence,
    )  # fmt: skip
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the file's lock on this host; where the file system has none, goes on without."""
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(name: str, weights: Weights, path: Path, what: str) -> None:
    """Writes the file under another name, checks it, and then gives it its own."""
    by_hand = (
        f"Fetch {weights.url} on a machine with network and copy it to {path}, or give the file "
        f"itself as {what}."
    )
    try:
        with storage.whole_file(path) as partial:
            size, digest = _copy(name, weights, partial)
            if size is not None and (got := partial.stat().st_size) != size:
                raise ConfigError(
                    f"{weights.url} ended after {got} of {size} bytes. Try again. {by_hand}"
                )
            if not digest.startswith(weights.sha256):
                raise ConfigError(
                    f"what {weights.url} sent is not {weights.file}: its SHA-256 begins with "
                    f"{digest[: len(weights.sha256)]}, not {weights.sha256}. Nothing of it was "
                    "kept."
                )
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{weights.url}: {error}. {by_hand}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"{weights.url} cannot be downloaded: {reason}. {by_hand}") from error


def _copy(name: str, weights: Weights, partial: Path) -> tuple[int | None, str]:
    """Downloads to `partial`; returns the announced size and the SHA-256."""
    digest, done = hashlib.sha256(), 0
    request = urllib.request.Request(weights.url, headers={"User-Agent": "duc-dlc-jax"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, partial.open("wb") as out:
        length = answer.headers.get("Content-Length")
        size = int(length) if length else None
        progress = Progress(-(-(size or 0) // BLOCK), "MiB")
        progress.say(f"downloading {name} from {weights.url} to {partial.parent}")
        while block := answer.read(BLOCK):
            out.write(block)
            digest.update(block)
            done += len(block)
            progress.show(-(-done // BLOCK), weights.file, log=done == size)
    return size, digest.hexdigest()
