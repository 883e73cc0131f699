"""Files of classes: every bad entry to its message; the forms that hold are in test_folders.py."""

import json

import pytest

from duc_dlc_jax.data import classes
from duc_dlc_jax.data.labels import DataError


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"a": 0, "b": "red"}, r"entry 1, 'b': color 'red'; allowed: \"#RRGGBB\""),
        ({"a": 0, "b": 1.5}, r"entry 1, 'b': color 1.5"),
        ([{"name": "a", "color": [255.0, 0, 0]}], r"entry 0, 'a': color \[255.0, 0, 0\]; allowed"),
        (["a", 3], "entry 1, None: not understood"),
        ([{"name": "a", "id": 0}, {"name": "b"}], "entry 1, 'b': has neither id nor color"),
        ({"1": "a", "2": 3}, "entry 0, '1': color 'a'"),
        ([{"name": "a", "id": -1}, "b"], "entry 0, 'a': id -1; allowed: whole numbers 0..65535"),
        (
            [{"name": "a", "id": 0, "colr": 1}],
            r"entry 0, 'a': not understood \(unknown: \['colr'\]",
        ),
        ([{"name": "a", "id": 0, "ignore": "yes"}], "\"ignore\" is 'yes'; allowed: true, false"),
        (["a", "b", "a"], r"a occurs twice \(a, a\)"),
        ([{"name": "a", "id": 4}, {"name": "b", "id": 4}], r"4 occurs twice \(a, b\)"),
        ({"a": 0, "b": "#FF0000"}, "some entries have ids, others colours"),
        (["a", "void"], "1 classes that are not ignored; allowed: 2..255"),
        ("cat", "holds 'cat'; allowed: a list of names"),
    ],
)
def test_bad_files_of_classes(tmp_path, declared, message):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(declared))
    with pytest.raises(DataError, match=message) as error:
        classes.read_classes(path)
    assert str(path) in str(error.value)


def test_unreadable_files_of_classes(tmp_path):
    (tmp_path / "c.json").write_text('{"a": 1')
    with pytest.raises(DataError, match="not readable as JSON"):
        classes.read_classes(tmp_path / "c.json")
    (tmp_path / "c.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(DataError, match="a occurs twice"):
        classes.read_classes(tmp_path / "c.json")
    with pytest.raises(FileNotFoundError, match="--classes="):
        classes.read_classes(tmp_path / "none.json")
