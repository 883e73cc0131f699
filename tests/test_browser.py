"""The report's page in headless Chromium, opened from a file: what it draws, its slider and filter.

Needs the programs `chromium` and `chromedriver` (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import base64
import io
import shutil

import numpy as np
import pytest
from PIL import Image

from duc_dlc_jax import metrics, report
from duc_dlc_jax.data.labels import IGNORE, label_spec

pytestmark = pytest.mark.browser
SPEC = label_spec("camvid")
SKY, BUILDING, POLE, CAR = (SPEC.classes.index(name) for name in ("sky", "building", "pole", "car"))
RED = (200, 30, 30)
HIT, MISSED, EXTRA, WRONG = (0, 158, 115), (230, 159, 0), (86, 100, 220), (214, 40, 57)
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


def example(name, label, prediction):
    """Red photos of 40x80 pixels; label and prediction: class by quarter of the width."""

    def columns(ids):
        return np.tile(np.repeat(np.array(ids, np.uint8), 20), (40, 1))

    image = np.tile(np.array(RED, np.uint8), (40, 80, 1))
    label, prediction = columns(label), columns(prediction)
    return {"name": name, "image": image, "label": label, "prediction": prediction}


EXAMPLES = {
    "best": example("one", [SKY, SKY, POLE, POLE], [SKY, SKY, POLE, POLE]),
    "median": example("two", [SKY, POLE, SKY, IGNORE], [POLE, POLE, SKY, BUILDING]),
    "worst": example("three", [SKY, SKY, CAR, CAR], [SKY, CAR, SKY, CAR]),
}


@pytest.fixture(scope="module")
def scores():
    matrix = np.zeros((11, 11), np.int64)
    for shown in EXAMPLES.values():
        kept = shown["label"] != IGNORE
        np.add.at(matrix, (shown["label"][kept], shown["prediction"][kept]), 1)
    return metrics.scores(matrix) | {"matrix": matrix, "protocol": "single scale"}


@pytest.fixture(scope="module")
def address(scores, tmp_path_factory):
    shown = [report.picture(e, group, 11) for group, e in EXAMPLES.items()]
    mious = np.array([e["miou"] for e in shown])
    steps = range(50, 501, 50)
    curves = {
        "train/loss": [[step, 50 / step] for step in steps],
        "val/mIoU": [[250, 0.4], [500, 0.5]],
        "val/PA": [[250, 0.7], [500, 0.8]],
    }
    results = {"single": scores, "sliding": scores}
    data = report.page_data("camvid, val", "3 images", SPEC, results, curves, mious, shown)
    return report.write(tmp_path_factory.mktemp("report"), data).as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium, "no program chromium; on Debian: apt-get install chromium chromium-driver"
    assert driver, "no program chromedriver; on Debian: apt-get install chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))  # downloads nothing
    yield started
    started.quit()


@pytest.fixture
def page(browser, address):
    """The page, freshly loaded at desktop width; it must not have said anything on the console."""
    from selenium.webdriver.support.ui import WebDriverWait

    resize(browser, 1280)
    browser.get(address)
    ready = "return document.documentElement.dataset.ready === 'true'"
    WebDriverWait(browser, 20).until(lambda b: b.execute_script(ready))
    yield browser
    assert browser.get_log("browser") == []


def resize(browser, width, dark=False):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = {"color-scheme": "dark" if dark else "light", "reduced-motion": "reduce"}
    features = [{"name": f"prefers-{name}", "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def texts(page, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map((x) => x.textContent)"
    return page.execute_script(script, selector)


def select(page, name, value):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    Select(page.find_element(By.ID, name)).select_by_value(str(value))


def opaque(page):
    page.execute_script("""
        const range = document.getElementById("opacity");
        range.value = 100;
        range.dispatchEvent(new Event("input"));
    """)


def colours(page, canvas, places):
    """Colours of a canvas, read from a copy, at (x, y)."""
    script = """
        const [canvas, places] = arguments;
        const copy = new OffscreenCanvas(canvas.width, canvas.height);
        const context = copy.getContext("2d", {willReadFrequently: true});
        context.drawImage(canvas, 0, 0);
        return places.map(([x, y]) => [...context.getImageData(x, y, 1, 1).data.slice(0, 3)]);
    """
    return [tuple(colour) for colour in page.execute_script(script, canvas, places)]


def canvas_colours(page, card, canvas):
    """Colours of the middles of the four quarters of a card's canvas, "base" or "top"."""
    script = "return document.querySelectorAll(`.card canvas.${arguments[1]}`)[arguments[0]]"
    found = page.execute_script(script, card, canvas)
    return colours(page, found, [[x, 20] for x in (10, 30, 50, 70)])


