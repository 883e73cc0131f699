"""The HTML page of `evaluate --report=DIR`: figures, confusions, curves, images with their errors.

One file that needs no network: style, script, figures and images are inside. The template is in
`templates/`; what it draws is one JSON object, made here.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath

from duc_dlc_jax import metrics, storage
from duc_dlc_jax.data.labels import LabelSpec

LONGEST = 1024  # pixels of an image's longer side in the page; larger ones are shrunk
CURVES = ("train/loss", "train/learning_rate", "val/mIoU", "val/PA")
POINTS = 1000  # of a curve, at most
UNIT = 10**9  # per-image figures are summed over processes as integers
IMAGES_NOTE = (
    "The figure of an image is the mean IoU over the classes that occur in it or in its "
    "prediction; the mean of these figures is not the mIoU of the split, whose pixels are counted "
    "together. Drag the line, or move it with the arrow keys."
)


class ImageScores:
    """mIoU of each image of a split by itself; `add` is called with every labelled example."""

    def __init__(self, images: int, classes: int):
        self._classes = classes
        self.values = np.zeros(images, np.int64)  # (1 + mIoU) * UNIT; 0: not seen, or no figure

    def add(self, example: dict[str, Any]) -> None:
        """example: {record, label, prediction}."""
        miou = image_scores(example, self._classes)["mIoU"]
        if np.isfinite(miou):
            self.values[example["record"]] = round((1 + miou) * UNIT)


def image_scores(example: dict[str, Any], classes: int) -> dict[str, Any]:
    """`metrics.scores` of one image."""
    counted = metrics.host_confusion_matrix(example["label"], example["prediction"], classes)
    return metrics.scores(counted)


def choose(mious: np.ndarray, count: int) -> dict[str, list[int]]:
    """Records of the `count` best, median and worst images, each once; NaN: not to be chosen.

    With few images the worst go first, then the best.
    """
    order = np.argsort(mious, kind="stable")[: np.isfinite(mious).sum()].tolist()
    worst, order = order[:count], order[count:]
    rest = max(len(order) - count, 0)
    best, order = order[rest:][::-1], order[:rest]
    middle = max((len(order) - count) // 2, 0)
    return {"best": best, "median": order[middle : middle + count], "worst": worst}


def picture(example: dict[str, Any], group: str, classes: int) -> dict[str, Any]:
    """What the page shows of a labelled example, {name, image, label, prediction}."""
    scores, image = image_scores(example, classes), example["image"]
    height, width = image.shape[:2]
    factor = min(LONGEST / max(height, width), 1)
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    rows = (np.arange(size[1]) + 0.5) * height / size[1]  # the nearest pixel, never a mixture
    columns = (np.arange(size[0]) + 0.5) * width / size[0]
    nearest = np.ix_(rows.astype(int), columns.astype(int))
    photo = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    if factor < 1:
        photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, 88])
    return {
        "group": group,
        "name": example["name"],
        "miou": _number(scores["mIoU"]),
        "pa": _number(scores["PA"]),
        "present": np.flatnonzero(np.isfinite(scores["iou"])).tolist(),  # in all its pixels
        "width": size[0],
        "height": size[1],
        "photo": "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode(),
        "label": runs(example["label"][nearest]),
        "prediction": runs(example["prediction"][nearest]),
    }


def runs(ids: np.ndarray) -> str:
    """Ids uint8 [H, W] by rows as base64 of (id, length low byte, length high byte) per run."""
    flat = ids.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=flat[:1] ^ 1))
    lengths = np.diff(starts, append=flat.size)
    pieces = -(-lengths // 0xFFFF)  # a longer run becomes several
    coded = np.full(pieces.sum(), 0xFFFF, np.int64)
    coded[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * 0xFFFF
    table = np.stack([np.repeat(flat[starts], pieces), coded & 0xFF, coded >> 8], 1)
    return base64.b64encode(table.astype(np.uint8).tobytes()).decode()


def curves(path: epath.Path) -> dict[str, list[list[float]]]:
    """[step, value] of each of `CURVES` in a run's metrics.jsonl; nothing where there is none."""
    found: dict[str, dict[int, float]] = {}
    for values in storage.json_lines(storage.read(path)):
        for name in CURVES:
            if values.get(name) is not None:
                found.setdefault(name, {})[values["step"]] = values[name]
    thinned = {}
    for name, values in found.items():
        points = [list(point) for point in sorted(values.items())]
        stride = -(-len(points) // POINTS)
        thinned[name] = points[::-1][::stride][::-1]  # the last one stays
    return thinned


def figures(scores: dict[str, Any], spec: LabelSpec) -> dict[str, float | None]:
    """Headline figures by the names that people know them by, mIoU first."""
    named = {"mIoU": scores["mIoU"]} | metrics.extra_mious(scores, spec.name)
    named |= {"PA": scores["PA"], "mPA": scores["mPA"], "fwIoU": scores["fwIoU"]}
    named["Final Score"] = scores["final_score"]
    if "boundary" in scores:
        edges = scores["boundary"]
        named |= {"boundary mIoU": edges["mean_iou"], "boundary mF": edges["mean_f"]}
    return {name: _number(value) for name, value in named.items()}


def page_data(
    title: str,
    kicker: str,
    spec: LabelSpec,
    results: dict[str, dict[str, Any]],
    training: dict[str, list[list[float]]],
    mious: np.ndarray,
    examples: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The page's JSON object.

    results: scores of `Evaluator.run` by protocol, the first being the one shown in detail;
    mious: of each image, NaN where there is none; examples: of `picture`.
    """
    scores = next(iter(results.values()))
    edges = scores.get("boundary")
    classes = []
    for k, name in enumerate(spec.classes):
        values = {"iou": scores["iou"][k], "accuracy": scores["accuracy"][k]}
        if edges:
            values |= {"boundary_iou": edges["iou"][k], "boundary_f": edges["f"][k]}
        row = {"name": name, "colour": spec.palette[k], "pixels": int(scores["pixels"][k])}
        classes.append(row | {key: _number(value) for key, value in values.items()})
    widths = f"; {edges['widths']}" if edges else ""
    return {
        "title": title,
        "kicker": kicker,
        "images_note": IMAGES_NOTE,
        "protocols": [
            {"name": name, "sentence": s["protocol"] + widths, "figures": figures(s, spec)}
            for name, s in results.items()
        ],
        "classes": classes,
        "matrix": scores["matrix"].tolist(),
        "curves": training,
        "per_image": [round(float(x), 4) for x in mious if np.isfinite(x)],
        "examples": list(examples),
    }


def write(folder: epath.Path, data: dict[str, Any]) -> epath.Path:
    """Writes index.html into `folder`; returns its path."""
    templates = importlib.resources.files("duc_dlc_jax") / "templates"
    page, css, js = (
        (templates / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    # "<" of a name must not end the script that the JSON stands in.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"title": html.escape(data["title"]), "css": css, "js": js, "data": text}
    for name, part in parts.items():
        page = page.replace("{{" + name + "}}", part, 1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _number(x: float) -> float | None:
    return None if np.isnan(x) else round(float(x), 6)
