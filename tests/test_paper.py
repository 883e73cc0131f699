"""The paper's tables: its figures, the trainings behind them, and the page."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
from absl import flags
from ml_collections import config_flags

from duc_dlc_jax import cli, hours
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.records import find_spec
from duc_dlc_jax.models import counts, segmenter
from duc_dlc_jax.paper import __main__ as paper
from duc_dlc_jax.paper.tables import LEFT_OPEN, SLIPS, TABLES, Row
from networks import PARAMETERS
from repository import ROOT, tracked_texts

ROWS = [row for table in TABLES for row in table.rows]
RUNS = list(dict.fromkeys(row.run for row in ROWS if row.run))
CLASSES = {"ade20k": 0, "pascal_context": 1, "cityscapes": 2}  # columns of PARAMETERS


# The paper's figures


def test_final_scores_are_the_means_that_the_paper_says():
    """To its rounding: (a + b) / 2 ends in 5 where a + b is odd."""
    full = [row for row in ROWS if row.final is not None]
    assert len(full) == 22
    for row in full:
        assert row.final == pytest.approx((row.miou + row.pa) / 2, abs=0.0051), row


def test_slips_that_can_be_computed():
    """CCL: four 3x3, 9 cells, then a rate of 18, 37 cells: 45, not 49, which is a rate of 24."""
    assert counts.receptive_field([24]) == [49]
    assert counts.receptive_field([1] * 4 + [18])[-1] == 45
    ours = [row for row in ROWS if (row.run, row.protocol) == ("ade20k_r101", "multi_scale")]
    assert round(ours[1].miou - ours[0].miou, 2) == 1  # of Tables II and I
    assert ours[0].pa == ours[1].pa
    assert all(len(slip) == 3 and all(slip) for slip in SLIPS)


def test_the_figures_are_in_one_place():
    """Of the paper's own network: the table and the page made from it, and nowhere else."""
    figures = {f"{row.miou:.2f}" for row in ROWS if row.run and row.pa}
    figures |= {f"{row.pa:.2f}" for row in ROWS if row.run and row.pa}
    allowed = {"duc_dlc_jax/paper/tables.py", "docs/results/paper.md"}
    for path, text in tracked_texts():
        if path.suffix in (".py", ".md") and path.as_posix() not in allowed:
            found = {x for x in figures if re.search(rf"(?<![\d.]){re.escape(x)}(?!\d)", text)}
            assert len(found) < 2, f"{path} repeats figures of the paper: {sorted(found)}"


# The trainings


@pytest.mark.parametrize("run", RUNS)
def test_a_training_has_the_network_of_its_row(run):
    """Valid as it is, with the parameters of docs/network.md."""
    config = config_lib.load(f"configs/paper.py:{run}")
    name, _, depth = run.rpartition("_r")
    assert config.data.name == name
    model = segmenter.create(config.model, find_spec(config.data).num_classes)
    assert sum(counts.parameters(model).values()) == PARAMETERS[int(depth)][CLASSES[name]]
    assert config.optimizer.learning_rate == 1e-3
    assert bool(config.init.weights) == (int(depth) != 269)
    assert config.data.antialias  # as the code base, which every other choice follows


def test_a_wrong_name_after_the_colon_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli.flags, "FLAGS", flags.FlagValues())
    config_flags.DEFINE_config_file("config", None, "", cli.flags.FLAGS)
    with pytest.raises(SystemExit) as end:
        cli._parse(["main", "--config=configs/paper.py:r50"])
    assert end.value.code == 2
    expected = f"error: configs/paper.py:r50; allowed: {', '.join(RUNS)}\n"
    assert capsys.readouterr().err == expected
    cli._parse(["main", "--config=configs/paper.py:ade20k_r152"])
    assert cli.flags.FLAGS.config.model.depth == 152


# Hours


def test_hours_are_measured_where_the_shapes_are_and_extrapolated_elsewhere():
    found = hours.predict(config_lib.load("configs/paper.py:ade20k_r50"))
    images = 151_575 * 16  # 20,210 images, 120 epochs
    assert found["images"] == images
    first, second, _, cpu = found["devices"]
    assert first["hours"] == pytest.approx(images / 323 / 3600)
    assert cpu["hours"] == pytest.approx(images * 1.11 / 3600)
    assert [row["extrapolated"] for row in (first, second, cpu)] == [False, True, False]
    deep = hours.predict(config_lib.load("configs/paper.py:ade20k_r101"))
    ratio = deep["devices"][0]["hours"] / first["hours"]
    assert ratio == pytest.approx(51.038 / 33.992, rel=1e-4)
    assert all(row["extrapolated"] for row in deep["devices"])
    text = hours.text(deep)
    assert "3.1 h  extrapolated by multiply-adds from one NVIDIA H100" in text
    for constant in ("323 images/s at 33.99 GMACs", "2,425,200 images of 51.04 GMACs", "TPU v5e"):
        assert constant in text


def test_hours_of_unknown_images_are_refused():
    config = config_lib.load("configs/demo.py")
    assert hours.predict(config)["images"] == 340 * 16
    config.train.steps, config.train.epochs, config.data.train_split = 0, 2.0, "mine"
    with pytest.raises(ConfigError, match=r"images of 'scenes', mine is not known here: set train"):
        hours.predict(config)


# The page