def screenshot(page, element):
    """RGB uint8 [H, W, 3] of an element."""
    script = """
        const box = arguments[0].getBoundingClientRect();
        return [box.left + scrollX, box.top + scrollY, box.width, box.height];
    """
    box = dict(
        zip(("x", "y", "width", "height"), page.execute_script(script, element), strict=True)
    )
    options = {"clip": box | {"scale": 1}, "captureBeyondViewport": True}
    data = page.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image.convert("RGB"))


def visible_cards(page):
    script = """
        return [...document.querySelectorAll(".card")].filter((x) => x.checkVisibility())
            .map((x) => x.querySelector("figcaption span").textContent);
    """
    return page.execute_script(script)


def is_near(colour, expected, bound=8):  # JPEG, scaling
    return max(abs(int(a) - int(b)) for a, b in zip(colour, expected, strict=True)) <= bound


# What it draws


def test_figures_and_protocols(page, scores):
    tiles = dict(zip(texts(page, "#tiles dt"), texts(page, "#tiles dd"), strict=True))
    assert next(iter(tiles)) == "mIoU"
    assert tiles["PA"] == f"{scores['PA']:.4f}"
    assert tiles["Final Score"] == f"{scores['final_score']:.4f}"
    assert texts(page, "#sentence") == ["Protocol: single scale."]
    assert texts(page, "#protocols tbody th") == ["single", "sliding"]
    assert page.title == "camvid, val"


def test_nothing_is_fetched(page):
    script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert all(name.startswith("data:") for name in page.execute_script(script))


def test_classes_are_sorted_and_their_bars_as_long_as_their_iou(page, scores):
    names = texts(page, "#classes tbody button")
    ious = dict(zip(SPEC.classes, scores["iou"], strict=True))
    there = [name for name in names if np.isfinite(ious[name])]
    assert there == sorted(there, key=lambda name: -ious[name])
    assert names[: len(there)] == there  # absent ones last
    script = """
        return [...document.querySelectorAll("#classes .bar-track")].map((track) =>
            track.firstChild.getBoundingClientRect().width / track.getBoundingClientRect().width);
    """
    widths = page.execute_script(script)
    for name, width in zip(there, widths, strict=False):
        assert width == pytest.approx(ious[name], abs=0.01)
    select(page, "sort", "id")
    assert texts(page, "#classes tbody button") == list(SPEC.classes)


def test_the_matrix_tells_its_cells(page, scores):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    canvas = page.find_element(By.CSS_SELECTOR, "#matrix canvas")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    side = canvas.size["width"] / 11
    x, y = ((k + 0.5) * side - canvas.size["width"] / 2 for k in (CAR, SKY))
    ActionChains(page).move_to_element_with_offset(canvas, x, y).perform()
    row = scores["matrix"][SKY]
    share = f"{100 * row[CAR] / row.sum():.1f}%"
    said = f"sky: {share} predicted as car ({row[CAR]} of {row.sum():,} pixels)"
    assert texts(page, "#tip") == texts(page, "#cell") == [said]
    assert page.find_element(By.ID, "tip").is_displayed()
    canvas.send_keys(*[Keys.ARROW_LEFT] * CAR)
    assert texts(page, "#cell")[0].startswith("sky: ")
    assert " found (" in texts(page, "#cell")[0]
    cells = [[CAR, CAR], [CAR, SKY], [BUILDING, SKY]]  # column, row
    found, confused, never = (red for red, _, _ in colours(page, canvas, cells))
    assert found < confused < never == 255  # from the accent colour to the paper


