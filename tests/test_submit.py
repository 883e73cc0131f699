"""Archives for the benchmarks' servers, read back as the servers would."""

from __future__ import annotations

import fnmatch
import io
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from PIL import Image

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import submit
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import DataError, label_spec


def examples(names, classes, size=(6, 9)):
    rng = np.random.default_rng(0)
    for name in names:
        yield {"name": name, "prediction": rng.integers(0, classes, size).astype(np.uint8)}


def read(path):
    with zipfile.ZipFile(path) as archive:
        return {n: Image.open(io.BytesIO(archive.read(n))) for n in archive.namelist()}


def test_cityscapes_archive_holds_label_ids(tmp_path):
    spec, path = label_spec("cityscapes"), tmp_path / "out" / "cityscapes.zip"
    names = ["berlin_000000_000019", "bielefeld/bielefeld_000000_012345"]
    submit.write_archive(path, spec, examples(names, 19), 2)
    files = read(path)
    assert sorted(files) == [
        "berlin_000000_000019_labelIds.png",
        "bielefeld_000000_012345_labelIds.png",
    ]
    assert fnmatch.filter(files, "berlin_000000_000019*.png")  # what cityscapesScripts looks for
    for written, example in zip(files.values(), examples(names, 19), strict=True):
        assert written.mode == "L"
        expected = np.asarray(spec.submission_ids)[example["prediction"]]
        np.testing.assert_array_equal(np.asarray(written), expected)
    assert list(path.parent.iterdir()) == [path]


def test_ade20k_archive_holds_1_to_150(tmp_path):
    path = tmp_path / "ade20k.zip"
    names = [f"ADE_test_{i:08d}" for i in range(1, 30)]
    submit.write_archive(path, label_spec("ade20k"), examples(names, 150, (12, 20)), 29)
    files = read(path)
    assert sorted(files) == [f"{name}.png" for name in names]
    assert set(np.unique(np.stack(list(files.values())))) == set(range(1, 151))


def test_other_data_sets_have_no_archive(tmp_path):
    with pytest.raises(ConfigError, match=r"data set 'camvid'; there are: cityscapes, ade20k"):
        submit.write_archive(tmp_path / "x.zip", label_spec("camvid"), [], 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["berlin_19"], r"record 'berlin_19' has no name of the benchmark"),
        (["berlin_000000_000019"] * 2, "two records are named berlin_000000_000019"),
        (["berlin_000000_000019"], r"x\.zip: 1 predictions for 2 images"),
    ],
)
def test_what_the_server_would_refuse_gets_no_archive(tmp_path, names, message):
    spec = label_spec("cityscapes")
    with pytest.raises(DataError, match=message):
        submit.write_archive(tmp_path / "x.zip", spec, examples(names, 19), 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((6, 9), np.uint8), r"has ids \[0\], which are no class's"),
        (np.full((6, 8), 7, np.uint8), r"is L \(6, 8\), not 8-bit grey \(6, 9\)"),
        (np.full((6, 9, 3), 7, np.uint8), r"is RGB .*, not 8-bit grey"),
    ],
)
def test_a_wrong_archive_is_found_out(tmp_path, pixels, message):
    path = tmp_path / "x.zip"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", buffer.getvalue())
    spec = label_spec("cityscapes")
    with pytest.raises(DataError, match=message):
        submit.check_archive(path, spec, {"a.png": (6, 9)})
    with pytest.raises(DataError, match=r"1 files for 2 images; \['b\.png'\]"):
        submit.check_archive(path, spec, {"a.png": (6, 9), "b.png": (6, 9)})


def test_the_command_labels_by_its_protocol(tmp_path, monkeypatch, capsys):
    made, spec, config = [], label_spec("ade20k"), config_lib.default()
    config.eval.batch_size = 2
    run = SimpleNamespace(config=config, spec=spec, model="network", variables={})

    class Images(list):
        def sizes(self):
            return [(6, 9)] * len(self)

    class Evaluator:
        def __init__(self, *args):
            made.append(args)

        def predictions(self, variables, examples):
            return examples

    images = Images(examples([f"ADE_test_{i:08d}" for i in (1, 2)], 150))
    monkeypatch.setattr(submit, "open_run", lambda args, path: (run, images))
    monkeypatch.setattr(submit, "Evaluator", Evaluator)
    monkeypatch.setattr(submit.pipeline, "eval_examples", lambda records: records)
    output = tmp_path / "ade20k.zip"
    args = {"workdir": "run", "split": "test", "output": str(output), "protocol": "sliding"}
    args |= {"set": ["crop_size=128", "stride=96"]}
    monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(**args))
    submit.main([])
    ((model, classes, batch, protocol),) = made
    assert (model, classes, batch) == ("network", spec, 2)
    assert (protocol.mode, protocol.crop_size, protocol.stride) == ("sliding", 128, 96)
    assert sorted(read(output)) == ["ADE_test_00000001.png", "ADE_test_00000002.png"]
    said = f"2 images of test in {output}, checked; single scale, windows of 128 pixels at stride"
    assert capsys.readouterr().out.startswith(f"{said} 96,")
