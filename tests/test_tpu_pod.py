"""launch/tpu_pod.sh, with tests/tpu_stand_in.sh for gcloud, whose hosts are folders here."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from repository import ROOT

SLICE = ["--name=run1", "--zone=us-west4-a", "--type=v5litepod-16", "--poll=0"]
TRAINER = ["--config=configs/ade20k.py", "--workdir=/mnt/a b"]
DELETE = "gcloud compute tpus queued-resources delete run1 --force --quiet --zone=us-west4-a"
INSTALLED = ["scp", "--allow-existing", "--command=true"]
TRAINED = [*INSTALLED, "setsid", "tail -n"]
WHOLE = ["create", *TRAINED, "delete"]
# Orphans are reaped at once, as by a host's init.
INIT = """
import ctypes, os, subprocess, sys
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
script = subprocess.Popen(sys.argv[1:])
while (ended := os.wait())[0] != script.pid:
    pass
sys.exit(os.waitstatus_to_exitcode(ended[1]))
"""


class Run:
    """The script's run: its code, what it printed, and the calls that the stand-in got."""

    def __init__(self, code, out, err, calls):
        self.code, self.out, self.err, self.calls = code, out, err, calls

    @property
    def kinds(self) -> list[str]:
        """What each call of gcloud that changes something, or shows the log, was for."""
        names = (
            "create",
            "delete",
            "scp",
            "--allow-existing",
            "setsid",
            "tail -n",
            "--command=true",
        )
        gcloud = (call for call in self.calls if call.startswith("gcloud"))
        return [name for call in gcloud for name in names if name in call]

    @property
    def last_line(self) -> str:
        return self.err.splitlines()[-1]

    def starts(self, host) -> int:
        return self.out.count(f"host {host} trains")


