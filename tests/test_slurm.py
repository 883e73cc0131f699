"""launch/slurm.sbatch under a real Slurm with two nodes on this machine."""

import pathlib
import subprocess
import time

import numpy as np
import pytest
import slurm
from test_multiprocess import run_two

from runs import command, environment, free_port, saved_state

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm.missing()), reason=f"Slurm: {slurm.missing()}"),
]
ROOT = pathlib.Path(__file__).parent.parent
CHANGES = {"train__steps": 60, "train__log_every": 5, "train__checkpoint_every": 5}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as env:
        yield env


def submit(env, workdir, arguments) -> str:
    """The number of a job of two nodes, one process and two CPU devices each."""
    options = ["--nodes=2", "--parsable", "--time=10", f"--output={workdir}.log"]
    job = subprocess.run(
        ["sbatch", *options, str(ROOT / "launch" / "slurm.sbatch"), *arguments],
        env=env | environment(2),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return job.stdout.strip()


def state(env, job) -> dict[str, str]:
    words = slurm.output(["scontrol", "show", "job", job], env).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait_until(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def newest(workdir) -> int:
    names = [p.name for p in (workdir / "checkpoints").glob("[0-9]*") if p.name.isdigit()]
    return max(map(int, names), default=0)


def test_requeued_jobs_resume_bit_for_bit(cluster, scenes_dir, tmp_path):
    """Slurm kills and requeues the job once; told to stop by SIGTERM, it requeues itself."""
    straight, workdir = tmp_path / "straight", tmp_path / "run"
    run_two(scenes_dir, straight, **CHANGES)
    # The nodes' names are no host names here, hence --coordinator.
    coordinator = f"--coordinator=localhost:{free_port()}"
    arguments = command(scenes_dir, workdir, coordinator, **CHANGES)[3:]
    job = submit(cluster, workdir, arguments)
    for tell in (["scontrol", "requeue"], ["scancel", "--signal=TERM"]):
        wait_until(lambda: state(cluster, job)["JobState"] == "RUNNING")
        before, restarts = newest(workdir), int(state(cluster, job)["Restarts"])
        wait_until(lambda before=before: newest(workdir) > before)
        slurm.output([*tell, job], cluster)
        wait_until(lambda n=restarts: int(state(cluster, job)["Restarts"]) > n)
        assert newest(workdir) < 60, "the run was over before it was stopped"
        slurm.output(["scontrol", "update", f"JobId={job}", "StartTime=now"], cluster)
    log = pathlib.Path(f"{workdir}.log")
    wait_until(lambda: state(cluster, job)["JobState"] == "COMPLETED")
    text = log.read_text()
    assert "stopped by SIGTERM; step" in text
    assert "stopped with a checkpoint: job" in text
    assert text.count("resuming from step") >= 2
    first, second = saved_state(straight, 60), saved_state(workdir, 60)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_an_error_that_a_restart_does_not_mend_ends_the_job(cluster, scenes_dir, tmp_path):
    arguments = command(scenes_dir, tmp_path / "run", train__batch_size=6)[3:]
    coordinator = f"--coordinator=localhost:{free_port()}"
    job = submit(cluster, tmp_path / "run", [*arguments, coordinator])
    wait_until(lambda: state(cluster, job)["JobState"] == "FAILED")
    assert state(cluster, job)["ExitCode"] == "2:0"
    assert state(cluster, job)["Restarts"] == "0"
    assert "6 = 1 x 4 + 2" in pathlib.Path(f"{tmp_path}/run.log").read_text()
