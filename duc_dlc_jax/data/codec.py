"""Bytes to arrays and back. Images: OpenCV, RGB order. Masks: Pillow, values as stored.

EXIF policy: OpenCV decides. It turns an image the way its EXIF orientation says, and passes over
that of XMP, which Pillow heeds; a mask is taken as it lies, and must have the size of the turned
image.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from duc_dlc_jax.data.labels import DataError

BAD_IMAGE, BAD_MASK, MODE = "unreadable image", "unreadable mask", "mode"  # kinds of DataError
_PNG = b"\x89PNG\r\n\x1a\n"
_GREY = 0  # colour type of a PNG's header
_KINDS = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg"}  # MPO: with more pictures behind the first
_ORIENTATION, _DEPTH = 274, 258  # tags of EXIF and TIFF


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes the bytes of an image file to RGB uint8 [H, W, 3], EXIF orientation applied.

    Raises:
      DataError: the bytes are no image, or one that OpenCV does not decode; names it.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    except cv2.error as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: not decoded by OpenCV: {reason}") from error
    if image is None:
        raise DataError(
            f"{name}: {len(data)} bytes that are not a readable image "
            f"(PNG, JPEG, WebP, BMP or TIFF{_too_deep(data)})"
        )
    return image


def _too_deep(data: bytes) -> str:
    """Says the depth of a TIFF file that has more than 16 bits a channel."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
        bits = max(getattr(image, "tag_v2", {}).get(_DEPTH, (8,)))
        return f" of 8 or 16 bits a channel; it has {bits}" if bits > 16 else ""
    return ""


def encode_image(image: np.ndarray, encoding: str) -> bytes:
    """Encodes RGB uint8 [H, W, 3] as "raw" pixels, "png" or "jpeg" of quality 95."""
    if encoding == "raw":
        return image.tobytes()
    options = {"png": [cv2.IMWRITE_PNG_COMPRESSION, 3], "jpeg": [cv2.IMWRITE_JPEG_QUALITY, 95]}
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    ok, data = cv2.imencode("." + encoding, pixels, options[encoding])
    if not ok:
        raise DataError(f"an array of {image.dtype} {image.shape} could not be encoded")
    return data.tobytes()


def check_image(data: bytes, name: str) -> tuple[str, np.ndarray]:
    """Decodes an image file by `decode_image`, once Pillow found it whole; OpenCV would not say.

    Returns:
      "png" or "jpeg", and the image, RGB uint8 [H, W, 3].

    Raises:
      DataError: unreadable, truncated or 16-bit; names the file.
    """
    bits, _ = png_header(data) or (8, None)
    if bits == 16:
        raise DataError(f"{name}: a 16-bit PNG; images must have 8 bits a channel", MODE)
    with _opened(data, f"{name}: unreadable or truncated image", BAD_IMAGE) as image:
        kind = _KINDS.get(image.format or "")
        if kind is None:
            raise DataError(f"{name}: a {image.format} image; allowed: PNG, JPEG", MODE)
        image.load()
    return kind, decode_image(data, name)


def exif_orientation(image: Image.Image) -> int:
    """Returns the orientation by which `decode_image` turns a file that Pillow opened, 1 to 8.

    1, upright, without one; for TIFF, too, which Pillow turns itself.
    """
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        value = exif.get(_ORIENTATION, 1)
    except Exception:  # Pillow raises what it meets; OpenCV passes over EXIF that it cannot read
        return 1
    return value if value in range(1, 9) else 1


def png_header(data: bytes) -> tuple[int, int] | None:
    """Returns bits a channel and colour type of a PNG file; None of others and of shorter ones."""
    return (data[24], data[25]) if data.startswith(_PNG) and len(data) > 25 else None


def read_mask(data: bytes, name: str, colours: bool = False) -> np.ndarray:
    """Decodes a mask file to raw ids [H, W] exactly as stored.

    Args:
      data: of a PNG, or of a .mat file with the array LabelMap (PASCAL-Context's originals).
      name: for messages.
      colours: the mask is a picture whose colours are the ids: int32, 0xRRGGBB. Otherwise ids are
        grey levels or palette indices: uint8, or uint16 from 16-bit PNGs and .mat files.

    Raises:
      DataError: unreadable, or colours where ids are expected or the reverse; names the file.
    """
    if name.endswith(".mat"):
        return _read_label_map(data, name)
    bits, kind = png_header(data) or (8, None)
    with _opened(data, f"{name}: unreadable or truncated mask", BAD_MASK) as mask:
        mask.load()
        if colours:
            if bits == 16:
                raise DataError(f"{name}: 16 bits a channel; colours must have 8", MODE)
            return _colours(mask, name)
    if mask.mode in ("I;16", "I;16B", "I"):
        return np.array(mask).astype(np.uint16)
    if mask.mode not in ("L", "P", "1"):
        raise DataError(
            f"{name}: a colour mask (mode {mask.mode}) where class ids are expected; "
            "use the PNGs whose pixel values are ids (modes L and P)",
            MODE,
        )
    ids = np.array(mask).astype(np.uint8)
    if kind == _GREY and bits in (2, 4):
        ids //= 255 // (2**bits - 1)  # Pillow stretches them to 0..255
    return ids


@contextlib.contextmanager
def _opened(data: bytes, what: str, kind: str) -> Iterator[Image.Image]:
    """Yields an opened image file; Pillow's errors become DataErrors that begin with `what`."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()  # the checksums of a PNG, which loading does not look at
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError as error:
        reason = f"{len(data)} bytes in no known image format"
        raise DataError(f"{what}: {reason}", kind) from error
    except DataError:
        raise
    except Exception as error:  # Pillow raises what it meets: OSError, SyntaxError, ValueError, ...
        raise DataError(f"{what}: {error}", kind) from error


def _colours(mask: Image.Image, name: str) -> np.ndarray:
    if mask.mode == "RGBA":
        if clear := int((np.array(mask)[..., 3] < 255).sum()):
            raise DataError(
                f"{name}: {clear} pixels are transparent, wholly or in part, and name no class by "
                "their colour: save the mask as RGB, without transparency",
                MODE,
            )
        mask = mask.convert("RGB")
    if mask.mode not in ("RGB", "P"):
        raise DataError(f"{name}: a mask of mode {mask.mode} where RGB colours are expected", MODE)
    rgb = np.array(mask.convert("RGB")).astype(np.int32)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def _read_label_map(data: bytes, name: str) -> np.ndarray:
    import scipy.io  # late: 0.2 s

    try:
        label = scipy.io.loadmat(io.BytesIO(data), variable_names=["LabelMap"])["LabelMap"]
    except Exception as error:  # scipy raises what it meets: KeyError, TypeError, zlib.error, ...
        raise DataError(f"{name}: no readable array LabelMap: {error!r}", BAD_MASK) from error
    if label.ndim != 2 or label.dtype.kind not in "iu" or label.min(initial=0) < 0:
        found = f"{label.dtype} {label.shape}"
        raise DataError(f"{name}: LabelMap is {found}; ids [H, W] expected", MODE)
    return label.astype(np.uint16)
