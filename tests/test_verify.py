"""data.verify: every bad file is found, good data are passed with their numbers."""

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import layouts
from duc_dlc_jax.data import builders, codec, verify
from duc_dlc_jax.data.labels import IGNORE, DataError, label_spec
from layouts import H, W, mask, picture, write
from runs import run

SHARED = os.environ.get("DUC_DLC_SHARED_DATA", "")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
    """A small prepared camvid: 2 train and 3 val images, of which val/c has tiles."""
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    return layouts.prepared(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def copied(data_dir, tmp_path) -> pathlib.Path:
    """A copy of the records' folder, to be damaged."""
    folder = builders.prepared_dir(tmp_path, "camvid")
    shutil.copytree(builders.prepared_dir(data_dir, "camvid"), folder)
    return folder


def spoiled(root: pathlib.Path) -> dict[str, set[str]]:
    """Makes a camvid with six bad files; returns them by kind of problem."""
    layouts.camvid(root)
    for name in "cd":
        write(root / "train" / f"{name}.png", picture())
        write(root / "trainannot" / f"{name}.png", mask(0, 99))
    (root / "train/a.png").write_bytes((root / "train/a.png").read_bytes()[:200])
    write(root / "trainannot/a.png", picture())
    write(root / "valannot/a.png", mask(0)[1:])
    (root / "valannot/b.png").write_bytes(b"")
    return {
        "unreadable image": {f"{root}/train/a.png"},
        "unreadable mask": {f"{root}/valannot/b.png"},
        "mode": {f"{root}/trainannot/a.png"},
        "size": {f"{root}/valannot/a.png"},
        "values": {f"{root}/trainannot/c.png", f"{root}/trainannot/d.png"},
    }


def test_every_bad_file_is_found_and_grouped(tmp_path):
    expected = spoiled(tmp_path)
    report = verify.verify_download("camvid", str(tmp_path))
    found = {kind: {p.file for p in problems} for kind, problems in report.by_kind().items()}
    assert found == expected
    assert all(problem.file in problem.message for problem in report.problems)
    assert {problem.split for problem in report.problems} == {"train", "val"}
    lines = report.lines(limit=1)
    assert "masks with values outside the contract: 2" in lines
    assert "  and 1 more; --json=FILE lists all" in lines
    assert sum("trainannot/d.png" in line for line in lines) == 0
    assert sum("trainannot/d.png" in line for line in report.lines(limit=2)) == 1


def test_the_command_names_all_and_ends_with_2_without_tensorflow(tmp_path, data_dir):
    expected = spoiled(tmp_path / "raw")
    flags = ["--dataset=camvid", f"--raw_dir={tmp_path / 'raw'}", f"--data_dir={data_dir}"]
    flags.append(f"--json={tmp_path / 'report.json'}")
    program = [sys.executable, "-m", "duc_dlc_jax.data.verify", *flags]
    done = run(program, check=False, tensorflow=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("error: 6 problem(s) in 6 file(s), listed above\n")
    for path in set.union(*expected.values()):
        assert path in done.stdout
    raw, records = json.loads((tmp_path / "report.json").read_text())
    assert raw["counts"] == {kind: len(files) for kind, files in expected.items()}
    assert {problem["file"] for problem in raw["problems"]} == set.union(*expected.values())
    assert (records["problems"], records["splits"]["val"]["images"]) == ([], 3)


def test_good_data_end_with_the_table_of_splits_and_classes(tmp_path, capsys):
    layouts.camvid(tmp_path)
    verify.verify("camvid", str(tmp_path), None, "", 20)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"camvid in {tmp_path}: 4 images, problems: 0"
    third = H * W // 3
    assert f"train{2:>15}{2:>10}{'3 of 11':>15}{1 / 3:>10.2%}" in lines
    assert f" 10  {'bicyclist':<28}{2 * third:>20}{2 * third:>20}  10" in lines
    assert f"255  {'ignored':<28}{2 * third:>20}{2 * third:>20}  11" in lines
    assert "split train: 2 images, officially 367" in lines


def test_images_without_labels_are_checked_too(tmp_path):
    layouts.cityscapes(tmp_path)
    assert verify.verify_download("cityscapes", str(tmp_path)).splits["test"]["labelled"] == 0
    path = next(tmp_path.rglob("test/*/*.png"))
    path.write_bytes(path.read_bytes()[:-30])
    (problem,) = verify.verify_download("cityscapes", str(tmp_path)).problems
    assert (problem.split, problem.file, problem.kind) == ("test", str(path), "unreadable image")


def test_a_flipped_bit_in_a_png_is_found(tmp_path):
    """Its checksum tells, where the pixels can still be decoded and are wrong."""
    layouts.camvid(tmp_path)
    path = tmp_path / "valannot" / "b.png"
    path.write_bytes(next(_decodable_but_wrong(path.read_bytes())))
    (problem,) = verify.verify_download("camvid", str(tmp_path)).problems
    assert (problem.file, problem.kind) == (str(path), "unreadable mask")


def _decodable_but_wrong(good: bytes):
    """Yields versions of a PNG with a flipped bit that Pillow decodes to other pixels."""
    pixels = np.array(Image.open(io.BytesIO(good)))
    for bit in range(8 * good.index(b"IDAT") + 32, 8 * good.index(b"IEND") - 64):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(OSError, SyntaxError):
            if (np.array(Image.open(io.BytesIO(data))) != pixels).any():
                yield bytes(data)


def test_drawn_scenes_need_no_files(monkeypatch):
    from duc_dlc_jax.data.builders import scenes

    monkeypatch.setattr(scenes, "COUNTS", {"train": 3, "val": 2})
    report = verify.verify_download("scenes", None)
    assert report.problems == []
    assert sum(report.splits["train"]["pixels"]) == 3 * scenes.HEIGHT * scenes.WIDTH


def test_what_to_check_must_be_said(tmp_path):
    with pytest.raises(DataError, match="--dataset=NAME --raw_dir=DIR, or --data_dir=DIR"):
        verify.verify(None, str(tmp_path), None, "", 20)
    with pytest.raises(DataError, match=r"no prepared records in .*data\.prepare --dataset=NAME"):
        verify.verify(None, None, str(tmp_path), "", 20)


def test_good_records_pass(data_dir, capsys):
    verify.verify(None, None, str(data_dir), "", 20)
    out = capsys.readouterr().out
    assert "camvid/2.0.0: 5 images, problems: 0" in out
    report = verify.verify_records(builders.prepared_dir(data_dir, "camvid"))
    assert report.splits["val"]["pixels"][4] == 1100 * 1000 // 2


def only_problem(folder: pathlib.Path) -> verify.Problem:
    (problem,) = verify.verify_records(folder).problems
    assert problem.kind == verify.RECORD
    return problem


def test_a_damaged_record_is_named(copied):
    path = next(copied.glob("*-train.array_record*"))
    data = bytearray(path.read_bytes())
    data[100:2000] = bytes(1900)
    path.write_bytes(data)
    problems = verify.verify_records(copied).problems
    assert problems
    assert all(problem.message.startswith("record ") for problem in problems)
    assert {problem.split for problem in problems} == {"train"}


def test_labels_outside_the_contract_are_named(copied):
    spec = json.loads((copied / builders.SPEC_FILE).read_text())
    for name in ("classes", "palette", "submission_ids"):
        spec[name].pop()
    spec["raw_to_train"]["10"] = IGNORE
    (copied / builders.SPEC_FILE).write_text(json.dumps(spec))
    problems = verify.verify_records(copied).problems
    assert len(problems) == 4  # val/c has no bicyclist
    assert "record 1 of " in problems[-1].message
    assert problems[-1].message.endswith("train ids [10]; allowed: 0..9, 255")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("images", "9 images, in the records 3"),
        ("labelled", "9 labelled, in the records 3"),
        ("pixels", r"pixels of the train ids \[9\] are not those"),
    ],
)
def test_a_wrong_summary_is_named(copied, key, message):
    path = copied / builders.SUMMARY_FILE
    summary = json.loads(path.read_text())
    if key == "pixels":
        summary["val"]["pixels"][9] += 9
    else:
        summary["val"][key] = 9
    path.write_text(json.dumps(summary))
    if key == "images":  # more than the index has
        assert all("record " in p.message for p in verify.verify_records(copied).problems)
        assert len(verify.verify_records(copied).problems) == 6
    else:
        assert re.search(message, only_problem(copied).message)


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("size", np.array([[0, 0], [0, 0], [-1, 0]]), "record 2 .*its tiles"),
        ("size", np.array([[0, -1], [0, 0], [0, 0]]), r"record 0 .*\(0, 0, 12, 15\)"),
        ("points", np.array([0, 1, 0, 0]), "pixels of classes that the label has not there"),
    ],
)
def test_a_wrong_index_is_named(copied, table, change, message):
    path = copied / builders.index_file("val")
    with np.load(path) as file:
        tables = dict(file)
    tables[table] = tables[table] + change
    np.savez(path, **tables)
    problems = verify.verify_records(copied).problems
    assert problems
    assert re.search(message, problems[0].message)


