"""launch/slurm.sbatch under a real Slurm with two nodes on this machine."""

import pathlib
import subprocess
import time

import numpy as np
import pytest
import slurm

from repository import ROOT
from runs import SMALL, command, environment, free_port, run_two, saved_state

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm.missing()), reason=f"Slurm: {slurm.missing()}"),
]
STEPS = 60
CHANGES = {"train__steps": STEPS, "train__log_every": 5, "train__checkpoint_every": 5} | SMALL


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as env:
        yield env


class Job:
    """A job of two nodes, one process and two CPU devices each."""

    def __init__(self, env, workdir, arguments):
        self.env, self.log = env, pathlib.Path(f"{workdir}.log")
        options = ["--nodes=2", "--parsable", "--time=20", f"--output={self.log}"]
        script = str(ROOT / "launch" / "slurm.sbatch")
        self.number = subprocess.run(
            ["sbatch", *options, script, *arguments],
            env=env | environment(2),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    def call(self, *words) -> str:
        return slurm.output([*words, self.number], self.env)

    def state(self) -> dict[str, str]:
        words = self.call("scontrol", "show", "job").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until(self, condition, seconds=900):
        """Until `condition(state)`; a requeued job need not sit out Slurm's two minutes.

        But two seconds: a start in the second of the kill gets "Job credential revoked".
        """
        deadline = time.monotonic() + seconds
        while not condition(state := self.state()):
            over = state["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            if over or time.monotonic() > deadline:
                log = self.log.read_text()[-8000:] if self.log.exists() else "no log"
                pytest.fail(f"not reached: {state}\n{log}")
            if state["JobState"] == "PENDING" and state["Reason"] == "BeginTime":
                time.sleep(2)
                change = f"JobId={self.number} StartTime=now".split()
                slurm.output(["scontrol", "update", *change], self.env)
            time.sleep(0.3)


def newest(workdir) -> int:
    names = [p.name for p in (workdir / "checkpoints").glob("[0-9]*") if p.name.isdigit()]
    return max(map(int, names), default=0)


def test_requeued_jobs_resume_bit_for_bit(cluster, few_scenes, tmp_path):
    """Slurm kills and requeues the job once; told to stop by SIGTERM, it requeues itself."""
    straight, workdir = tmp_path / "straight", tmp_path / "run"
    run_two(few_scenes, straight, **CHANGES)
    # The nodes' names are no host names here, hence --coordinator.
    coordinator = f"--coordinator=localhost:{free_port()}"
    arguments = command(few_scenes, workdir, coordinator, **CHANGES)[3:]
    job = Job(cluster, workdir, arguments)
    for tell in (["scontrol", "requeue"], ["scancel", "--signal=TERM"]):
        job.wait_until(lambda state: state["JobState"] == "RUNNING")
        before, restarts = newest(workdir), int(job.state()["Restarts"])
        job.wait_until(lambda _, before=before: newest(workdir) > before)
        job.call(*tell)
        job.wait_until(lambda state, n=restarts: int(state["Restarts"]) > n)
        assert newest(workdir) < STEPS, "the run was over before it was stopped"
    job.wait_until(lambda state: state["JobState"] == "COMPLETED")
    text = job.log.read_text()
    assert "stopped by SIGTERM; step" in text
    assert "stopped with a checkpoint: job" in text
    assert "Slurm does not requeue" not in text
    assert text.count("resuming from step") >= 2
    first, second = saved_state(straight, STEPS), saved_state(workdir, STEPS)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_an_error_that_a_restart_does_not_mend_ends_the_job(cluster, few_scenes, tmp_path):
    arguments = command(few_scenes, tmp_path / "run", train__batch_size=6)[3:]
    coordinator = f"--coordinator=localhost:{free_port()}"
    job = Job(cluster, tmp_path / "run", [*arguments, coordinator])
    job.wait_until(lambda state: state["JobState"] == "FAILED")
    assert job.state()["ExitCode"] == "2:0"
    assert job.state()["Restarts"] == "0"
    assert "6 = 1 x 4 + 2" in job.log.read_text()
