"""`python -m duc_dlc_jax.predict --model=WORKDIR --input=FILE_OR_DIR --output=DIR`.

Per image NAME: `ids/NAME.png` (train ids, palette kept), `colour/NAME.png` and `overlay/NAME.png`.
Images are taken at their own size, turned as their EXIF orientation says.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from duc_dlc_jax import cli, pictures, workdirs
from duc_dlc_jax.data import codec
from duc_dlc_jax.data.labels import DataError, LabelSpec
from duc_dlc_jax.models.segmenter import Segmenter

EXTENSIONS = (".png", ".jpg", ".jpeg")


def make_predictor(model: Segmenter, variables: dict[str, Any]):
    """Returns image uint8 RGB [H, W, 3] -> train ids uint8 [H, W]; compiles once per size."""

    @jax.jit
    def ids(variables, image):
        logits: Any = model.apply(variables, image[None])
        return logits.argmax(-1)[0].astype(jnp.uint8)

    return lambda image: np.asarray(ids(variables, image))


def find_images(path: Path) -> list[Path]:
    """The file, or the images below the folder in order of their names.

    Raises FileNotFoundError where there is no such path or no image.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"--input={path}: no such file or folder")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise FileNotFoundError(f"--input={path}: no image below it ({', '.join(EXTENSIONS)})")
    return found


def write_prediction(folder: Path, name: str, image: np.ndarray, ids: np.ndarray, spec: LabelSpec):
    for kind in ("ids", "colour", "overlay"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    pictures.write_ids(folder / "ids" / name, ids, spec)
    Image.fromarray(spec.colourise(ids)).save(folder / "colour" / name)
    Image.fromarray(pictures.overlay(image, ids, spec)).save(folder / "overlay" / name)


def main(_) -> None:
    args = flags.FLAGS
    cli.use_compilation_cache(Path(args.model))
    source, output = Path(args.input), Path(args.output)
    paths = find_images(source)
    run = workdirs.load(args.model, args.checkpoint)
    predict = make_predictor(run.model, run.variables)
    unreadable, start = [], time.monotonic()
    for number, path in enumerate(paths, 1):
        relative = path.relative_to(source) if source.is_dir() else Path(path.name)
        try:
            image = codec.decode_image(path.read_bytes(), str(path))
        except (DataError, OSError) as error:
            unreadable.append(str(error))
            continue
        name = pictures.file_name(str(relative.with_suffix(""))) + ".png"
        write_prediction(output, name, image, predict(image), run.spec)
        print(f"{number}/{len(paths)}  {relative}", flush=True)
    seconds = time.monotonic() - start
    done = len(paths) - len(unreadable)
    print(f"{done} images in {seconds:.1f} s; masks, colours and overlays in {output}")
    if unreadable:
        sys.exit("\n".join([f"{len(unreadable)} images could not be read:", *unreadable]))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "The workdir of a run.", required=True)
    flags.DEFINE_string("input", None, "An image, or a folder of images.", required=True)
    flags.DEFINE_string("output", None, "Folder for the results.", required=True)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step.")
    cli.run(main)
