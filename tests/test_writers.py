"""Figures of training steps and the time that is left, by a clock of the test's own."""

from __future__ import annotations

import numpy as np
import pytest

from duc_dlc_jax import progress, writers


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        for module in (progress, writers):
            monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def goes_on(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def step_of(figures, clock, loss, waiting, training):
    with figures.waiting():
        clock.goes_on(waiting)
    clock.goes_on(training)
    metrics = {"loss": np.float32(loss), "grad_norm": np.float32(1)}
    figures.add(metrics, np.zeros(1, np.int32))


def test_rates_leave_out_the_first_step_and_what_is_between(clock):
    """It compiles; its loss counts all the same."""
    figures = writers.StepFigures(batch_size=8)
    step_of(figures, clock, loss=4, waiting=30, training=60)
    for _ in range(2):
        step_of(figures, clock, loss=1, waiting=1, training=3)
    taken = figures.take(3)
    assert taken == {"loss": 2, "grad_norm": 1, "images_per_second": 2, "data_wait_share": 0.25}
    assert figures.text == "loss 2.0000  2.0 images/s  25% waiting for data"
    clock.goes_on(100)  # a checkpoint
    figures.restart()
    step_of(figures, clock, loss=1, waiting=0, training=2)
    assert figures.take(4)["images_per_second"] == 4


def test_the_first_step_alone_has_a_loss_and_no_rate(clock):
    figures = writers.StepFigures(batch_size=8)
    step_of(figures, clock, loss=4, waiting=30, training=60)
    assert figures.take(1) == {"loss": 4, "grad_norm": 1}
    assert figures.text == "loss 4.0000"


def test_the_time_left_is_what_the_steps_so_far_took(clock, capsys):
    """Without the first one, which compiles, and pauses."""
    line = progress.Progress(total=100, unit="step")
    clock.goes_on(60)
    line.show(1, "", log=True)
    clock.goes_on(30 + 9)
    line.pause(9)
    line.show(11, "loss 1", log=True)
    assert capsys.readouterr().err == "step 1/100  \nstep 11/100  loss 1  4:27 left\n"