@pytest.fixture
def tpu_pod(tmp_path, monkeypatch):
    """Runs the script; the stand-in's files are in tmp_path."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("gcloud", "curl"):
        (programs / name).symlink_to(ROOT / "tests" / "tpu_stand_in.sh")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("CLOUD", str(tmp_path))

    def run(*options, states="NONE ACTIVE", failures=(), hosts=(["exit 0"],), then=None):
        files = {"states": states.split(), "failures": failures, "calls": []}
        files |= {f"trainer-{i}": does for i, does in enumerate(hosts)}
        for name, lines in files.items():
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        script = [ROOT / "launch" / "tpu_pod.sh", *SLICE, *options, "--", *TRAINER]
        process = subprocess.Popen(
            [sys.executable, "-ISc", INIT, *script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            if then:
                then(process)
            out, err = process.communicate(timeout=600)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        calls = (tmp_path / "calls").read_text().split("\0")[:-1]
        return Run(process.returncode, out, err, calls)

    return run


def test_a_slice_is_created_installed_trained_on_and_deleted(tpu_pod, tmp_path):
    run = tpu_pod("--spot", hosts=[["exit 0"]] * 2)
    assert run.code == 0, run.err
    assert run.kinds == WHOLE
    (create,) = (call for call in run.calls if "create" in call)
    for word in ("--spot", "--zone=us-west4-a", "--accelerator-type=v5litepod-16", "run1"):
        assert word in create.split()
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create.split()
    installed = [call for call in run.calls if call.startswith("uv pip")]
    assert (
        installed
        == ["uv pip install --quiet --python .venv -c constraints.txt -e .[tpu,cloud]"] * 2
    )
    trained = [call for call in run.calls if call.startswith("python")]
    assert trained == [f"python -m duc_dlc_jax.main {' '.join(TRAINER)}"] * 2
    assert "host 0 trains" in run.out
    assert "still exists" not in run.err
    there = tmp_path / "host-1" / "duc_dlc_jax"
    assert files(there, "duc_dlc_jax", "configs") == files(ROOT, "duc_dlc_jax", "configs")
    assert pathlib.Path("duc_dlc_jax/data/pipeline.py") in files(there, "duc_dlc_jax")
    assert not (there / "tests").exists()


def files(root, *folders) -> set[pathlib.Path]:
    found = (path for folder in folders for path in (root / folder).rglob("*"))
    return {p.relative_to(root) for p in found if "__pycache__" not in p.parts}


@pytest.mark.parametrize(
    ("type_", "version"),
    [("v6e-8", "v2-alpha-tpuv6e"), ("v5p-8", "v2-alpha-tpuv5"), ("v4-8", "tpu-ubuntu2204-base")],
)
def test_the_software_follows_from_the_type(tpu_pod, type_, version):
    run = tpu_pod("--dry_run", f"--type={type_}")
    assert f"--runtime-version={version}" in run.err.split()


def test_a_preempted_slice_is_made_anew_and_the_run_resumes(tpu_pod):
    states = "NONE ACTIVE SUSPENDING SUSPENDING SUSPENDED NONE ACTIVE"
    run = tpu_pod("--spot", states=states, hosts=[["exit 1", "exit 0"]])
    assert run.code == 0, run.err
    assert run.kinds == [*WHOLE, *WHOLE]
    assert "the slice is SUSPENDING: attempt 1 of 20" in run.err
    assert len({call for call in run.calls if "setsid" in call}) == 1  # the same command


def test_a_crash_is_tried_again_and_a_wrong_configuration_is_not(tpu_pod):
    run = tpu_pod(hosts=[["exit 134", "exit 2"]])
    assert run.code == 2
    assert run.kinds == ["create", *TRAINED, *TRAINED, "delete"]
    assert "exit code 134: attempt 1 of 20" in run.err


def test_the_code_of_every_host_counts(tpu_pod):
    run = tpu_pod(hosts=[["exit 134"], ["exit 4"]])
    assert run.code == 4
    assert run.kinds == WHOLE


def test_a_trainer_that_was_killed_with_its_shell_is_tried_again(tpu_pod):
    run = tpu_pod(hosts=[["exit 0"], ["kill -KILL 0", "exit 0"]])
    assert run.code == 0
    assert "exit code 137: attempt 1 of 20" in run.err


def test_what_still_trains_is_ended_before_the_next_start(tpu_pod, tmp_path):
    ended = tmp_path / "ended"
    waits = f"trap 'touch {ended}; exit 75' TERM; while true; do sleep 0.1; done"
    hosts = [["sleep 0.5; exit 134", "exit 0"], [waits, f"[ -e {ended} ] || exit 3"]]
    run = tpu_pod("--patience=0", hosts=hosts)
    assert run.code == 0, run.err
    assert "exit code 134 on one host, while others go on" in run.err


def test_the_log_ends_with_the_trainer(tpu_pod):
    """Also where another process of the host writes to the log and lives on."""
    start = time.monotonic()
    run = tpu_pod(hosts=[["setsid sleep 20 & exit 0"]])
    assert run.code == 0
    assert time.monotonic() - start < 10


def test_a_look_that_fails_is_no_preemption(tpu_pod):
    run = tpu_pod(states="UNKNOWN NONE UNKNOWN ACTIVE UNKNOWN UNKNOWN ACTIVE")
    assert run.code == 0
    assert run.kinds == WHOLE
    assert run.err.count("gcloud fails; it is asked again") == 4


def test_lasting_silence_of_gcloud_ends_with_the_command_that_deletes(tpu_pod):
    run = tpu_pod("--patience=0", states="NONE ACTIVE UNKNOWN")
    assert run.code == 1
    assert run.kinds == ["create", *TRAINED]
    assert "ERROR: log in again" in run.err
    assert "the same command goes on" in run.err
    assert run.last_line.startswith("the slice run1 still exists")
    assert run.last_line.endswith(DELETE)


def test_nothing_trains_after_a_failed_installation(tpu_pod):
    steps = ["*scp", "curl", "uv venv", "uv pip", "*--command=true"]
    run = tpu_pod(failures=steps)
    assert run.code == 0
    expected = [*INSTALLED[:1], *INSTALLED[:2] * 3, *INSTALLED, *TRAINED]
    assert run.kinds == ["create", *expected, "delete"]
    for i in range(1, len(steps) + 1):
        assert f"the installation failed, see above: attempt {i} of 20" in run.err


def test_hosts_that_never_answer_lose_their_slice(tpu_pod):
    states = "NONE ACTIVE ACTIVE NONE ACTIVE"
    run = tpu_pod("--patience=0", states=states, failures=["*echo trainer running"])
    assert run.code == 0
    assert run.kinds == [*WHOLE, *WHOLE]
    assert "hosts of the slice do not answer" in run.err


def test_failed_requests_are_few_and_say_why(tpu_pod):
    run = tpu_pod("--restarts=2", states="NONE FAILED NONE FAILED NONE FAILED")
    assert run.code == 1
    assert run.kinds == ["create", "delete"] * 3
    assert run.err.count("state: no such topology") == 3
    assert "error: the request failed, see above, after 2 restarts" in run.err


def test_a_refused_request_ends_at_once(tpu_pod):
    run = tpu_pod(states="NONE", failures=["*create"])
    assert run.code == 1
    assert run.kinds == ["create"]
    assert run.last_line == "error: gcloud refuses the request, see above"


def test_a_slice_that_cannot_be_deleted_is_told(tpu_pod):
    run = tpu_pod("--patience=0", failures=["*delete"])
    assert run.code == 1
    assert run.last_line.endswith(DELETE)


def test_a_slice_that_is_kept_is_told(tpu_pod):
    run = tpu_pod("--keep")
    assert run.code == 0
    assert run.kinds == ["create", *TRAINED]
    assert run.last_line.endswith(DELETE)


def test_an_interrupted_script_tells_of_the_slice(tpu_pod, tmp_path):
    def stop(process):
        deadline = time.monotonic() + 20
        while "tail -n" not in (tmp_path / "calls").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = f"/proc/{process.pid}/task/{process.pid}/children"
        script = int(pathlib.Path(children).read_text().split()[0])
        os.kill(script, signal.SIGTERM)

    run = tpu_pod(hosts=[["sleep 1"]], then=stop)
    assert run.code != 0
    assert run.last_line.endswith(DELETE)
    assert run.kinds.count("delete") == 0


def test_a_dry_run_prints_each_command_and_runs_none(tpu_pod):
    run = tpu_pod("--spot", "--dry_run", "--poll=30")
    assert run.code == 0, run.err
    assert run.calls == []
    lines = [line for line in run.err.splitlines() if line.startswith("+ ")]
    run.calls = ["gcloud" + line.replace("\\ ", " ") for line in lines]
    assert run.kinds == WHOLE


@pytest.mark.parametrize("wrong", ["--zone=", "--nmae=x", "--restarts=many", "--type=v9-8"])
def test_wrong_options(tpu_pod, wrong):
    run = tpu_pod(wrong)
    assert run.code == 2
    assert "error: " in run.err
    assert run.calls == []
