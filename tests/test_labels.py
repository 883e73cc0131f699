"""The label contract."""

import json

import numpy as np
import pytest

from duc_dlc_jax.data.labels import (
    IGNORE,
    DataError,
    LabelSpec,
    label_spec,
    named_or_read,
    voc_colour,
)

CLASSES = {
    "camvid": 11,
    "cityscapes": 19,
    "ade20k": 150,
    "pascal_context": 59,
    "pascal_context_60": 60,
    "scenes": 8,
    "voc": 21,
}


@pytest.mark.parametrize("name", CLASSES)
def test_specification_is_complete_and_survives_json(name):
    spec = label_spec(name)
    assert spec.num_classes == CLASSES[name] == len(set(spec.classes))
    assert sorted(set(spec.raw_to_train.values()) - {IGNORE}) == list(range(spec.num_classes))
    assert LabelSpec.from_json(spec.to_json()) == spec
    assert json.loads(spec.to_json())["name"] == name


def test_known_ids_of_each_data_set():
    raw = np.array([[0, 7, 33, 8]], np.uint8)
    assert label_spec("cityscapes").encode(raw).tolist() == [[IGNORE, 0, 18, 1]]
    assert label_spec("cityscapes").submission_ids[18] == 33
    assert label_spec("ade20k").encode(np.array([[0, 1, 150]])).tolist() == [[IGNORE, 0, 149]]
    assert label_spec("ade20k").classes[:3] == ("wall", "building", "sky")
    assert label_spec("camvid").encode(np.array([[0, 10, 11]])).tolist() == [[0, 10, IGNORE]]


def test_background_of_pascal_context_is_ignored_or_class_zero():
    raw = np.array([[0, 1, 59]], np.uint8)
    assert label_spec("pascal_context").encode(raw).tolist() == [[IGNORE, 0, 58]]
    assert label_spec("pascal_context_60").encode(raw).tolist() == [[0, 1, 59]]
    assert label_spec("pascal_context").classes[0] == "aeroplane"
    assert label_spec("pascal_context").palette[0] == voc_colour(1) == (128, 0, 0)
    assert voc_colour(15) == (192, 128, 128)


def test_value_outside_the_contract_is_named_with_the_allowed_ones():
    spec = label_spec("ade20k")
    assert spec.unknown(np.array([[0, 151, 200, 151]])) == [151, 200]
    with pytest.raises(DataError, match=r"151, 200 .*ade20k; allowed: 0\.\.150"):
        spec.encode(np.array([[0, 151, 200]]))


def test_colour_masks_of_camvid_give_the_same_classes():
    spec = label_spec("camvid", "colours")
    assert (spec.colours, len(spec.raw_to_train)) == (True, 32)
    raw = np.array([[0x808080, 0xC00080, 0x8000C0, 0x000000]], np.int32)
    assert spec.encode(raw).tolist() == [[0, 1, 3, IGNORE]]  # sky, archway, lane marking, void
    for train, (r, g, b) in enumerate(spec.palette):
        assert spec.raw_to_train[r << 16 | g << 8 | b] == train
    assert LabelSpec.from_json(spec.to_json()) == spec
    with pytest.raises(DataError, match=r"label values #010203 .*allowed: #000000, #000040"):
        spec.encode(np.array([[0x010203]], np.int32))


def test_masks_that_hold_train_ids_already():
    spec = label_spec("cityscapes", "train_ids")
    assert spec.encode(np.array([[0, 18, 255]], np.uint8)).tolist() == [[0, 18, IGNORE]]
    with pytest.raises(DataError, match=r"label values 19 .*allowed: 0\.\.18, 255"):
        spec.encode(np.array([[19]], np.uint8))
    assert spec.submission_ids == label_spec("cityscapes").submission_ids


@pytest.mark.parametrize(
    ("name", "background"), [("pascal_context", IGNORE), ("pascal_context_60", 0)]
)
def test_the_459_categories_of_pascal_context_fold_into_the_classes(name, background):
    spec = label_spec(name, "source_ids")
    first = 0 if name == "pascal_context" else 1
    raw = np.array([[2, 9, 458, 0, 1, 459]], np.uint16)
    rest = [background] * 3
    assert spec.encode(raw).tolist() == [[first, first + 1, first + 58, *rest]]
    assert set(spec.raw_to_train) == set(range(460))


def test_the_mapping_shows_where_every_raw_id_goes():
    rows = label_spec("cityscapes").mapping()
    assert rows[0] == (0, "road", "7")
    assert rows[-1] == (IGNORE, "ignored", "0..6, 9..10, 14..16, 18, 29..30")
    assert (5, "tree", "#808000, #c0c000") in label_spec("camvid", "colours").mapping()
    assert len(label_spec("pascal_context_60").mapping()) == 60


def test_colourise_uses_the_palette_and_paints_ignore_black():
    picture = label_spec("cityscapes").colourise(np.array([[0, 13, IGNORE]], np.uint8))
    assert picture.dtype == np.uint8
    assert picture.tolist() == [[[128, 64, 128], [0, 0, 142], [0, 0, 0]]]


def test_unknown_name_gives_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'cityscapes'"):
        label_spec("cityscape")
    with pytest.raises(ValueError, match=r"valid names: .*, scenes, or that of folders"):
        label_spec("voce")
    with pytest.raises(ValueError, match=r"mean 'voc'.*, scenes, voc, or a file labels\.json"):
        named_or_read("voce")


def test_contradictory_specification_is_refused():
    with pytest.raises(ValueError, match="2 classes, 1 palette"):
        LabelSpec("x", ("a", "b"), ((0, 0, 0),), {0: 0, 1: 1}, (0, 1))
    with pytest.raises(ValueError, match=r"not reached: \[1\]"):
        LabelSpec("x", ("a", "b"), ((0, 0, 0), (1, 1, 1)), {0: 0, 1: 255}, (0, 1))
