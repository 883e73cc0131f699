"""Augmentation: image and mask stay together, pixel for pixel."""

import dataclasses
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from duc_dlc_jax import config as configuration
from duc_dlc_jax.data import transforms
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.data.transforms import Augmentation, Geometry

BASE = Augmentation(48, 40, 0.5, 2.0, "left_right", False, 0.0, 0.0)


def reader(image, label):
    """Random access to two arrays, as records give it."""

    def read(box):
        top, left, bottom, right = box
        return image[top:bottom, left:right], label[top:bottom, left:right]

    return read


def cut(image, label, geometry, config):
    return transforms.cut(reader(image, label), label.shape, geometry, config)


def blocks(height=60, width=84, side=12, seed=0):
    """Random class blocks, and an image that shows each class as its own grey level."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 5, (height // side, width // side)).astype(np.uint8)
    label = np.kron(coarse, np.ones((side, side), np.uint8))
    return np.repeat((label * 50 + 20)[..., None], 3, 2).astype(np.uint8), label


def read_back(crop):
    """The class whose grey level is nearest; IGNORE where the crop is black padding."""
    ids = np.rint((crop[..., 0].astype(float) - 20) / 50)
    return np.where(crop[..., 0] < 5, IGNORE, ids).astype(np.uint8)


def disagreement(crop, label):
    """The share of pixels, away from borders between classes, where mask and image disagree."""
    kernel = np.ones((5, 5), np.uint8)
    flat = cv2.erode(label, kernel) == cv2.dilate(label, kernel)
    return float((read_back(crop) != label)[flat].mean())


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"flip": "up_down"},
        {"antialias": True},
        {"rotate_degrees": 10.0},
        {"blur_probability": 1.0},
        {"antialias": True, "rotate_degrees": 10.0, "flip": "up_down"},
    ],
)
def test_a_label_painted_into_the_image_follows_it(change):
    augmentation = dataclasses.replace(BASE, **change)
    image, label = blocks()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        crop, mask, valid = transforms.train_transform(
            reader(image, label), label.shape, rng, augmentation
        )
        assert crop.shape == (40, 40, 3)
        assert mask.shape == (40, 40)
        if not change.get("rotate_degrees"):
            assert (mask[: valid[0], : valid[1]] != IGNORE).all()
            assert (mask == IGNORE).sum() == 40 * 40 - valid.prod()
        assert crop.dtype == mask.dtype == np.uint8
        assert disagreement(crop, mask) < 0.01


def test_the_consistency_check_sees_an_unflipped_label():
    image, label = blocks()
    flipped = Geometry(60, 84, 0, 0, flipped=True)
    crop, _ = cut(image, label, flipped, BASE)
    _, mask = cut(image, label, dataclasses.replace(flipped, flipped=False), BASE)
    assert disagreement(crop, mask) > 0.2


def borders_of_half_planes(resize, source, target):
    """Returns where the resized mask changes, for half-planes at each column that is no tie.

    A tie is a border that falls on the centre of an output pixel: either class is right there.
    """
    borders = []
    for edge in range(1, source):
        if (2 * edge * target - source) % (2 * source):
            label = np.repeat((np.arange(source) >= edge)[None, :], 4, 0).astype(np.uint8)
            borders.append(int(resize(label, target)[0].sum()))
    return borders


def sampled(label, target):
    geometry = Geometry(label.shape[0], target, 0, 0)
    x, y = transforms.source_points(label.shape, geometry, (label.shape[0], target), "none")
    return transforms.sample_label(label, x, y)


def argmax_of_resized_one_hot(label, target):
    planes = [(label == k).astype(np.float32) for k in (0, 1)]
    size = (target, label.shape[0])
    planes = [cv2.resize(p, size, interpolation=cv2.INTER_LINEAR) for p in planes]
    return np.argmax(planes, 0).astype(np.uint8)


def half_a_pixel_off(label, target):
    """OpenCV 4's INTER_NEAREST and torch's nearest: floor(i n / m)."""
    return label[:, np.arange(target) * label.shape[1] // target]


SIZES = [(32, t) for t in (35, 45, 64, 96, 131)] + [(30, 77), (50, 101), (61, 100), (33, 64)]


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_mask_of_a_half_plane_is_the_argmax_of_its_resized_one_hot(source, target):
    expected = borders_of_half_planes(argmax_of_resized_one_hot, source, target)
    assert len(expected) > 5
    assert borders_of_half_planes(sampled, source, target) == expected
    if target % source:  # at whole factors the two coincide
        assert borders_of_half_planes(half_a_pixel_off, source, target) != expected


@pytest.mark.parametrize("target", [17, 23, 31])
def test_shrunk_masks_take_the_pixel_under_the_centre(target):
    label = np.arange(32, dtype=np.uint8)[None, :]
    centres = [(2 * i + 1) * 32 // (2 * target) for i in range(target)]
    assert sampled(label, target)[0].tolist() == centres
    assert half_a_pixel_off(label, target)[0].tolist() != centres


def test_a_mask_shifted_by_one_pixel_is_seen():
    image, label = blocks(side=6)
    still = Geometry(60, 84, 5, 7)
    config = dataclasses.replace(BASE, flip="none")
    crop, mask = cut(image, label, still, config)
    np.testing.assert_array_equal(read_back(crop), mask)
    shifted = np.roll(label, 1, axis=1)
    _, mask = cut(image, shifted, still, config)
    assert (read_back(crop) != mask).mean() > 0.05


@pytest.mark.parametrize("flip", ["left_right", "up_down", "none"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("height", "width"), [(37, 51), (97, 136), (60, 84)])
def test_the_crop_equals_the_whole_image_computation(height, width, flip, antialias):
    rng = np.random.default_rng(3)
    image = rng.integers(1, 256, (60, 84, 3)).astype(np.uint8)
    label = rng.integers(0, 9, (60, 84)).astype(np.uint8)
    config = dataclasses.replace(BASE, flip=flip, antialias=antialias)

    source = image
    if antialias and height < 60:
        small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        source = np.asarray(small)
    full = Geometry(height, width, 0, 0)
    points = transforms.source_points(source.shape, full, (height, width), "none")
    whole = transforms.sample_image(source, *points, np.True_)
    points = transforms.source_points(label.shape, full, (height, width), "none")
    mask = transforms.sample_label(label, *points)
    turn = {"left_right": np.s_[:, ::-1], "up_down": np.s_[::-1], "none": np.s_[:]}[flip]
    rows, columns = max(40 - height, 0), max(40 - width, 0)
    whole = np.pad(whole[turn], ((0, rows), (0, columns), (0, 0)))
    mask = np.pad(mask[turn], ((0, rows), (0, columns)), constant_values=IGNORE)

    top, left = (whole.shape[0] - 40) // 2, (whole.shape[1] - 40) // 3
    crop, crop_label = cut(image, label, Geometry(height, width, top, left, flipped=True), config)
    window = np.s_[top : top + 40, left : left + 40]
    assert np.abs(crop.astype(int) - whole[window]).max() <= 1
    assert (crop == whole[window]).mean() > 0.99
    np.testing.assert_array_equal(crop_label, mask[window])


@pytest.mark.parametrize("size", [(97, 136), (37, 51)])
def test_the_image_agrees_with_opencvs_bilinear_resize(size):
    noise = np.random.default_rng(0).integers(0, 256, (60, 84, 3)).astype(np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 1.5)
    points = transforms.source_points(image.shape, Geometry(size[0], size[1], 0, 0), size, "none")
    expected = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    assert (
        np.abs(transforms.sample_image(image, *points, np.True_).astype(int) - expected).max() <= 3
    )


def test_padding_is_black_and_ignored_and_lies_on_the_right_and_bottom():
    image, label = np.full((20, 30, 3), 200, np.uint8), np.zeros((20, 30), np.uint8)
    crop, mask = cut(image, label, Geometry(20, 30, 0, 0, flipped=True), BASE)
    assert (mask[:20, :30] == 0).all()
    assert (crop[:20, :30] == 200).all()
    assert (mask[20:] == IGNORE).all()
    assert (mask[:, 30:] == IGNORE).all()
    assert (crop[20:] == 0).all()
    assert (crop[:, 30:] == 0).all()


def test_rotation_turns_image_and_mask_and_ignores_the_corners():
    image, label = blocks(40, 40, 20)
    config = dataclasses.replace(BASE, flip="none")
    crop, mask = cut(image, label, Geometry(40, 40, 0, 0, degrees=90.0), config)
    np.testing.assert_array_equal(read_back(crop), mask)
    assert not np.array_equal(mask, label)
    _, mask = cut(image, label, Geometry(40, 40, 0, 0, degrees=10.0), config)
    assert mask[0, 0] == mask[-1, -1] == IGNORE


def test_antialias_averages_fine_stripes_that_plain_sampling_aliases():
    image = np.zeros((80, 80, 3), np.uint8)
    image[:, ::2] = 255
    label = np.zeros((80, 80), np.uint8)
    shrink = Geometry(20, 20, 0, 0)
    spread = {}
    for antialias in (False, True):
        config = dataclasses.replace(BASE, crop_size=20, flip="none", antialias=antialias)
        crop, _ = cut(image, label, Geometry(22, 22, 0, 0), config)
        spread[antialias] = crop[3:-3, 3:-3].std()
        assert cut(image, label, shrink, config)[0].shape == (20, 20, 3)
    assert spread[True] < 0.5 * spread[False]


def drawn_geometries(count, config=BASE, **options):
    generators = (np.random.default_rng(seed) for seed in range(count))
    return [transforms.draw_geometry(rng, (60, 84), config, **options) for rng in generators]


def assert_uniform(values, low, high):
    """That at least 250 values fill low..high evenly: ends within 2%, mean within 6% of it."""
    values, span = np.asarray(values), high - low
    assert len(values) >= 250
    assert low <= values.min() <= low + 0.02 * span
    assert high - 0.02 * span <= values.max() <= high
    assert abs(values.mean() - (low + high) / 2) < 0.06 * span


def test_drawn_geometry_covers_its_ranges_and_repeats_with_its_seed():
    drawn = drawn_geometries(400)
    assert drawn == drawn_geometries(400)
    shorts = [g.height for g in drawn]
    assert min(shorts) < 28
    assert max(shorts) > 92
    assert set(shorts) <= set(range(24, 97))
    assert all(g.width == g.height * 84 // 60 for g in drawn)
    assert 140 < sum(g.flipped for g in drawn) < 260
    assert all(g.top <= max(g.height - 40, 0) for g in drawn)
    for rooms in (
        [(g.top, g.height - 40) for g in drawn if g.height > 44],
        [(g.left, g.width - 40) for g in drawn if g.width > 44],
    ):
        assert_uniform([place / room for place, room in rooms], 0, 1)


def test_drawn_rotation_and_blur_cover_their_ranges():
    config = dataclasses.replace(BASE, rotate_degrees=10.0, blur_probability=0.5)
    drawn = drawn_geometries(800, config)
    assert_uniform([g.degrees for g in drawn], -10, 10)
    blurred = [g.blur for g in drawn if g.blur > 0]
    assert 340 < len(blurred) < 460
    assert_uniform(blurred, 0, 1)
    for probability, count in ((0.0, 0), (0.9, 90)):
        config = dataclasses.replace(config, blur_probability=probability)
        assert abs(sum(g.blur > 0 for g in drawn_geometries(100, config)) - count) <= 8 * count / 90


def test_a_focus_lies_anywhere_in_the_crop():
    config = dataclasses.replace(BASE, scale_min=2.0, flip="none")  # 96x134 pixels
    drawn = drawn_geometries(400, config, focus=(30, 42))  # at (48.8, 67.8)
    assert_uniform([48.8 - g.top for g in drawn], 0, 40)
    assert_uniform([67.8 - g.left for g in drawn], 0, 40)


def test_a_crop_wider_than_high_is_the_square_ones_first_rows():
    """At the same place; beyond the image's right end it is padding."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 84, 3)).astype(np.uint8)
    label = rng.integers(0, 9, (60, 84)).astype(np.uint8)
    wide = dataclasses.replace(BASE, crop_size=24, crop_width=100)
    square = dataclasses.replace(BASE, crop_size=100)
    geometry = Geometry(60, 84, 0, 0)
    for ours, theirs in zip(
        cut(image, label, geometry, wide), cut(image, label, geometry, square), strict=True
    ):
        assert ours.shape[:2] == (24, 100)
        np.testing.assert_array_equal(ours, theirs[:24])
    drawn = [transforms.draw_geometry(np.random.default_rng(s), (60, 84), wide) for s in range(200)]
    assert all(g.left <= max(g.width - 100, 0) and g.top <= max(g.height - 24, 0) for g in drawn)
    assert max(g.top for g in drawn) > 60


