"""Runs that are killed and started again."""

import contextlib
import json
import pathlib
import random
import signal
import subprocess
import time

import numpy as np
import pytest

from runs import command, environment, run, saved_state

pytestmark = pytest.mark.fault

# The demo's own network and schedule, shortened.
DEMO = {
    "data.base_size": 192,
    "data.crop_size": 128,
    "data.in_memory": True,
    "model.width": 16,
    "model.duc_width": 64,
    "model.guidance_width": 16,
    "model.dlc_width": 64,
    "model.dlc_growth": 32,
    "optimizer.ema_decay": 0.99,
    "train.steps": 40,
    "train.eval_every": 15,
    "train.checkpoint_every": 5,
}


def kill_after(arguments, workdir, saves):
    """Starts a run and kills it with SIGKILL some time after its `saves`-th new checkpoint."""
    generator = random.Random(saves)
    process = subprocess.Popen(
        arguments,
        env=environment(DUC_DLC_TEST_RUN=str(workdir)),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    folder, seen = workdir / "checkpoints", set()
    before = {p.name for p in folder.glob("[0-9]*")}
    deadline = time.monotonic() + 240
    while len(seen) < saves and process.poll() is None and time.monotonic() < deadline:
        seen |= {p.name for p in folder.glob("[0-9]*") if p.name.isdigit()} - before
        time.sleep(0.05)
    time.sleep(generator.uniform(0, 1.5))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"


def processes_of(workdir) -> list[str]:
    """The ids of the processes, workers included, that were started with this workdir."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"DUC_DLC_TEST_RUN={workdir}".encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
    return found


def test_killed_demo_equals_the_uninterrupted_demo(scenes_dir, tmp_path):
    """Killed in the middle of epochs while worker processes hold batches ahead."""
    changes = {name.replace(".", "__"): value for name, value in DEMO.items()}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(command(scenes_dir, straight, **changes))
    arguments = command(scenes_dir, killed, data__workers=2, **changes)
    for saves in (1, 2):
        kill_after(arguments, killed, saves)
        deadline = time.monotonic() + 30
        while processes_of(killed) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not processes_of(killed), "workers outlive their killed trainer"
    run(arguments)

    first, second = saved_state(straight, 40), saved_state(killed, 40)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    scores = [
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["val/mIoU"]
        for folder in (straight, killed)
    ]
    assert scores[0] == scores[1]
