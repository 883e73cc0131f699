"""Two processes with two CPU devices each against one process with four."""

import json
import shutil

import numpy as np
import pytest

from runs import command, run, run_two, saved_state

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
FLOAT64 = {"model__dtype": "float64", "eval__mode": "sliding", "eval__crop_size": 160}


def one_process(few_scenes, workdir, **changes):
    result = run(command(few_scenes, workdir, **CHANGES | changes), devices=4)
    assert ", 4 cpu device(s)" in result.stderr
    return result


@pytest.fixture(scope="module")
def one(few_scenes, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    one_process(few_scenes, workdir, data__on_device=True)
    return workdir


@pytest.fixture(scope="module")
def one_float64(few_scenes, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("float64")
    one_process(few_scenes, workdir, **FLOAT64)
    return workdir


def assert_equal(one, two, step, tolerance):
    difference = largest_difference(saved_state(one, step), saved_state(two, step))
    print(f"largest relative difference {difference:.2e}; losses {losses(two)}")
    assert difference <= tolerance
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert len(losses(two)) > 0
    first, second = last_scores(one), last_scores(two)
    assert first["val/mIoU"] == pytest.approx(second["val/mIoU"], abs=1e-4)
    assert first["val/PA"] == pytest.approx(second["val/PA"], abs=1e-4)


@pytest.mark.parametrize("space", [1, 4])  # 4: the rows of an image lie in both processes
def test_two_processes_equal_one(few_scenes, one_float64, tmp_path, space):
    changes = CHANGES | FLOAT64 | {"data__on_device": space > 1, "mesh__space": space}
    run_two(few_scenes, tmp_path, **changes)
    assert_equal(one_float64, tmp_path, 4, 1e-10)


def test_two_processes_resume_as_one(few_scenes, one, tmp_path):
    """Two processes equal one, and the run goes on in one, with the crops that come next."""
    run_two(few_scenes, tmp_path, **CHANGES, data__on_device=True)
    assert_equal(one, tmp_path, 2, 1e-5)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    result = one_process(few_scenes, tmp_path, data__on_device=True)
    assert "resuming from step 2" in result.stderr
    assert largest_difference(saved_state(one, 4), saved_state(tmp_path, 4)) <= 1e-5


def test_two_processes_start_from_a_run_as_one(few_scenes, one, tmp_path):
    """config.init.checkpoint: every process reads it, and none writes to it."""
    before = sorted(path.name for path in one.iterdir())
    result = one_process(few_scenes, tmp_path / "one", init__checkpoint=one)
    assert "the network of step 4" in result.stderr
    run_two(few_scenes, tmp_path / "two", **CHANGES, init__checkpoint=one)
    first, second = (saved_state(tmp_path / name, 2) for name in ("one", "two"))
    assert largest_difference(first, second) <= 1e-5
    assert sorted(path.name for path in one.iterdir()) == before


def test_batch_that_does_not_divide_ends_with_the_arithmetic(few_scenes, tmp_path):
    result = run(command(few_scenes, tmp_path, train__batch_size=6), devices=4, check=False)
    assert result.returncode == 2
    assert "6 = 1 x 4 + 2; use 4 or 8" in result.stderr.replace("(", "").replace(")", "")
