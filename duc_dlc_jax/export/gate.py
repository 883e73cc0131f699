"""Does a bundle say what the trained network says? Images, expectations and their comparison.

The reference is the network as trained, BN apart and nothing folded, in float32 with products in
the highest precision. What must hold, with t the tolerance and L the largest absolute logit of the
image: no logit is off by more than t L, and where the class with the highest logit leads by more
than 2 t L the bundle names that class.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import codec
from duc_dlc_jax.data.builders import scenes
from duc_dlc_jax.export import bundle as bundles
from duc_dlc_jax.export import runtimes

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # share of the largest logit
SIZES = ((192, 256), (161, 255), (360, 480))  # height, width in pixels, where any size goes
PHOTOS = (".png", ".jpg", ".jpeg")
LATTICE = 8  # pixels between the logits that a bundle keeps


class GateError(ValueError):
    """The bundle does not answer as the trained network does."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the reference says of a batch.

    ids: uint8 [B, H, W]; decided: bool [B, H, W], where one class leads clearly; logits: float32
    [B, ceil(H / step), ceil(W / step), K], of every step-th pixel; largest: the largest absolute
    logit.
    """

    ids: np.ndarray
    decided: np.ndarray
    logits: np.ndarray
    largest: float
    step: int = 1

    @classmethod
    def of(cls, logits: np.ndarray, tolerance: float) -> Expected:
        """Raises GateError for logits that are not finite."""
        largest = float(np.abs(logits).max())
        if not np.isfinite(largest):
            raise GateError(
                "the trained network's own logits are not finite, so nothing can be compared with "
                "them; `python -m duc_dlc_jax.surgery show` says which of its weights are not"
            )
        leads = [np.diff(np.partition(row, (-2, -1))[..., -2:])[..., 0] for row in logits]
        decided = np.stack(leads) > 2 * tolerance * largest
        return cls(logits.argmax(-1).astype(np.uint8), decided, logits, largest)

    def thinned(self, row: int, step: int = LATTICE) -> Expected:
        """Of one image of the batch, with the logits of every step-th pixel."""
        one = np.s_[row : row + 1]
        logits = self.logits[one, ::step, ::step]
        return Expected(self.ids[one], self.decided[one], logits, self.largest, step)

    def compare(self, output: np.ndarray) -> dict[str, Any]:
        """output: ids uint8 [B, H, W], or logits [B, H, W, K]. Differences as figures.

        `max_difference` (logits alone) is a share of the largest logit, `agreement` one of the
        pixels; `wrong` counts the pixels that were decided and got another class.
        """
        figures: dict[str, Any] = {}
        ids = output
        if output.ndim == 4:
            ids = output.argmax(-1)
            here = output[:, :: self.step, :: self.step].astype(np.float64)
            difference = np.abs(here - self.logits).max() / self.largest
            figures["max_difference"] = float(difference)
        same = ids == self.ids
        figures["agreement"] = float(same.mean())
        figures["wrong"] = int((~same & self.decided).sum())
        return figures


def passes(figures: dict[str, Any], tolerance: float) -> bool:
    """NaN does not pass."""
    return figures["wrong"] == 0 and figures.get("max_difference", 0.0) <= tolerance


def reference(model: Any, variables: Any, images: np.ndarray) -> np.ndarray:
    """Logits float32 [B, H, W, K] of the network as trained, in float32."""
    plain = model.clone(dtype=np.dtype(np.float32))
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(plain.apply)(variables, images))


def pairs(photos: Iterable[np.ndarray], size: tuple[int, int] | None) -> list[np.ndarray]:
    """Batches uint8 [2, H, W, 3] of a photo and a drawn scene, at each size."""
    photos = list(photos)
    sizes = (size,) if size else SIZES
    drawn = [scenes.draw("val", index)[0] for index in range(len(sizes))]
    return [
        np.stack([_covering(photos[i % len(photos)], wanted), _covering(drawn[i], wanted)])
        for i, wanted in enumerate(sizes)
    ]


def _covering(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of an image, enlarged where it is smaller than `size`."""
    scale = max(size[0] / image.shape[0], size[1] / image.shape[1], 1.0)
    if scale > 1:
        height, width = (max(round(n * scale), m) for n, m in zip(image.shape, size, strict=False))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    top, left = ((n - m) // 2 for n, m in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]]


def read_photos(folder: str, count: int) -> list[np.ndarray]:
    """The first images of a folder. Raises FileNotFoundError where there are none."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in PHOTOS)
    if not paths:
        raise FileNotFoundError(f"--images={folder}: none of {', '.join(PHOTOS)} in it")
    return [codec.decode_image(p.read_bytes(), str(p)) for p in paths[:count]]


def platform() -> str:
    """What runs StableHLO in a fresh process: "cpu" or "gpu"."""
    return "cpu" if jax.default_backend() == "tpu" else jax.default_backend()


def run_apart(paths: list[Path], form: str, batches: list[np.ndarray]) -> list[list[np.ndarray]]:
    """The outputs of each bundle's model in a fresh process. Raises GateError where it fails.

    It shares a GPU with this one, and runs on the CPU where this one holds a TPU.
    """
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if platform() != jax.default_backend():
        env["JAX_PLATFORMS"] = platform()
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("inputs.npz", "outputs.npz")]
        arrays: dict[str, Any] = {f"{i}": batch for i, batch in enumerate(batches)}
        np.savez(files[0], **arrays)
        command = [sys.executable, "-m", "duc_dlc_jax.export.runtimes", form, *files]
        command += map(str, paths)
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            raise GateError(f"{form} does not run in a fresh process:\n{done.stderr[-2000:]}")
        with np.load(files[1], allow_pickle=False) as results:
            return [[results[f"{n}/{i}"] for i in range(len(batches))] for n in range(len(paths))]


def check(
    paths: list[Path],
    form: str,
    batches: list[np.ndarray],
    expected: list[Expected],
    tolerance: float,
) -> list[dict[str, Any]]:
    """Figures of each batch, of several bundles of one network together; the first one's count.

    Raises GateError, with the figures, for answers beyond the tolerance.
    """
    figures: list[dict[str, Any]] = [{} for _ in batches]
    for outputs in run_apart(paths, form, batches):
        judged = _judged(form, batches, outputs, expected, tolerance)
        figures = [more | one for one, more in zip(figures, judged, strict=True)]
    return figures


def _judged(form, batches, outputs, expected, tolerance) -> list[dict[str, Any]]:
    figures = [
        {"height": batch.shape[1], "width": batch.shape[2]} | one.compare(output)
        for batch, output, one in zip(batches, outputs, expected, strict=True)
    ]
    if not all(passes(one, tolerance) for one in figures):
        lines = "\n".join(f"  {form} {one}" for one in figures)
        raise GateError(
            f"the {form} model does not answer as the trained network does (tolerance {tolerance} "
            f"of the largest logit, no decided pixel of another class):\n{lines}"
        )
    return figures


# What a bundle keeps of it


def write_check(path: Path, batches: list[np.ndarray], expected: list[Expected]) -> None:
    """Keeps the drawn scene of each batch, whose pictures are anybody's, and its expectation."""
    arrays: dict[str, Any] = {}
    for i, (batch, one) in enumerate(zip(batches, expected, strict=True)):
        kept = one.thinned(1)
        arrays |= {f"image_{i}": batch[1:], f"ids_{i}": kept.ids, f"logits_{i}": kept.logits}
        arrays |= {f"decided_{i}": np.packbits(kept.decided), f"largest_{i}": kept.largest}
    np.savez_compressed(path / bundles.CHECK, **arrays)


def read_check(path: Path) -> tuple[list[np.ndarray], list[Expected]]:
    """Images uint8 [1, H, W, 3] and their expectations, which `write_check` kept."""
    images, expected = [], []
    with np.load(path / bundles.CHECK, allow_pickle=False) as arrays:
        for i in range(sum(name.startswith("image_") for name in arrays.files)):
            images.append(arrays[f"image_{i}"])
            ids = arrays[f"ids_{i}"]
            decided = np.unpackbits(arrays[f"decided_{i}"], count=ids.size).reshape(ids.shape)
            logits, largest = arrays[f"logits_{i}"], float(arrays[f"largest_{i}"])
            expected.append(Expected(ids, decided.astype(bool), logits, largest, LATTICE))
    return images, expected


def verify(path: str | Path, count: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Repeats a bundle's checks here, from what it holds alone: figures by format.

    count: of its images, the first so many; None = all.

    Raises DataError where a byte is not what it was, GateError where an answer is not.
    """
    bundles.check_sums(path)
    bundle = bundles.read(path)
    images, expected = read_check(bundle.path)
    images, expected = images[:count], expected[:count]
    tolerance = bundle.manifest["gate"]["tolerance"]
    figures = {}
    for form in bundle.formats:
        run = runtimes.load(bundle, form)
        try:
            outputs = [run(image) for image in images]
        except Exception as error:  # runtimes raise what they like
            raise GateError(f"{form} does not run: {error}") from error
        figures[form] = _judged(form, images, outputs, expected, tolerance)
    return figures


def tolerance_of(dtype: str) -> float:
    if dtype not in TOLERANCE:
        raise ConfigError(f"--dtype={dtype}; allowed: {', '.join(TOLERANCE)}")
    return TOLERANCE[dtype]
