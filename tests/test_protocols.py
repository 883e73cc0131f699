"""Protocols against plain loops over windows, flips and scales."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import inference, protocols, sharding
from duc_dlc_jax.models import layers
from networks import images_of, jit, network, on_canvas

GRIDS = pytest.mark.parametrize("grid", ["corners", "stride"])


@pytest.fixture(autouse=True)
def quick_programs(monkeypatch):
    """The labeller's programs are compiled as the tests' own."""
    monkeypatch.setattr(jax, "jit", jit)


def scores_of(protocol, images, padded):
    """Averaged scores of each image, by the labeller; float64 [h, w, K] each."""
    model, variables, _ = network(protocol.grid)
    labeller = inference.Labeller(model, protocol, sharding.make_mesh(devices=jax.devices()[:1]))
    sizes = [image.shape[:2] for image in images]
    groups = labeller.groups(variables, on_canvas(images, padded), sizes)
    shape = (len(images), *padded)
    scores = jit(lambda g: inference.over_tiles(g, shape, protocol, lambda x: x))(groups)
    return [np.asarray(s)[:h, :w] for s, (h, w) in zip(scores, sizes, strict=True)]


def logits_of(grid, image, coarse=False):
    """The network on one image, uint8 or normalised floats [h, w, 3] -> logits [h, w, K]."""
    _, variables, apply = network(grid)
    return np.asarray(apply(variables, image[None], coarse=coarse))[0]


def normalised(image):
    mean, std = np.array(layers.IMAGE_MEAN), np.array(layers.IMAGE_STD)
    return (image / 255 - mean) / std


def read(x, rows, columns):
    """Bilinear, x [h, w, K] at the places rows x columns."""
    for axis, places in enumerate((rows, columns)):
        low = np.minimum(np.floor(places).astype(int), x.shape[axis] - 1)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        part = np.expand_dims(places - low, (1, 2) if axis == 0 else (0, 2))
        x = (1 - part) * x.take(low, axis) + part * x.take(high, axis)
    return x


def places(size_in, size_out, grid):
    """Pixels 0..size_out - 1 of an axis, on the same axis of size_in pixels."""
    index = np.arange(size_out)
    if grid == "corners":
        return index * (size_in - 1) / (size_out - 1)
    if grid == "half_pixel":
        return np.clip((index + 0.5) * size_in / size_out - 0.5, 0, size_in - 1)
    return np.minimum(index * size_in / size_out, size_in - 1)


def resized(x, size, grid):
    return read(x, *(places(x.shape[axis], size[axis], grid) for axis in (0, 1)))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


# Averages


@pytest.mark.parametrize(
    ("grid", "inputs"),
    [
        ("corners", ()),
        ("stride", ((96, 128),)),
        pytest.param("half_pixel", (), marks=pytest.mark.parity),
    ],
)
def test_multi_scale_is_the_mean_of_the_softmax(grid, inputs):
    """Two images in one padded batch, in tiles, against each image by itself; inputs padded too."""
    scales = (0.5, 1.25)
    protocol = protocols.Protocol(
        scales=scales, flip=True, pad_sides=(64, 96), grid=grid, inputs=inputs
    )
    images = images_of((60, 93), (64, 70))
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "TILE", (40, 50))
        ours = scores_of(protocol, images, (64, 96))
        for image, scores in zip(images, ours, strict=True):
            expected = sum(whole_image_scores(image, scale, grid) for scale in scales)
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-10)


def whole_image_scores(image, scale, grid):
    scaled = [int(n * scale + 0.5) for n in image.shape[:2]]
    x = resized(normalised(image), scaled, grid)
    rows, columns = (places(m, n, grid) for m, n in zip(scaled, image.shape, strict=False))

    def cells(pixels, size):  # where they lie on the 1/8 grid
        last = -(-size // 8) - 1
        if grid == "half_pixel":
            return np.clip((pixels + 0.5) * (last + 1) / size - 0.5, 0, last)
        return pixels * last / (size - 1) if grid == "corners" else np.minimum(pixels / 8, last)

    def scores(x, columns):
        logits = logits_of(grid, x, coarse=True)
        return softmax(read(logits, cells(rows, scaled[0]), cells(columns, scaled[1])))

    return (scores(x, columns) + scores(x[:, ::-1], scaled[1] - 1 - columns)) / 2


@GRIDS
def test_sliding_averages_overlaps_by_count(grid):
    """One image larger than a window on both axes, one smaller on one: no padding is seen."""
    protocol = protocols.Protocol(
        mode="sliding", crop_size=48, stride=32, flip=True, pad_sides=(96,), grid=grid
    )
    images = images_of((90, 75), (40, 93))
    with jax.enable_x64(True):
        ours = scores_of(protocol, images, (96, 96))
        for image, scores in zip(images, ours, strict=True):
            size = image.shape[:2]
            total, count = np.zeros((*size, 11)), np.zeros((*size, 1))
            for top in window_starts(size[0]):
                for left in window_starts(size[1]):
                    part = np.s_[top : top + 48, left : left + 48]
                    x = normalised(image)[part]
                    total[part] += softmax(logits_of(grid, x)) / 2
                    total[part] += softmax(logits_of(grid, x[:, ::-1])[:, ::-1]) / 2
                    count[part] += 1
            assert count.max() >= 2
            np.testing.assert_allclose(scores, total / count, rtol=0, atol=1e-10)


def window_starts(size):
    """Every 32 pixels, the last one where its 48 pixels end with the image."""
    if size <= 48:
        return [0]
    return [*range(0, size - 48, 32), size - 48]


def test_source_code_protocol():
    """Long side 80 x scale, black-padded windows of 48, exp of summed logits, sums over scales."""
    scales = (0.5, 1.0)
    protocol = protocols.Protocol(
        "source_code", scales, True, "exp_sum", crop_size=48, stride=32, long_side=80
    )
    with jax.enable_x64(True):
        images = images_of((70, 100), (100, 44))
        alone = [scores_of(protocol, [image], image.shape[:2])[0] for image in images]
        together = scores_of(dataclasses.replace(protocol, pad_sides=(104,)), images, (104, 104))
        for image, *ours in zip(images, alone, together, strict=True):
            expected = sum(source_code_scores(image, int(80 * scale)) for scale in scales)
            for scores in ours:
                np.testing.assert_allclose(scores, expected, rtol=1e-9)


def source_code_scores(image, long):
    size = image.shape[:2]
    scaled = [int(n * long / max(size) + 0.5) for n in size]
    x = resized(normalised(image), scaled, "corners")
    black = normalised(np.zeros((1, 1, 3), np.uint8))
    padded = np.tile(black, [max(n, 48) for n in scaled] + [1])
    padded[: scaled[0], : scaled[1]] = x
    total, count = np.zeros((*padded.shape[:2], 11)), np.zeros((*padded.shape[:2], 1))
    rows, columns = (range(0, max(n - 48, 0) + 32, 32) for n in padded.shape[:2])
    for top in rows:
        for left in columns:
            part = padded[top : top + 48, left : left + 48]
            window = np.tile(black, (48, 48, 1))
            window[: part.shape[0], : part.shape[1]] = part
            logits = logits_of("corners", window)
            logits = logits + logits_of("corners", window[:, ::-1])[:, ::-1]
            inside = np.s_[top : top + 48, left : left + 48]
            total[inside] += np.exp(logits[: part.shape[0], : part.shape[1]])
            count[inside] += 1
    return resized((total / count)[: scaled[0], : scaled[1]], size, "corners")


@pytest.mark.parametrize("mode", ["whole", "sliding", "source_code"])
def test_weights_of_the_windows_sum_to_1_at_every_pixel(mode):
    protocol = protocols.Protocol(mode=mode, crop_size=48, stride=48, average="exp_sum")
    rng = np.random.default_rng(0)
    for size, scaled in rng.integers(1, 200, (50, 2)):
        axis = protocols.Axis(protocol, int(size), int(scaled))
        _, weights = axis.reads(6, 210)
        np.testing.assert_allclose(weights[..., :size].sum((0, 1)), 1, rtol=1e-12)
        assert not weights[..., size:].any()
        for window in range(6):  # every pixel of the scaled image is in a window, once here
            assert axis.sources(window, 48, False)[1].any() == axis.has(window) or mode == "whole"


# Sentences, presets


def test_a_protocol_states_itself():
    config = config_lib.load("configs/ade20k.py")
    sentences = {}
    for preset in protocols.PRESETS:
        selected = protocols.select(config, preset, [])
        sentences[preset] = protocols.Protocol.from_config(selected).sentence()
    window = "windows of 480 pixels at stride 320"
    assert sentences == {
        "single": "single scale, whole image at its own size, logits resized to the label",
        "sliding": f"single scale, {window}, overlaps averaged by count, mean of the softmax, "
        "logits resized to the label",
        "multi_scale": "scales 0.5 0.75 1 1.25 1.5 1.75 with left-right flips, whole image, mean "
        "of the softmax, logits resized to the label",
        "multi_scale_cityscapes": "scales 0.5 0.75 1 1.25 1.5 1.75 2 2.25 with left-right flips, "
        "whole image, mean of the softmax, logits resized to the label",
        "multi_scale_sliding": f"scales 0.5 0.75 1 1.25 1.5 1.75 with left-right flips, {window}, "
        "overlaps averaged by count, mean of the softmax, logits resized to the label",
        "source_code": "scales 0.5 0.75 1 1.25 1.5 1.75 x 520 pixels on the long side with "
        f"left-right flips, {window} padded with black, overlaps averaged by count, exp of the "
        "summed logits of both flips, scores resized to the label",
    }


def test_fields_can_follow_the_preset():
    config = config_lib.default()
    config = protocols.select(config, "sliding", ["crop_size=713", "scales=(1.0, 2)"])
    protocol = protocols.Protocol.from_config(config)
    assert (protocol.crop_size, protocol.stride, protocol.scales) == (713, 475, (1.0, 2))
    with pytest.raises(config_lib.ConfigError, match=r"eval\.crop; the nearest one is eval\.crop_"):
        protocols.select(config, "", ["crop=3"])
    with pytest.raises(config_lib.ConfigError, match=r"--set=flip=maybe: 'maybe' is no value of"):
        protocols.select(config, "", ["flip=maybe"])
    with pytest.raises(config_lib.ConfigError, match=r"eval\.scales=\(\); it must not be empty"):
        protocols.select(config, "", ["scales=()"])
    config = protocols.select(config, "sliding", ["stride=900"])
    with pytest.raises(config_lib.ConfigError, match=r"eval\.stride=900; allowed: 1 to .* 713 "):
        protocols.Protocol.from_config(config)
