"""The label contract of a data set: raw id -> train id -> name, colour and submission id.

One `LabelSpec` drives the builder, the loss, the metric, the pictures and the exported model.
Class names, palettes and id tables live in `labels.json` beside this file. Where masks are RGB
pictures, the raw id of a colour is the number 0xRRGGBB.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import json
import pathlib
from collections.abc import Iterable

import numpy as np

from duc_dlc_jax.config import ConfigError

WITHOUT_BUILDER = ("voc",)  # the classes of imported models; their data are prepared from folders
IGNORE = 255  # the train id that neither the loss nor the metric counts
SOURCE_IDS = 459  # categories of PASCAL-Context's .mat files, from 1 on


class DataError(ValueError):
    """Data on disk that break their contract; the message names the file and the way out.

    Attributes:
      kind: groups like problems in a report: "size", "values", ...; "" where there is one only.
    """

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class LabelSpec:
    """The classes of one data set; train id k means `classes[k]`.

    Attributes:
      name: of the data set.
      classes: names by train id.
      palette: (red, green, blue) in 0..255 by train id.
      raw_to_train: every id a mask on disk may hold -> its train id, or `IGNORE`.
      submission_ids: the id a benchmark server expects, by train id.
      colours: the masks are RGB and their raw ids colours, 0xRRGGBB.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    raw_to_train: dict[int, int]
    submission_ids: tuple[int, ...]
    colours: bool = False

    def __post_init__(self):
        count = len(self.classes)
        if not len(self.palette) == len(self.submission_ids) == count:
            raise ValueError(
                f"{self.name}: {count} classes, {len(self.palette)} palette entries and "
                f"{len(self.submission_ids)} submission ids; the three must be equal in number"
            )
        missing = set(range(count)) - set(self.raw_to_train.values())
        extra = set(self.raw_to_train.values()) - set(range(count)) - {IGNORE}
        if missing or extra or count > IGNORE:
            raise ValueError(
                f"{self.name}: raw_to_train must reach each train id 0..{count - 1} and otherwise "
                f"{IGNORE}; not reached: {sorted(missing)}, outside: {sorted(extra)}"
            )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def unknown(self, raw: np.ndarray) -> list[int]:
        """Returns the values of a raw mask that are outside the contract, ascending."""
        return sorted({int(v) for v in _values(raw)} - set(self.raw_to_train))

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Maps raw ids (integer, any shape) to train ids (uint8, same shape).

        Raises:
          DataError: a value is outside the contract; names it and the allowed ones.
        """
        if outside := self.unknown(raw):
            raise DataError(
                f"label values {self.written(outside)} are outside the contract of {self.name}; "
                f"allowed: {self.written(self.raw_to_train)}",
                "values",
            )
        keys = np.array(sorted(self.raw_to_train))
        trains = np.array([self.raw_to_train[int(key)] for key in keys], np.uint8)
        if keys[-1] < 2**16:
            table = np.zeros(keys[-1] + 1, np.uint8)
            table[keys] = trains
            return table[raw]
        return trains[np.searchsorted(keys, raw)]

    def written(self, raw_ids: Iterable[int], limit: int = 40) -> str:
        """Writes raw ids for people: 0..5, 7 or #804080, #c0c080; at most `limit` colours."""
        if not self.colours:
            return _ranges(raw_ids)
        shown = [f"#{value:06x}" for value in sorted(raw_ids)]
        more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
        return ", ".join(shown[:limit]) + more

    def mapping(self) -> list[tuple[int, str, str]]:
        """Returns (train id, class, raw ids that mean it) of each class and of what is ignored."""
        raw_ids = collections.defaultdict(list)
        for raw, train in self.raw_to_train.items():
            raw_ids[train].append(raw)
        names = dict(enumerate(self.classes)) | {IGNORE: "ignored"}
        return [(k, names[k], self.written(raw_ids[k])) for k in sorted(raw_ids)]

    def colourise(self, ids: np.ndarray) -> np.ndarray:
        """Paints train ids, uint8 [H, W], as RGB uint8 [H, W, 3]; `IGNORE` is black."""
        table = np.zeros((256, 3), np.uint8)
        table[: self.num_classes] = self.palette
        return table[ids]

    def to_json(self) -> str:
        """Returns the specification as JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> LabelSpec:
        """Reads what `to_json` wrote."""
        fields = json.loads(text)
        return cls(
            name=fields["name"],
            classes=tuple(fields["classes"]),
            palette=tuple((r, g, b) for r, g, b in fields["palette"]),
            raw_to_train={int(raw): train for raw, train in fields["raw_to_train"].items()},
            submission_ids=tuple(fields["submission_ids"]),
            colours=fields.get("colours", False),
        )


def label_spec(name: str, masks: str = "ids") -> LabelSpec:
    """Returns the specification of a known data set.

    `pascal_context` has 59 classes and ignores the background; `pascal_context_60` counts it.

    Args:
      name: of the data set.
      masks: what its masks hold: `ids`, the usual ones; `train_ids`, already 0..K - 1 and 255
        (Cityscapes' labelTrainIds); `colours` (CamVid's 32); `source_ids`, the 459 of
        PASCAL-Context's .mat files, of which those outside the 59 classes are background.

    Raises:
      ConfigError: unknown name; gives the nearest valid one and the list.
      KeyError: the data set has no such masks.
    """
    table = _table()
    if name not in (valid := _names()):
        own = "that of folders of your own that are prepared"
        raise _unknown(name, [known for known in valid if is_known(known)], own)
    entry = table["pascal_context_60" if name == "pascal_context" else name]
    palette = entry.get("palette") or [voc_colour(i) for i in entry["raw_ids"]]
    first = 1 if name == "pascal_context" else 0  # 59 classes: without the background, raw id 0
    classes = tuple(entry["classes"][first:])
    kept, ignored = entry["raw_ids"][first:], entry["raw_ids"][:first] + entry["ignored_raw_ids"]
    ids = {raw: k for k, raw in enumerate(kept)} | dict.fromkeys(ignored, IGNORE)
    tables = {
        "ids": lambda: ids,
        "train_ids": lambda: {k: k for k in range(len(classes))} | {IGNORE: IGNORE},
        "colours": lambda: {int(rgb, 16): ids[raw] for rgb, raw in entry["colours"].items()},
        "source_ids": lambda: (
            dict.fromkeys(range(SOURCE_IDS + 1), ids[0])
            | {source: ids[k] for k, source in enumerate(entry["source_ids"])}
        ),
    }
    return LabelSpec(
        name=name,
        classes=classes,
        palette=tuple((r, g, b) for r, g, b in palette[first:]),
        raw_to_train=tables[masks](),
        submission_ids=tuple(entry["submission_ids"][first:]),
        colours=masks == "colours",
    )


def named_or_read(name: str) -> LabelSpec:
    """Returns the specification of a known name, or that of a file labels.json.

    Raises:
      ConfigError: neither.
    """
    path = pathlib.Path(name)
    if not path.is_file():
        if name not in _names():
            raise _unknown(name, _names(), "a file labels.json")
        return label_spec(name)
    try:
        return LabelSpec.from_json(path.read_text())
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no labels.json of a workdir: {error!r}") from error


def _names() -> list[str]:
    return sorted([*_table(), "pascal_context"])


def _unknown(name: str, valid: list[str], other: str) -> ConfigError:
    near = difflib.get_close_matches(name, _names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(
        f"unknown data set {name!r}: {hint}valid names: {', '.join(valid)}, or {other}"
    )


def is_known(name: str) -> bool:
    """Whether there is a builder of this name, which own folders may therefore not have."""
    return name in _names() and name not in WITHOUT_BUILDER


def voc_colour(index: int) -> tuple[int, int, int]:
    """Returns PASCAL VOC's (red, green, blue) of a class index: its bits, dealt to three bytes."""
    colour = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            colour[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return colour[0], colour[1], colour[2]


@functools.cache
def _table() -> dict:
    return json.loads((pathlib.Path(__file__).parent / "labels.json").read_text())


def _values(raw: np.ndarray) -> np.ndarray:
    """Returns the distinct values of an integer array, ascending."""
    if raw.dtype.itemsize <= 2 and raw.dtype.kind == "u":  # counting is ten times a sort's speed
        return np.flatnonzero(np.bincount(raw.ravel()))
    return np.unique(raw)


def _ranges(values: Iterable[int]) -> str:
    """Writes sorted integers briefly: 0..5, 7, 9..11."""
    parts, values = [], sorted(values)
    for i, value in enumerate(values):
        if i and value == values[i - 1] + 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    return ", ".join(f"{low}" if low == high else f"{low}..{high}" for low, high in parts)
