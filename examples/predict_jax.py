"""A mask by a bundle's StableHLO model: needs jax, numpy, pillow, nothing of this project.

python predict_jax.py BUNDLE IMAGE MASK.png
"""

import json
import pathlib
import sys

import jax
import numpy as np
from jax import export
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000


def read_image(path: str) -> np.ndarray:
    """RGB uint8 [H, W, 3], turned as its EXIF orientation says."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                sys.exit(f"{path}: {image.width}x{image.height}, more than {MAX_PIXELS:,} pixels")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        sys.exit(f"{path}: not a readable image: {error}")


def model_input(image: np.ndarray, wanted: dict) -> np.ndarray:
    """[1, H, W, 3] as the bundle's `input` says."""
    height, width = image.shape[:2]
    if wanted["height"] not in ("any", height) or wanted["width"] not in ("any", width):
        sys.exit(f"{width}x{height}; the model takes {wanted['width']}x{wanted['height']} alone")
    if min(height, width) < wanted["min_side"]:
        sys.exit(f"{width}x{height}; the model takes sides from {wanted['min_side']} pixels on")
    if wanted["dtype"] == "float32":
        scaled = image.astype(np.float32) / 255 - np.float32(wanted["mean"])
        image = scaled / np.float32(wanted["std"])
    return image[None]


def main(bundle: str, source: str, target: str) -> None:
    folder = pathlib.Path(bundle)
    for name in ("bundle.json", "model.stablehlo"):
        if not (folder / name).is_file():
            sys.exit(f"{bundle}: {name} is missing; give a bundle that holds it")
    if pathlib.Path(target).suffix.lower() != ".png":
        sys.exit(f"{target}: a mask is a .png; other formats would change its classes")
    manifest = json.loads((folder / "bundle.json").read_text())
    image = model_input(read_image(source), manifest["input"])
    model = export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    output = np.asarray(jax.jit(model.call)(image))[0]
    ids = output if output.ndim == 2 else output.argmax(-1).astype(np.uint8)
    mask = Image.fromarray(ids)
    mask.putpalette(np.asarray(manifest["labels"]["palette"], np.uint8).tobytes())
    mask.save(target)
    names = [manifest["labels"]["classes"][i] for i in np.unique(ids)]
    print(f"{target}: {ids.shape[1]}x{ids.shape[0]}, {', '.join(names)}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