def test_curves_are_drawn_and_read(page):
    assert texts(page, "#curves figcaption strong") == [
        "Training loss",
        "Evaluation",
    ]
    script = """
        const chart = document.querySelectorAll("#curves svg")[1];
        const box = chart.getBoundingClientRect();
        const at = {clientX: box.right, clientY: box.top};
        chart.dispatchEvent(new PointerEvent("pointermove", at));
        return chart.parentNode.querySelector(".readout").textContent;
    """
    assert page.execute_script(script) == "step 500: mIoU 0.5, PA 0.8"
    assert len(texts(page, "#curves path")) == 3


# Slider and filter


def test_the_slider_moves_the_border_between_the_layers(page):
    """Seen in a screenshot: photo left of the line, prediction right of it."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opaque(page)
    stage = page.find_element(By.CSS_SELECTOR, ".stage")
    slider = stage.find_element(By.CSS_SELECTOR, "input")
    for steps, cut in (([Keys.HOME] + [Keys.ARROW_RIGHT] * 20, 0.2), ([Keys.END], 1)):
        slider.send_keys(*steps)
        assert slider.get_attribute("value") == str(round(100 * cut))
        seen = screenshot(page, stage)
        row = seen[seen.shape[0] // 4]
        for place in (0.05, 0.12, 0.3, 0.45, 0.7, 0.95):
            predicted = SPEC.palette[SKY if place < 0.5 else POLE]
            expected = RED if place < cut else predicted
            assert is_near(row[int(place * len(row))], expected), (cut, place)


def test_layers_can_be_chosen(page):
    opaque(page)
    sky, pole = (SPEC.palette[k] for k in (SKY, POLE))
    select(page, "left", "label")
    select(page, "right", "errors")
    *label, ignored = canvas_colours(page, 1, "base")
    assert label == [sky, pole, sky]
    assert ignored in ((236, 236, 236), (168, 168, 168))
    errors = canvas_colours(page, 1, "top")
    assert errors[0] == WRONG
    assert is_near(errors[1], RED)  # right: the photo stays
    assert is_near(errors[2], RED)
    assert errors[3] == ignored
    assert texts(page, ".card .tag.l")[1:] == ["Label", "Label"]


def test_the_filter_shows_images_with_the_class_and_what_became_of_it(page):
    from selenium.webdriver.common.by import By

    opaque(page)
    assert visible_cards(page) == ["one", "two", "three"]
    select(page, "class", POLE)
    assert visible_cards(page) == ["one", "two"]
    assert texts(page, "#shown") == ["pole occurs in 2 of the 3 images"]
    sky, pole = canvas_colours(page, 0, "top")[1:3]
    assert pole == SPEC.palette[POLE]
    assert sky == (20, 20, 20)  # other classes are covered
    select(page, "right", "errors")
    extra, hit, nothing, _ = canvas_colours(page, 1, "top")
    assert (extra, hit) == (EXTRA, HIT)
    assert is_near(nothing, RED)
    select(page, "class", CAR)
    assert visible_cards(page) == ["three"]
    nothing, extra, missed, hit = canvas_colours(page, 2, "top")
    assert (extra, missed, hit) == (EXTRA, MISSED, HIT)
    assert is_near(nothing, RED)
    select(page, "class", BUILDING)  # predicted, on ignored pixels alone
    assert visible_cards(page) == []
    select(page, "class", -1)
    assert visible_cards(page) == ["one", "two", "three"]
    button = page.find_element(By.CSS_SELECTOR, f'button[data-class="{CAR}"]')
    button.click()  # the same from the list of classes
    assert visible_cards(page) == ["three"]
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert visible_cards(page) == ["one", "two", "three"]


# Screens


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_the_screen_in_light_and_dark(page, width, dark):
    resize(page, width, dark)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    script = "return getComputedStyle(document.body).backgroundColor"
    lightness = sum(map(int, page.execute_script(script)[4:-1].split(",")))
    assert lightness < 120 if dark else lightness > 600


def test_controls_have_names(page):
    script = """
        return [...document.querySelectorAll("select, input, button, canvas, svg")].filter((x) =>
            !(x.labels?.length || x.getAttribute("aria-label") || x.textContent.trim())
        ).map((x) => x.outerHTML);
    """
    assert page.execute_script(script) == []
