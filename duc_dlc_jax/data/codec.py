"""Bytes to arrays and back. Images: OpenCV, RGB order. Masks: Pillow, indices as stored.

EXIF policy, in every decoder: an image is turned the way its EXIF orientation says (OpenCV's and
viewers' default); a mask is taken as it lies, and must have the size of the turned image.
"""

from __future__ import annotations

import io
import pathlib

import cv2
import numpy as np
from PIL import Image, ImageOps

from duc_dlc_jax.data.labels import DataError

_PNG = b"\x89PNG\r\n\x1a\n"


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes PNG or JPEG bytes to RGB uint8 [H, W, 3], EXIF orientation applied.

    Raises:
      DataError: the bytes are no image; names it.
    """
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise DataError(f"{name}: {len(data)} bytes that are not a readable PNG or JPEG image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def decode_label(data: bytes, name: str) -> np.ndarray:
    """Decodes a prepared label (8-bit grey PNG of train ids) to uint8 [H, W]."""
    try:
        with Image.open(io.BytesIO(data)) as label:
            return np.array(label, np.uint8)
    except OSError as error:
        raise DataError(f"{name}: its label is not a readable PNG: {error}") from error


def encode_png(array: np.ndarray) -> bytes:
    """Encodes RGB uint8 [H, W, 3] or ids uint8 [H, W] as PNG bytes, losslessly."""
    pixels = array if array.ndim == 2 else cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    ok, data = cv2.imencode(".png", pixels)
    if not ok:
        raise DataError(f"an array of {array.dtype} {array.shape} could not be encoded as PNG")
    return data.tobytes()


def read_image_file(path: pathlib.Path) -> tuple[bytes, int, int]:
    """Reads an image file once and decodes it fully, so that a bad one is found when preparing.

    Returns:
      Its bytes, and height and width in pixels after EXIF orientation.

    Raises:
      DataError: unreadable, truncated or 16-bit; names the file.
    """
    data = path.read_bytes()
    if data.startswith(_PNG) and data[24] == 16:
        raise DataError(f"{path}: a 16-bit PNG; images must have 8 bits a channel")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in ("PNG", "JPEG"):
                raise DataError(f"{path}: a {image.format} image; allowed: PNG, JPEG")
            image.load()
            width, height = ImageOps.exif_transpose(image).size
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path}: unreadable or truncated image: {error}") from error
    return data, height, width


def read_mask_file(path: pathlib.Path) -> np.ndarray:
    """Reads a mask of raw ids, grey or palette PNG of at most 8 bits, as uint8 [H, W].

    Raises:
      DataError: unreadable, 16-bit, or colours where ids are expected; names the file.
    """
    try:
        with Image.open(path) as mask:
            mask.load()
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path}: unreadable or truncated mask: {error}") from error
    if mask.mode.startswith(("I", "F")):
        raise DataError(f"{path}: a 16-bit mask (mode {mask.mode}); ids must be stored in 8 bits")
    if mask.mode not in ("L", "P", "1"):
        raise DataError(
            f"{path}: a colour mask (mode {mask.mode}) where class ids are expected; "
            "use the PNGs whose pixel values are ids (modes L and P)"
        )
    return np.array(mask).astype(np.uint8)