def test_portrait_images_keep_their_short_side():
    assert transforms.resized_shape((84, 60, 3), 30) == (42, 30)
    assert transforms.resized_shape((60, 84), 30) == (30, 42)


def test_configuration_errors_name_the_field():
    data: Any = configuration.default().data
    assert Augmentation.from_config(data).crop_size == data.crop_size
    data.flip = "vertical"
    with pytest.raises(ValueError, match=r"data.flip = 'vertical'; allowed: left_right"):
        Augmentation.from_config(data)
    with pytest.raises(ValueError, match="crop_size = 0"):
        dataclasses.replace(BASE, crop_size=0)


@pytest.mark.parametrize("change", [{}, {"antialias": True}, {"rotate_degrees": 10.0}])
def test_only_the_part_that_the_crop_shows_is_read(change):
    """The same crop from a source whose unread pixels are overwritten, and less is read."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (400, 600, 3)).astype(np.uint8)
    label = rng.integers(0, 9, (400, 600)).astype(np.uint8)
    config = dataclasses.replace(BASE, base_size=400, crop_size=100, **change)
    shares = []
    for seed in range(8):
        boxes = []

        def read(box, boxes=boxes):
            boxes.append(box)
            top, left, bottom, right = box
            hidden, blank = np.full_like(image, 77), np.full_like(label, 200)
            hidden[top:bottom, left:right] = image[top:bottom, left:right]
            blank[top:bottom, left:right] = label[top:bottom, left:right]
            return reader(hidden, blank)(box)

        whole = transforms.train_transform(
            reader(image, label), label.shape, np.random.default_rng(seed), config
        )
        part = transforms.train_transform(read, label.shape, np.random.default_rng(seed), config)
        for a, b in zip(whole, part, strict=True):
            np.testing.assert_array_equal(a, b)
        assert (part[1] != 200).all()
        (box,) = boxes
        shares.append((box[2] - box[0]) * (box[3] - box[1]) / label.size)
    assert np.mean(shares) < 0.4


@pytest.mark.parametrize("flip", ["left_right", "up_down"])
def test_a_focus_lies_in_the_crop(flip):
    config = dataclasses.replace(BASE, flip=flip)
    label = np.zeros((60, 84), np.uint8)
    seen = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        y, x = int(rng.integers(60)), int(rng.integers(84))
        label[:] = 0
        label[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = 1  # survives shrinking by half
        geometry = transforms.draw_geometry(rng, label.shape, config, focus=(y, x))
        _, mask = cut(np.zeros((60, 84, 3), np.uint8), label, geometry, config)
        assert (mask == 1).any()
        seen.add((geometry.flipped, geometry.top > 0, geometry.left > 0))
    assert len(seen) > 5


def test_photometric_distortion_changes_colours_alone():
    image, label = blocks()
    config = dataclasses.replace(BASE, photometric_probability=1.0)
    for seed in range(6):
        crops = [
            transforms.train_transform(
                reader(image, label), label.shape, np.random.default_rng(seed), c
            )
            for c in (BASE, config)
        ]
        np.testing.assert_array_equal(crops[0][1], crops[1][1])
        assert (crops[0][0] != crops[1][0]).any()
        assert (crops[1][0][crops[1][1] == IGNORE] == 0).all()


def test_each_photometric_change_does_what_it_says():
    image = np.array([[[100, 100, 100], [200, 100, 50]]], np.uint8)
    assert transforms.distort(image, transforms.Colour()).tolist() == image.tolist()
    brighter = transforms.distort(image, transforms.Colour(brightness=20.0))
    assert (brighter == image + 20).all()
    contrast = transforms.distort(image, transforms.Colour(contrast=1.5))
    assert contrast.tolist() == [[[150, 150, 150], [255, 150, 75]]]
    grey = transforms.distort(image, transforms.Colour(saturation=0.0))
    assert grey.tolist() == [[[100, 100, 100], [200, 200, 200]]]
    turned = transforms.distort(image, transforms.Colour(hue=120.0))
    assert turned[0, 0].tolist() == [100, 100, 100]
    assert np.abs(turned[0, 1].astype(int) - [50, 200, 100]).max() <= 3


def test_photometric_changes_come_with_their_probability():
    drawn = [transforms.draw_colour(np.random.default_rng(s), 0.5) for s in range(300)]
    for field in dataclasses.fields(transforms.Colour):
        changed = [getattr(c, field.name) != field.default for c in drawn]
        assert 110 < sum(changed) < 190


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [("brightness", -32, 32), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5), ("hue", -36, 36)],
)
def test_photometric_changes_fill_the_ranges_of_ssd(field, low, high):
    drawn = [transforms.draw_colour(np.random.default_rng(s), 1.0) for s in range(400)]
    assert_uniform([getattr(colour, field) for colour in drawn], low, high)
