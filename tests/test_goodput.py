"""Goodput: seconds by what they went to, over several starts of a run."""

import contextlib
import json
import shutil

import pytest

from duc_dlc_jax import goodput
from runs import SMALL, command, run


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "time", lambda: self.now)

    def goes_on(self, seconds):
        self.now += seconds


def step_to(clock, spent, step, seconds):
    clock.goes_on(seconds)
    return spent.line(step)


def test_training_that_is_done_again_and_the_time_between_count_as_lost(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    with contextlib.closing(goodput.Goodput(tmp_path, 0, clock.now)) as spent:
        clock.goes_on(5)
        spent.started()
        with spent.spent("compile"):
            clock.goes_on(3)
        step_to(clock, spent, 10, 20)
        with spent.spent("evaluation"):
            clock.goes_on(2)
        step_to(clock, spent, 14, 8)  # killed here; step 10 was saved
    clock.goes_on(30)
    with contextlib.closing(goodput.Goodput(tmp_path, 10, clock.now)) as spent:
        clock.goes_on(4)
        spent.started()
        line = step_to(clock, spent, 20, 20)
        sentence = spent.sentence(20)
    assert line == {
        "time/training": 40,
        "time/start": 9,
        "time/compile": 3,
        "time/data": 0,
        "time/checkpoint": 0,
        "time/evaluation": 2,
        "time/restarts": 38,
        "goodput": pytest.approx(40 / 92),
    }
    assert sentence.startswith("43.5% of 92 s were training (training 40, start 9, ")


def test_a_line_that_a_kill_cut_off_is_passed_over(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    with contextlib.closing(goodput.Goodput(tmp_path, 0, clock.now)) as spent:
        step_to(clock, spent, 5, 10)
    with open(tmp_path / "goodput.jsonl", "a") as file:
        file.write('{"begin": 1000.0, "fir')
    with contextlib.closing(goodput.Goodput(tmp_path, 5, clock.now)) as spent:
        assert step_to(clock, spent, 10, 10)["time/training"] == 20
    with contextlib.closing(goodput.Goodput(tmp_path, 10, clock.now)) as spent:
        assert step_to(clock, spent, 15, 10)["time/training"] == 30


@pytest.mark.fault
def test_the_second_start_compiles_nothing(few_scenes, tmp_path):
    """Its programs are all in the workdir; what it logs says so, too."""
    env = {"JAX_COMPILATION_CACHE_DIR": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    changes = SMALL | {"train__steps": 4}
    run(command(few_scenes, tmp_path, **changes), **env)
    programs = {p.name for p in (tmp_path / "compiled").iterdir() if not p.name.endswith("atime")}
    assert len(programs) > 3
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    run(command(few_scenes, tmp_path, **changes), **env)
    again = {p.name for p in (tmp_path / "compiled").iterdir() if not p.name.endswith("atime")}
    assert again == programs
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-2])
    assert 0 < last["goodput"] < 1
    assert last["time/restarts"] > 0
