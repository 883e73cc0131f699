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


@pytest.mark.parametrize(
    ("dtype", "tolerance", "mode", "space"),
    [
        ("float32", 1e-5, "whole", 1),
        ("float64", 1e-10, "sliding", 1),
        ("float64", 1e-10, "whole", 4),  # the rows of an image lie in both processes
    ],
)
def test_two_processes_equal_one(scenes_dir, tmp_path, dtype, tolerance, mode, space):
    changes = {"train__steps": 2, "model__dtype": dtype, "optimizer__learning_rate": 1e-3}
    changes |= {"eval__mode": mode, "eval__crop_size": 160, "data__on_device": space > 1}
    one, two = tmp_path / "one", tmp_path / "two"
    result = run(command(scenes_dir, one, **changes), devices=4)
    assert ", 4 cpu device(s)" in result.stderr
    run_two(scenes_dir, two, mesh__space=space, **changes)
    difference = largest_difference(saved_state(one, 2), saved_state(two, 2))
    print(f"{dtype}: largest relative difference {difference:.2e}; losses {losses(two)}")
    assert difference <= tolerance
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert len(losses(two)) > 0
    first, second = last_scores(one), last_scores(two)
    assert first["val/mIoU"] == pytest.approx(second["val/mIoU"], abs=1e-4)
    assert first["val/PA"] == pytest.approx(second["val/PA"], abs=1e-4)


def test_two_processes_resume_as_one(scenes_dir, tmp_path):
    """A run saved by two processes goes on in one, with the crops that come next."""
    changes = {"train__steps": 4, "optimizer__learning_rate": 1e-3, "data__on_device": True}
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run(command(scenes_dir, whole, **changes), devices=4)
    run_two(scenes_dir, moved, **changes)
    shutil.rmtree(moved / "checkpoints" / "4")
    result = run(command(scenes_dir, moved, **changes), devices=4)
    assert "resuming from step 2" in result.stderr
    assert largest_difference(saved_state(whole, 4), saved_state(moved, 4)) <= 1e-5


def test_two_processes_start_from_a_run_as_one(scenes_dir, tmp_path):
    """config.init.checkpoint: every process reads it, and none writes to it."""
    start, one, two = (tmp_path / name for name in ("start", "one", "two"))
    run(command(scenes_dir, start, train__steps=2))
    before = sorted(path.name for path in start.iterdir())
    changes = {"init__checkpoint": start, "train__steps": 2, "optimizer__learning_rate": 1e-3}
    result = run(command(scenes_dir, one, **changes), devices=4)
    assert "the network of step 2" in result.stderr
    run_two(scenes_dir, two, **changes)
    assert largest_difference(saved_state(one, 2), saved_state(two, 2)) <= 1e-5
    assert sorted(path.name for path in start.iterdir()) == before


def test_batch_that_does_not_divide_ends_with_the_arithmetic(scenes_dir, tmp_path):
    result = run(command(scenes_dir, tmp_path, train__batch_size=6), devices=4, check=False)
    assert result.returncode == 2
    assert "6 = 1 x 4 + 2; use 4 or 8" in result.stderr.replace("(", "").replace(")", "")