@pytest.mark.parametrize(("stored", "problems"), [(picture(), 0), (picture()[:, 1:], 1)])
def test_a_stored_image_of_another_size_is_named(stored, problems):
    tile = {"image": codec.encode_image(stored, "png"), "encoding": b"png", "name": b"a"}
    tile |= {"label": mask(0).tobytes(), "top": 0, "left": 0, "height": H, "width": W}
    records: Any = SimpleNamespace(
        folder="data", split="val", spec=label_spec("camvid"), size=lambda _: (H, W)
    )
    records.tiles = lambda _: [tile]
    found = verify.check_record(records, [np.zeros((0, 3), np.int32)], 0).problems
    assert len(found) == problems
    assert all("its image is (12, 15), by its record (12, 16)" in text for _, _, text in found)


def test_missing_parts_of_records_are_named(copied):
    (copied / builders.index_file("val")).unlink()
    assert "index-val.npz" in only_problem(copied).message
    (copied / builders.SPEC_FILE).write_text("{")
    with pytest.raises(DataError, match="delete this folder and prepare it again"):
        verify.verify_records(copied)


@pytest.mark.real_data
@pytest.mark.skipif(not SHARED, reason="DUC_DLC_SHARED_DATA is not set: no real CamVid")
def test_real_camvid_passes_with_its_numbers():
    report = verify.verify_download("camvid", str(pathlib.Path(SHARED) / "camvid"))
    assert report.problems == []
    for split, images in (("train", 367), ("val", 101)):
        row = report.splits[split]
        assert (row["images"], row["labelled"]) == (images, images)
        assert sum(row["pixels"]) == images * 360 * 480
        assert all(row["pixels"][:11])
