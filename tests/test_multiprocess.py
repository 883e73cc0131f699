"""Two processes with two CPU devices each against one process with four."""

import json
import shutil

import numpy as np
import pytest

from runs import TINY, command, run, run_two, saved_state, untrained_workdir

pytestmark = pytest.mark.multiprocess


def last_scores(workdir):
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def largest_difference(first, second):
    """Of any array of the two states, relative to the largest value of that array."""
    assert first.keys() == second.keys()
    return max(
        float(np.max(np.abs(first[k] - second[k])) / max(np.max(np.abs(first[k])), 1e-30))
        for k in first
        if first[k].size
    )


# Of 8 images, the last batch of a process is never full.
CHANGES = {"train__steps": 4, "optimizer__learning_rate": 1e-3, "eval__batch_size": 3}
FLOAT64 = {
    "model__dtype": "float64",
    "eval__mode": "sliding",
    "eval__crop_size": 160,
    "data__on_device": True,
}


def one_process(few_scenes, workdir, **changes):
    result = run(command(few_scenes, workdir, **CHANGES | changes), devices=4)
    assert ", 4 cpu device(s)" in result.stderr
    return result


@pytest.fixture(scope="module")
def one(few_scenes, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    one_process(few_scenes, workdir, **FLOAT64)
    return workdir


def assert_equal(one, two, tolerance):
    difference = largest_difference(saved_state(one, 4), saved_state(two, 4))
    print(f"largest relative difference {difference:.2e}; losses {losses(two)}")
    assert difference <= tolerance
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert len(losses(two)) > 0
    first, second = last_scores(one), last_scores(two)
    assert first["val/mIoU"] == pytest.approx(second["val/mIoU"], abs=1e-4)
    assert first["val/PA"] == pytest.approx(second["val/PA"], abs=1e-4)


def test_two_processes_equal_one_and_resume_as_one(few_scenes, one, tmp_path):
    """A run saved by two processes goes on in one, with the crops that come next."""
    run_two(few_scenes, tmp_path, **CHANGES | FLOAT64)
    assert_equal(one, tmp_path, 1e-10)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    result = one_process(few_scenes, tmp_path, **FLOAT64)
    assert "resuming from step 2" in result.stderr
    assert_equal(one, tmp_path, 1e-10)


def test_rows_of_an_image_in_two_processes_train_as_whole_ones(few_scenes, one, tmp_path):
    run_two(few_scenes, tmp_path, **CHANGES | FLOAT64, mesh__space=4)
    assert_equal(one, tmp_path, 1e-10)


def test_two_processes_start_from_a_run_as_one(few_scenes, tmp_path):
    """config.init.checkpoint: every process reads it, and none writes to it. In float32."""
    fields = {name[6:]: value for name, value in TINY.items() if name.startswith("model.")}
    start = untrained_workdir(tmp_path / "start", fields)
    before = sorted(path.name for path in start.iterdir())
    result = one_process(few_scenes, tmp_path / "one", init__checkpoint=start)
    assert "the network of step 0" in result.stderr
    run_two(few_scenes, tmp_path / "two", **CHANGES, init__checkpoint=start)
    assert_equal(tmp_path / "one", tmp_path / "two", 1e-5)
    assert sorted(path.name for path in start.iterdir()) == before


def test_batch_that_does_not_divide_ends_with_the_arithmetic(few_scenes, tmp_path):
    result = run(command(few_scenes, tmp_path, train__batch_size=6), devices=4, check=False)
    assert result.returncode == 2
    assert "6 = 1 x 4 + 2; use 4 or 8" in result.stderr.replace("(", "").replace(")", "")
