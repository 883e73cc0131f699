"""Pictures of a data set, drawn with Pillow: a contact sheet with its legend, a class balance."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from duc_dlc_jax.data.labels import IGNORE, LabelSpec

# All lengths in pixels.
SIDE, PAIR = 320, 642  # of the square that a photo or label is fitted into; width of both
GAP, MARGIN = 16, 24
TEXT, TITLE, ROW = 15, 22, 22  # font sizes; height of a legend's row
SWATCH = (26, 14)
BAR, BARS, FIGURE = 11, 300, 64  # thickness of a bar, length of 100%, room for its number
ROWS = 52  # classes in a column of the plot, at most
PAPER, INK, FAINT, LINE = (255, 255, 255), (32, 33, 36), (150, 150, 150), (222, 222, 222)
HATCH = ((236, 236, 236), (168, 168, 168))
SPLIT_COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167))


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a contact sheet shows of one example: RGB uint8 [H, W, 3], train ids uint8 [H, W]."""

    caption: str
    image: np.ndarray
    label: np.ndarray


def contact_sheet(cells: Sequence[Cell], spec: LabelSpec, title: str, columns: int = 3):
    """Draws photos with their labels beside them, and all classes below; ignored is hatched.

    Returns:
      An RGB `PIL.Image`, about 2000 pixels wide with three columns.
    """
    columns = max(min(columns, len(cells)), 1)
    pairs = [(cell.caption, _pair(cell, spec)) for cell in cells]
    rows = [pairs[i : i + columns] for i in range(0, len(pairs), columns)]
    heights = [max(picture.height for _, picture in row) + ROW + GAP for row in rows]
    width = 2 * MARGIN + columns * (PAIR + GAP) - GAP
    present = np.flatnonzero(
        sum((np.bincount(cell.label.ravel(), minlength=256) for cell in cells), np.zeros(256))
    )
    key = legend(spec, width - 2 * MARGIN, set(present.tolist()))
    top = MARGIN + TITLE + GAP
    sheet = Image.new("RGB", (width, top + sum(heights) + key.height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, _font(TITLE))
    for row, height in zip(rows, heights, strict=True):
        for column, (caption, picture) in enumerate(row):
            left = MARGIN + column * (PAIR + GAP)
            sheet.paste(picture, (left, top))
            draw.text((left, top + picture.height + 3), _shortened(caption, PAIR), INK, _font())
        top += height
    sheet.paste(key, (MARGIN, top))
    return sheet


def legend(spec: LabelSpec, width: int, present: set[int]) -> Image.Image:
    """Draws colour, train id and name of each class in columns; those not `present` are faint."""
    entries = [(k, f"{k}  {name}") for k, name in enumerate(spec.classes)]
    entries.append((IGNORE, f"{IGNORE}  ignored"))
    room = SWATCH[0] + 8 + max(_length(text) for _, text in entries) + 2 * GAP
    columns = max(min(width // room, len(entries)), 1)
    rows = -(-len(entries) // columns)
    image = Image.new("RGB", (width, (rows + 1) * ROW + GAP), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((0, 0), "Train ids and classes; faint ones are not in these pictures", INK, _font())
    for number, (k, text) in enumerate(entries):
        left, top = number // rows * room, number % rows * ROW + ROW + GAP // 2
        _swatch(image, left, top, k, spec)
        ink = INK if k in present else FAINT
        draw.text((left + SWATCH[0] + 8, top + SWATCH[1] / 2), text, ink, _font(), anchor="lm")
    return image


def balance(rows: Mapping[str, Mapping], spec: LabelSpec, title: str) -> Image.Image:
    """Draws each class's share of the labelled pixels by split, on a logarithmic scale.

    Args:
      rows: `records.summary`; splits without labels are left out.
      spec: classes and colours.
      title: the headline.

    Returns:
      An RGB `PIL.Image`; classes from frequent to rare in the first split, in columns of `ROWS`;
      the last bars are the share of all pixels that is ignored.
    """
    shares = {split: _shares(row["pixels"], spec) for split, row in rows.items() if row["labelled"]}
    first = next(iter(shares.values()), np.zeros(spec.num_classes + 1))
    order = [*np.argsort(-first[:-1], kind="stable").tolist(), spec.num_classes]
    positive = [share for row in shares.values() for share in row if share > 0]
    decades = min(max(-math.floor(math.log10(min(positive, default=0.1))), 2), 8)
    scale = _Scale(BARS, decades)
    names = _class_names(spec)
    room = SWATCH[0] + GAP + max(_length(name) for name in names)
    rows_each = math.ceil(len(order) / math.ceil(len(order) / ROWS))
    columns = [order[i : i + rows_each] for i in range(0, len(order), rows_each)]
    pitch = max(len(shares) * BAR + 8, ROW)
    wide = room + BARS + FIGURE + 2 * GAP
    top = MARGIN + TITLE + GAP + 2 * ROW
    size = (max(len(columns) * wide, 560) + 2 * MARGIN, top + len(columns[0]) * pitch + MARGIN)
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), title, INK, _font(TITLE))
    _split_key(draw, list(shares), MARGIN + TITLE + GAP)
    for number, column in enumerate(columns):
        left = MARGIN + number * wide
        _axis(draw, scale, left + room, top, len(column) * pitch)
        for row, k in enumerate(column):
            middle = top + row * pitch + pitch // 2
            train = IGNORE if k == spec.num_classes else k
            _swatch(image, left, middle - SWATCH[1] // 2, train, spec)
            draw.text((left + SWATCH[0] + 8, middle), names[k], INK, _font(), anchor="lm")
            values = [split[k] for split in shares.values()]
            _bars(draw, scale, left + room, middle - len(values) * BAR // 2, values)
    return image


@dataclasses.dataclass(frozen=True)
class _Scale:
    """A logarithmic axis: 10**-decades lies at 0, 1 at `length` pixels."""

    length: int
    decades: int

    def __call__(self, share: float) -> int:
        position = 1 + math.log10(max(share, 1e-12)) / self.decades
        return round(self.length * min(max(position, 0.0), 1.0))


def _pair(cell: Cell, spec: LabelSpec) -> Image.Image:
    """Draws photo and label side by side, each fitted into a square of `SIDE`."""
    height, width = cell.label.shape
    factor = SIDE / max(height, width)
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    photo = Image.fromarray(cell.image).resize(size, Image.Resampling.LANCZOS)
    ids = np.asarray(Image.fromarray(cell.label).resize(size, Image.Resampling.NEAREST))
    both = Image.new("RGB", (PAIR, size[1]), PAPER)
    both.paste(photo, (0, 0))
    both.paste(Image.fromarray(painted(ids, spec)), (size[0] + PAIR - 2 * SIDE, 0))
    return both


def painted(ids: np.ndarray, spec: LabelSpec) -> np.ndarray:
    """Paints train ids, uint8 [H, W], as RGB uint8 [H, W, 3]; ignored pixels are hatched grey."""
    y, x = np.indices(ids.shape)
    hatch = np.array(HATCH, np.uint8)[((x + y) % 8 < 3).astype(int)]
    return np.where((ids == IGNORE)[..., None], hatch, spec.colourise(ids))


def _swatch(image: Image.Image, left: int, top: int, train: int, spec: LabelSpec) -> None:
    colours = painted(np.full(SWATCH[::-1], train, np.uint8), spec)
    image.paste(Image.fromarray(colours), (left, top))
    corner = (left + SWATCH[0] - 1, top + SWATCH[1] - 1)
    ImageDraw.Draw(image).rectangle(((left, top), corner), outline=FAINT)


def _shares(pixels: Sequence[int], spec: LabelSpec) -> np.ndarray:
    """Returns each class's share of the labelled pixels, then the ignored share of all."""
    counts = np.array(pixels, np.float64)
    classes = counts[: spec.num_classes] / max(counts[: spec.num_classes].sum(), 1)
    return np.append(classes, counts[IGNORE] / max(counts.sum(), 1))


def _class_names(spec: LabelSpec) -> list[str]:
    return [_shortened(f"{k}  {c}", 220) for k, c in enumerate(spec.classes)] + ["ignored (of all)"]


def _split_key(draw: ImageDraw.ImageDraw, splits: list[str], top: int) -> None:
    left = MARGIN
    for split, colour in zip(splits, _colours(len(splits)), strict=True):
        draw.rectangle((left, top + 4, left + SWATCH[0], top + 4 + BAR), fill=colour)
        draw.text((left + SWATCH[0] + 8, top), split, INK, _font())
        left += SWATCH[0] + 8 + _length(split) + 2 * GAP


def _axis(draw: ImageDraw.ImageDraw, scale: _Scale, left: int, top: int, height: int) -> None:
    for decade in range(scale.decades + 1):
        share = 10.0 ** (decade - scale.decades)
        x = left + scale(share)
        draw.line(((x, top), (x, top + height)), LINE)
        if (scale.decades - decade) % (2 if scale.decades > 4 else 1) == 0:
            draw.text((x, top - 4), f"{share * 100:.10g}%", FAINT, _font(12), anchor="mb")


def _bars(draw: ImageDraw.ImageDraw, scale: _Scale, left: int, top: int, values: list) -> None:
    for value, colour in zip(values, _colours(len(values)), strict=True):
        right = left + scale(value)
        if value > 0:
            draw.rectangle((left, top, max(right, left + 1), top + BAR - 2), fill=colour)
        text = f"{value * 100:.2g}%" if value > 0 else "none"
        draw.text((right + 5, top + BAR / 2 - 1), text, INK, _font(11), anchor="lm")
        top += BAR


def _colours(count: int) -> list[tuple[int, int, int]]:
    return [SPLIT_COLOURS[i % len(SPLIT_COLOURS)] for i in range(count)]


@functools.cache
def _font(size: int = TEXT):
    return ImageFont.load_default(size)


def _length(text: str) -> int:
    return math.ceil(_font().getlength(text))


def _shortened(text: str, width: int) -> str:
    """Drops the middle of a text that is wider than `width` pixels."""
    kept = len(text)
    while _length(text) > width and kept > 4:
        kept -= 1
        half = kept // 2
        text = f"{text[:half]}...{text[-half:]}"
    return text