def test_the_page_is_what_the_command_writes():
    written = (ROOT / "docs" / "results" / "paper.md").read_text()
    assert written == paper.page(ROOT / "docs" / "results" / "paper"), (
        "run python -m duc_dlc_jax.paper --output=docs/results/paper.md"
    )


OURS = Row("Ours", 40.0, 80.0, 60.0, "ade20k_r50", "single")
STEPS = {"ade20k_r50": 151_575, "pascal_context_r101": 24_990}
WHOLE = "whole image at its own size, logits resized to the label"
SINGLE = {"protocol": f"single scale, {WHOLE}", "images": 2000}


def test_the_page_tests_the_last_step_and_names_what_is_left_open():
    """`best`, the default, would choose by the images that are reported."""
    text = paper.page(ROOT / "docs" / "results" / "paper")
    commands = re.findall(r"^\$ .*(?:evaluate|submit) .*\n.*", text, re.M)
    assert len(commands) == 2
    assert all("--checkpoint=latest" in command for command in commands)
    for field in ("data.antialias", "data.blur_probability=0.5", "data.rotate_degrees=10"):
        assert any(field in line and "[C]" in line for line in LEFT_OPEN)


def finished(folder, miou=40.0, pa=80.0, run="ade20k_r50", written=(), tested=(), **changes):
    """What `evaluate` writes for a run of configs/paper.py; figures in percent.

    written, tested: what is otherwise in the file and in its figures; changes: of configuration.
    """
    config = config_lib.load(f"configs/paper.py:{run}")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    figures = SINGLE | {"mIoU": miou / 100, "PA": pa / 100} | dict(tested)
    content = {"step": STEPS[run], "checkpoint": "latest", "split": "val"}
    shared = {name: value for name, value in config.to_dict().items() if name != "eval"}
    content |= {"protocols": {"single": figures}, "config": shared} | dict(written)
    (folder / f"{run}.json").write_text(json.dumps(content))
    return paper.finished(folder, run)


def test_a_finished_run_is_reproduced_or_different_and_how(tmp_path):
    assert paper.verdict(OURS, None, False).startswith("not run: needs the data set")
    elsewhere = {"seed": 3, "data__dir": "elsewhere", "init__weights": "mine.npz"}
    told = paper.verdict(OURS, finished(tmp_path, 40.25, 79.6, **elsewhere), False)
    assert told == "reproduced: mIoU 40.25 (+0.25), PA 79.60 (-0.40)"
    told = paper.verdict(OURS, finished(tmp_path, 39.0, 80.0), False)
    assert told == "different: mIoU 39.00 (-1.00), PA 80.00 (+0.00)"
    told = paper.verdict(OURS, finished(tmp_path, data__flip="none"), True)
    assert told.endswith("; data.flip='none'; on val, not by the test server")
    multi = dataclasses.replace(OURS, protocol="multi_scale")
    assert "lacks multi_scale" in paper.verdict(multi, finished(tmp_path), False)


@pytest.mark.parametrize(
    ("had", "how"),
    [
        ({"written": {"step": 1}}, "step 1 of 151,575"),
        ({"written": {"step": 200}, "train__steps": 200}, "train.steps=200"),
        ({"train__batch_size": 64}, "train.batch_size=64; step 151,575 of 37,894"),
        ({"written": {"checkpoint": "best"}}, "checkpoint=best"),
        ({"written": {"checkpoint": "bundle"}}, "checkpoint=bundle"),
        ({"written": {"checkpoint": "151575"}}, ""),
        ({"init__weights": ""}, "from scratch"),
        ({"init__weights": "", "init__checkpoint": "old"}, "init.checkpoint='old'"),
        ({"data__antialias": False}, "data.antialias=False"),
        (
            {"tested": {"protocol": f"scales 1 2, {WHOLE}"}},
            f"tested by: scales 1 2, {WHOLE}",
        ),
        ({"tested": {"images": 3}}, "on 3 images of val, not 2,000 of val"),
        ({"written": {"split": "train"}}, "on 2,000 images of train, not 2,000 of val"),
    ],
)
def test_only_the_whole_training_tested_as_its_row_is_reproduced(tmp_path, had, how):
    told = paper.verdict(OURS, finished(tmp_path, **had), False)
    figures = "mIoU 40.00 (+0.00), PA 80.00 (+0.00)"
    assert told == (f"different: {figures}; {how}" if how else f"reproduced: {figures}")


@pytest.mark.parametrize(("short", "word"), [(2, "reproduced"), (3, "different")])
def test_known_releases_may_lack_images(tmp_path, short, word):
    """PASCAL-Context's, two of each split; an epoch of 4,996 images makes fewer steps."""
    row = dataclasses.replace(OURS, run="pascal_context_r101")
    written = {"step": math.ceil(80 * (4998 - short) / 16)}
    made = finished(tmp_path, run=row.run, written=written, tested={"images": 5105 - short})
    assert paper.verdict(row, made, False).startswith(word)


@pytest.mark.parametrize("key", paper.EVALUATED)
def test_a_file_that_lacks_what_a_verdict_needs_is_refused(tmp_path, key):
    finished(tmp_path)
    path = tmp_path / "ade20k_r50.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"json lacks {key}: python -m duc_dlc_jax\.eval"):
        paper.finished(tmp_path, "ade20k_r50")
