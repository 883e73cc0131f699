"""What the report says, as data; `test_browser.py` looks at the page itself."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from duc_dlc_jax import metrics, report
from duc_dlc_jax.data.labels import IGNORE, label_spec

SPEC = label_spec("camvid")


def decoded(text, shape):
    table = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, 3).astype(int)
    return np.repeat(table[:, 0], table[:, 1] + 256 * table[:, 2]).reshape(shape)


def example(rng, shape=(40, 60), wrong=0.3):
    label = np.repeat(np.repeat(rng.integers(0, 11, (4, 6)), 10, 0), 10, 1)[: shape[0], : shape[1]]
    label = label.astype(np.uint8)
    label[:3] = IGNORE
    noise = rng.integers(0, 11, label.shape)
    prediction = np.where(rng.random(label.shape) < wrong, noise, label % 11).astype(np.uint8)
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    return {"name": "a</script>", "image": image, "label": label, "prediction": prediction}


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (400, 700)])
def test_runs_say_every_pixel(shape):
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 256, shape).astype(np.uint8)
    for ids in (noisy, np.full(shape, 7, np.uint8), np.sort(noisy, axis=None).reshape(shape)):
        np.testing.assert_array_equal(decoded(report.runs(ids), shape), ids)


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("images", [0, 1, 3, 5, 20])
def test_best_median_and_worst_are_each_shown_once(images, count):
    mious = np.random.default_rng(0).random(images + 1)
    mious[-1] = np.nan  # all its pixels are ignored
    chosen = report.choose(mious, count)
    shown = [record for group in chosen.values() for record in group]
    assert len(shown) == len(set(shown)) == min(3 * count, images)
    assert images not in shown
    order = np.argsort(mious[:-1]).tolist()
    assert chosen["worst"] == order[:count]
    if count and images == 20:
        assert chosen["best"] == order[:-3:-1]
        assert chosen["median"] == order[9:11]


def test_a_picture_has_the_figures_and_pixels_of_its_image(monkeypatch):
    one = example(np.random.default_rng(0))
    shown = report.picture(one, "best", 11)
    assert (shown["width"], shown["height"]) == (60, 40)
    for name in ("label", "prediction"):
        np.testing.assert_array_equal(decoded(shown[name], (40, 60)), one[name])
    hits = one["label"] == one["prediction"]
    assert shown["pa"] == pytest.approx(hits[3:].mean(), abs=1e-6)
    matrix = np.zeros((11, 11), int)
    np.add.at(matrix, (one["label"][3:], one["prediction"][3:]), 1)
    assert shown["miou"] == pytest.approx(metrics.scores(matrix)["mIoU"], abs=1e-6)
    images = report.ImageScores(2, 11)
    images.add(one | {"record": 1})
    assert images.values[1] / report.UNIT - 1 == pytest.approx(shown["miou"], abs=1e-6)
    assert images.values[0] == 0
    monkeypatch.setattr(report, "LONGEST", 30)
    small = report.picture(one, "best", 11)
    photo = base64.b64decode(small["photo"].partition(",")[2])
    assert Image.open(io.BytesIO(photo)).size == (small["width"], small["height"]) == (30, 20)
    np.testing.assert_array_equal(decoded(small["label"], (20, 30)), one["label"][1::2, 1::2])


def test_classes_are_present_by_counted_pixels_of_the_whole_image():
    """Class 4: one labelled column of 3000, missed; 5: predicted on ignored pixels alone."""
    label, prediction = np.zeros((8, 3000), np.uint8), np.zeros((8, 3000), np.uint8)
    label[:, 1002], label[:, 2000:] = 4, IGNORE
    prediction[:, 100], prediction[:, 2001:] = 7, 5
    image = np.zeros((8, 3000, 3), np.uint8)
    one = {"name": "wide", "image": image, "label": label, "prediction": prediction}
    shown = report.picture(one, "best", 11)
    assert 4 not in decoded(shown["label"], (shown["height"], shown["width"]))
    assert shown["present"] == [0, 4, 7]


def test_curves_have_the_last_value_of_each_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert report.curves(path) == {}
    lines = [{"step": step, "train/loss": 1 / step} for step in range(1, 3002)]
    lines += [{"step": 3001, "val/mIoU": 0.5}, {"step": 3001, "val/mIoU": 0.6, "train/loss": None}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3002, "va')
    found = report.curves(path)
    assert found["val/mIoU"] == [[3001, 0.6]]
    assert len(found["train/loss"]) <= 1000
    assert found["train/loss"][-1] == [3001, 1 / 3001]


def page(tmp_path):
    rng = np.random.default_rng(0)
    matrix = rng.integers(0, 1000, (11, 11))
    matrix[3] = matrix[:, 3] = 0  # a class that is nowhere
    scores = metrics.scores(matrix) | {"matrix": matrix, "protocol": "single scale"}
    shown = [report.picture(example(rng), "best", 11)]
    results = {"single": scores, "other": scores}
    data = report.page_data("t<1>", "k", SPEC, results, {}, np.array([0.5, np.nan]), shown)
    return scores, report.write(tmp_path / "out", data).read_text()


def test_the_page_needs_nothing_else_and_no_name_ends_its_data(tmp_path):
    scores, text = page(tmp_path)
    assert "<title>t&lt;1&gt;</title>" in text
    assert text.count("</script>") == 2
    assert "{{" not in text
    addresses = set(re.findall(r"\w+://[^\s\"'`)]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name of SVG, not an address
    assert not re.search(r"<link|@import|\bsrc=(?!.?data:)|url\(", text)
    (embedded,) = re.findall(r'id="data">(.*?)</script>', text)
    data = json.loads(embedded)
    assert data["examples"][0]["name"] == "a</script>"
    assert data["classes"][3]["iou"] is None
    assert data["per_image"] == [0.5]
    assert data["protocols"][1]["figures"]["mIoU"] == pytest.approx(scores["mIoU"], abs=1e-6)
    assert data["matrix"] == scores["matrix"].tolist()
