"""From the values in one's own masks, and a file that names them, to the label contract.

The file of classes has one of these forms of JSON:

["background", "cat", "dog"]                      names in the order of the ids 0, 1, 2
[{"name": "cat", "id": 7}, {"name": "void", "id": 0, "ignore": true}]
[{"name": "cat", "color": "#FF0000"}, {"name": "dog", "color": [0, 128, 0]}]
{"cat": 7, "dog": 9}     or     {"cat": "#FF0000", "dog": "#008000"}
{"7": "cat", "9": "dog"}                          Hugging Face's id2label

With id and color the masks hold the id, and pictures have the colour. A .txt has a name per line,
in the order of the ids, or the lines "cat:255,0,0::" of CVAT's labelmap.txt, which are colours.

A class whose name is one of `IGNORED_NAMES` is ignored; "ignore": true or false overrides that.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from duc_dlc_jax.data.labels import IGNORE, DataError, LabelSpec, voc_colour

IGNORED_NAMES = ("void", "ignore", "ignored", "unlabelled", "unlabeled")
MOST_VALUES = 64  # classes that are inferred; more have to be named
FEW_VALUES = 8  # outside the file of classes, that smoothing does not explain
FORMS = (
    'a list of names, a list of {"name": ..., "id": 7} or {"name": ..., "color": "#RRGGBB"}, '
    'or an object {"name": 7}, {"name": "#RRGGBB"} or {"7": "name"}'
)


@dataclasses.dataclass(frozen=True)
class Declared:
    """One entry: raw is the id, or 0xRRGGBB where `colour` is set.

    shown: 0xRRGGBB in pictures, of an entry with id and colour.
    """

    name: str
    raw: int
    colour: bool
    ignore: bool
    shown: int | None = None


def read_classes(path: str | pathlib.Path) -> list[Declared]:
    """Returns the entries of a file of classes, in its order; all ids or all colours.

    Raises:
      FileNotFoundError: no such file.
      DataError: not readable, or an entry that is none of the forms, or that occurs twice; names
        it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--classes={path}: no such file")
    try:
        text = path.read_text("utf-8-sig")
        is_list = path.suffix.lower() == ".txt"
        content = _lines(text) if is_list else json.loads(text, object_pairs_hook=_Pairs)
    except ValueError as error:
        raise DataError(
            f'{path}: not readable as JSON: {error}. It holds names such as ["sky", "road"], or '
            f"is a .txt with a name per line; allowed: {FORMS}"
        ) from error
    if isinstance(content, _Pairs):
        rows = _rows(content)
    elif isinstance(content, list):
        rows = [_row(number, value) for number, value in enumerate(content)]
    else:
        raise DataError(f"{path}: holds {content!r}; allowed: {FORMS}")
    declared = []
    for number, row in enumerate(rows):
        try:
            declared.append(_entry(row))
        except DataError as error:
            raise DataError(f"{path}: entry {number}, {row.get('name')!r}: {error}") from error
    _check(path, declared)
    return declared


class _Pairs(list):
    """A JSON object as its (name, value) pairs, so that names given twice are seen."""


def _lines(text: str) -> list[str] | _Pairs:
    """The names in a text, one per line, or (name, colour) of CVAT's label maps."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    cvat = [re.fullmatch(r"([^:]+):(\d+),(\d+),(\d+):.*", line) for line in lines]
    if all(cvat):
        return _Pairs((m[1], [int(level) for level in m.groups()[1:]]) for m in cvat if m)
    return lines


def _rows(pairs: _Pairs) -> list[dict[str, Any]]:
    """Returns the fields of an object's entries: {"cat": 7}, {"cat": "#FF0000"} or {"7": "cat"}."""
    names = [value for _, value in pairs if isinstance(value, str) and not _is_hex(value)]
    if names and all(key.isdecimal() and isinstance(value, str) for key, value in pairs):
        return [{"name": value, "id": int(key)} for key, value in pairs]
    key = {True: "id", False: "color"}
    return [{"name": name, key[isinstance(value, int)]: value} for name, value in pairs]


def _row(number: int, value: Any) -> dict[str, Any]:
    """Returns the fields of an entry of a list; none of a value that is no entry."""
    if isinstance(value, str):
        return {"name": value, "id": number}
    return dict(value) if isinstance(value, _Pairs) else {}


def _entry(row: dict[str, Any]) -> Declared:
    name, ignore = row.get("name"), row.get("ignore")
    unknown = set(row) - {"name", "id", "color", "colour", "ignore"}
    if not isinstance(name, str) or not name.strip() or unknown:
        raise DataError(
            f"not understood{f' (unknown: {sorted(unknown)})' if unknown else ''}; allowed: {FORMS}"
        )
    if ignore is None:
        ignore = name.strip().lower() in IGNORED_NAMES
    if not isinstance(ignore, bool):
        raise DataError(f'"ignore" is {ignore!r}; allowed: true, false')
    keys = [key for key in ("color", "colour") if key in row]
    if len(keys) > 1 or not (keys or "id" in row):
        raise DataError(f"has {' and '.join(keys) or 'neither id nor color'}; give one of the two")
    colour = _colour(row[keys[0]]) if keys else None
    if "id" in row:
        return Declared(name.strip(), _id(row["id"]), False, ignore, colour)
    assert colour is not None
    return Declared(name.strip(), colour, True, ignore)


def _id(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**16:
        raise DataError(f"id {value!r}; allowed: whole numbers 0..65535")
    return value


def _colour(value: Any) -> int:
    if isinstance(value, str) and _is_hex(value):
        return int(value.removeprefix("#"), 16)
    if isinstance(value, list) and len(value) == 3 and all(map(_is_level, value)):
        red, green, blue = value
        return red << 16 | green << 8 | blue
    raise DataError(f'color {value!r}; allowed: "#RRGGBB" or [red, green, blue] of 0..255')


def _is_hex(text: str) -> bool:
    return re.fullmatch(r"#?[0-9a-fA-F]{6}", text) is not None


def _is_level(value: Any) -> bool:
    return type(value) is int and value in range(256)  # neither true nor 255.0


def _check(path: pathlib.Path, declared: list[Declared]) -> None:
    """Raises DataError for names or raw ids that occur twice, and for too few classes."""
    for field in ("name", "raw"):
        first: dict[Any, Declared] = {}
        for entry in declared:
            other = first.setdefault(getattr(entry, field), entry)
            if other is not entry:
                value = entry.name if field == "name" else written(entry)
                raise DataError(f"{path}: {value} occurs twice ({other.name}, {entry.name})")
    if len({entry.colour for entry in declared}) > 1:
        raise DataError(
            f"{path}: some entries have ids, others colours; give one of the two to all"
        )
    count = sum(not entry.ignore for entry in declared)
    if not 2 <= count <= 255:
        raise DataError(f"{path}: {count} classes that are not ignored; allowed: 2..255")


def written(entry: Declared) -> str:
    """Writes an entry's raw id for people: 7 or #ff0000."""
    return f"#{entry.raw:06x}" if entry.colour else str(entry.raw)


@dataclasses.dataclass(frozen=True)
class Values:
    """What a folder of masks holds.

    Attributes:
      kind: of the masks, for people: "grey ids", "palette ids", "RGB colours", ...
      colours: the raw ids are colours, 0xRRGGBB.
      first: a file that has it, by raw id.
      palette: 0xRRGGBB by raw id, of palette masks.
      richest: the files with the most different raw ids, and their number.
    """

    kind: str
    colours: bool
    first: dict[int, str]
    palette: dict[int, int]
    richest: tuple[tuple[str, int], ...]

    def written(self, raw_ids: Iterable[int]) -> str:
        """Writes raw ids for people, at most 12 of them."""
        shown = [f"#{v:06x}" if self.colours else str(v) for v in sorted(raw_ids)]
        return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def infer_spec(
    name: str,
    values: Values,
    declared: list[Declared] | None = None,
    source: str = "",
    binary: bool = False,
) -> LabelSpec:
    """Returns the label contract of masks that hold `values`.

    255 is ignored in masks of ids, and 65535 in 16-bit ones, unless the file gives it to a class.

    Args:
      name: of the data set.
      values: what occurs in the masks.
      declared: the file of classes; None: each value that occurs is a class, in ascending order.
      source: that file, for messages.
      binary: 0 (or black) is "background" and 255 (or white, or 1 of 1-bit masks) "foreground".

    Raises:
      DataError: values outside the file of classes, or of the other sort; 0 and 255 alone;
        without a file, values near an ignored one or more than `MOST_VALUES`; less than two
        classes.
    """
    if binary and declared:
        raise DataError(f"--binary names the two classes itself: leave out --classes={source}")
    if binary:
        top = 0xFFFFFF if values.colours else 1 if values.kind == "1-bit ids" else 255
        pair = (("background", 0), ("foreground", top))
        declared = [Declared(label, raw, values.colours, ignore=False) for label, raw in pair]
        source = "--binary"
    if declared and declared[0].colour != values.colours:
        have, want = ("colours", "ids") if declared[0].colour else ("ids", "colours")
        example = (
            '{"name": "cat", "color": "#FF0000"}' if values.colours else '{"name": "cat", "id": 1}'
        )
        raise DataError(
            f"{source} names {have}, the masks hold {want} ({values.kind}): {_first(values)}. "
            f"Write its entries as {example}"
        )
    reserved = (
        set() if values.colours else {IGNORE, 0xFFFF if values.kind == "16-bit ids" else IGNORE}
    )
    if declared:
        kept, ignored = _declared_ids(values, declared, source, reserved)
    else:
        kept, ignored = _occurring_ids(values, reserved), reserved
    raw_ids = list(kept)
    return LabelSpec(
        name=name,
        classes=tuple(kept.values()),
        palette=_palette(values, raw_ids, declared or []),
        raw_to_train={raw: k for k, raw in enumerate(raw_ids)} | dict.fromkeys(ignored, IGNORE),
        submission_ids=tuple(range(len(kept)) if values.colours else raw_ids),
        colours=values.colours,
    )


def _declared_ids(
    values: Values, declared: list[Declared], source: str, reserved: set[int]
) -> tuple[dict[int, str], set[int]]:
    """Returns names by raw id in the file's order, and the raw ids that are ignored."""
    kept = {entry.raw: entry.name for entry in declared if not entry.ignore}
    ignored = {entry.raw for entry in declared if entry.ignore} | (reserved - set(kept))
    outside = sorted(set(values.first) - set(kept) - ignored)
    if outside:
        raise DataError(
            f"{values.first[outside[0]]}: {values.written(outside)} in the masks, outside "
            f"{source}; allowed: {values.written({*kept, *ignored})}. "
            f"{_unnamed(outside, values, source)}"
        )
    if IGNORE not in kept:
        _refuse_binary(values)
    return kept, ignored


def _unnamed(outside: list[int], values: Values, source: str) -> str:
    """What to do about values that the file of classes does not name."""
    if source == "--binary" or len(outside) > FEW_VALUES:
        return _in_between(values)
    key, value = ("color", f'"#{outside[0]:06X}"') if values.colours else ("id", outside[0])
    entry = f'{{"name": "rest", "{key}": {value}, "ignore": true}}'
    return (
        f"If they are classes, {source} lacks their names; else have them ignored by entries of "
        f"this form for all values: {entry}"
    )


def _occurring_ids(values: Values, reserved: set[int]) -> dict[int, str]:
    """Returns class names by raw id, ascending."""
    _refuse_binary(values)
    _refuse_levels(values, reserved)
    raw_ids = sorted(set(values.first) - reserved)
    if len(raw_ids) > MOST_VALUES:
        raise DataError(
            f"the masks hold {len(raw_ids)} different values ({values.kind}): "
            f"{values.written(raw_ids)}; more than {MOST_VALUES} classes have to be named with "
            f"--classes. {_in_between(values)}"
        )
    if len(raw_ids) < 2:
        raise DataError(
            f"the masks ({values.kind}) hold nothing but {values.written(values.first)}: one class "
            f"is nothing to learn. {_first(values)}. Are these the masks, at their full values?"
        )
    return {raw: f"#{raw:06x}" if values.colours else f"class_{raw}" for raw in raw_ids}


def _refuse_binary(values: Values) -> None:
    """Raises DataError where 255, the ignore value, is all there is beside 0."""
    if not values.colours and IGNORE in values.first and set(values.first) <= {0, IGNORE}:
        raise DataError(
            f"{values.first[IGNORE]}: the masks hold only 0 and 255, and 255 means ignore: all "
            "foreground would vanish. If 255 is a class, use --binary (0 background, 255 "
            'foreground), or name it in --classes: {"background": 0, "thing": 255}'
        )


def _refuse_levels(values: Values, reserved: set[int]) -> None:
    """Raises DataError where an ignored value may be the top of grey levels rather than ignored.

    Ids are small numbers and what is ignored stands apart: beside it no other may reach a quarter
    of it. PASCAL VOC's 0..20 pass, with gaps too; 254, 128 and what smoothing makes do not.
    """
    for top in sorted(reserved & set(values.first)):
        near = sorted(raw for raw in set(values.first) - reserved if 4 * raw > top)
        if near:
            raise DataError(
                f"{values.first[near[0]]}: the masks hold {values.written(near)} beside {top}, and "
                f"{top} means ignore: if these are grey levels, all that is white would vanish. "
                f"Masks of one class are --binary; else name every id in --classes, and {top} too "
                f'if it is a class: {{"background": 0, "thing": {top}}}. {_in_between(values)}'
            )


def _palette(
    values: Values, raw_ids: list[int], declared: Iterable[Declared]
) -> tuple[tuple[int, int, int], ...]:
    """Returns the colours by train id: the file's, the masks' own, PASCAL VOC's without black.

    All are PASCAL VOC's where two classes would look alike.
    """
    others = [voc_colour(k + 1) for k in range(len(raw_ids))]
    found = {raw: raw for raw in raw_ids} if values.colours else values.palette
    found = found | {entry.raw: entry.shown for entry in declared if entry.shown is not None}
    own = [
        (found[raw] >> 16, found[raw] >> 8 & 255, found[raw] & 255) if raw in found else other
        for raw, other in zip(raw_ids, others, strict=True)
    ]
    return tuple(own if len(set(own)) == len(own) else others)


def _first(values: Values) -> str:
    return f"for example {next(iter(values.first.values()))}"


def _in_between(values: Values) -> str:
    files = ", ".join(f"{file} ({count})" for file, count in values.richest)
    return (
        f"Most values: {files}. Values between the classes come from anti-aliased outlines, from "
        "resizing with interpolation and from JPEG: export the masks as PNG, without smoothing"
    )
