"""The launch scripts, with stand-ins for Python and Slurm that note how they were called."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml

from duc_dlc_jax import cli, distributed
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.errors import STOP_SIGNALS
from object_store import S3, serving, url
from repository import ROOT

LAUNCH = ROOT / "launch"
SCRIPT = LAUNCH / "local.sh"
STAND_IN = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then echo 12345; exit; fi
echo "$JAX_NUM_CPU_DEVICES $*" > "{folder}/called-${{*: -1}}"
{body}
"""


def launch(folder, *arguments, body="", then=None, **env):
    """Runs the script; `then` gets its process."""
    python = folder / "python"
    python.write_text(STAND_IN.format(folder=folder, body=body))
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "LOG_DIR": str(folder / "logs")} | env
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([SCRIPT, *arguments], env=env, **pipes)
    if then:
        then(process)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_each_process_gets_its_number_and_the_same_port(tmp_path):
    arguments = ["--processes=3", "--", "--config=c.py", "--workdir=a b"]
    result = launch(tmp_path, *arguments, DEVICES_PER_PROCESS="2", JAX_PLATFORMS="cpu")
    assert result.returncode == 0, result.stderr
    for i in range(3):
        assert (tmp_path / f"called---process={i}").read_text() == (
            "2 -m duc_dlc_jax.main --config=c.py --workdir=a b "
            f"--coordinator=localhost:12345 --processes=3 --process={i}\n"
        )


def test_a_failing_process_ends_the_others_and_gives_its_exit_code(tmp_path):
    body = "case $* in *process=1) echo broken >&2; exit 7 ;; *) exec sleep 50 ;; esac"
    start = time.monotonic()
    result = launch(tmp_path, "--processes=2", "--", body=body)
    assert result.returncode == 7
    assert "process 1 of 2 ended with exit code 7" in result.stderr
    assert "broken" in result.stderr
    assert time.monotonic() - start < 30


def test_a_process_that_ignores_sigterm_is_killed(tmp_path):
    body = "case $* in *process=0) exit 3 ;; *) trap '' TERM; exec sleep 50 ;; esac"
    start = time.monotonic()
    assert launch(tmp_path, "--processes=2", "--", body=body, KILL_AFTER="1").returncode == 3
    assert time.monotonic() - start < 30


def signals(folder, *numbers):
    """Sends signals to the script once its two processes wait for them."""

    def send(process):
        for count, number in enumerate(numbers, 1):
            deadline = time.monotonic() + 30
            while len(list(folder.glob(f"ready-{count}-*"))) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(number)

    return send


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stopped_run_saves_for_as_long_as_it_takes(tmp_path, number):
    body = f"""
    save() {{ sleep 0.5; touch "{tmp_path}/saved$1"; exit 75; }}
    case $* in *process=0) trap 'exit 75' TERM ;; *) trap 'save -1' TERM ;; esac
    touch "{tmp_path}/ready-1-$$"
    for ((i = 0; i < 200; i++)); do sleep 0.1; done"""
    then = signals(tmp_path, number)
    result = launch(tmp_path, "--processes=2", "--", body=body, then=then, KILL_AFTER="0")
    assert result.returncode == 75
    assert (tmp_path / "saved-1").exists()
    assert "a second signal kills the processes" in result.stderr


def test_a_second_signal_kills_the_processes(tmp_path):
    body = f"""
    trap 'touch "{tmp_path}/ready-2-$$"' TERM
    touch "{tmp_path}/ready-1-$$"
    for ((i = 0; i < 200; i++)); do sleep 0.1; done"""
    then = signals(tmp_path, signal.SIGTERM, signal.SIGTERM)
    start = time.monotonic()
    assert launch(tmp_path, "--processes=2", "--", body=body, then=then).returncode == 137
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("arguments", [["--processes=0"], ["--processes=two"], ["--config=c.py"]])
def test_wrong_options_end_before_anything_starts(tmp_path, arguments):
    result = launch(tmp_path, *arguments)
    assert result.returncode == 2
    assert "error: " in result.stderr
    assert not list(tmp_path.glob("called*"))


# launch/slurm.sbatch

SRUN = """#!/usr/bin/env bash
echo "$*" >>"{folder}/srun"
workdir="{folder}/run"
{body}
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"{folder}/scontrol"
{body}
"""
JOB = {"SLURM_JOB_ID": "7", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}


def slurm_job(folder, body, scontrol="", state="RUNNING", **env):
    """Runs the script once, as Slurm does for a job, with stand-ins for Slurm's commands."""
    programs = {"srun": (SRUN, body), "scontrol": (SCONTROL, scontrol)}
    programs["squeue"] = ("#!/bin/sh\n{body}", f"echo {state}")
    for name, (text, lines) in programs.items():
        program = folder / "programs" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text.format(folder=folder, body=lines))
        program.chmod(0o755)
    path = f"{folder / 'programs'}:{os.environ['PATH']}"
    submitted = folder / "submitted"
    submitted.mkdir(exist_ok=True)
    env = os.environ | JOB | {"PATH": path, "SLURM_SUBMIT_DIR": str(submitted)} | env
    workdir = env.pop("WORKDIR", str(folder / "run"))
    command = [LAUNCH / "slurm.sbatch", "--config=c.py", f"--workdir={workdir}"]
    return subprocess.run(
        ["bash", *command], cwd=submitted, env=env, capture_output=True, text=True, timeout=600
    )


def test_a_slurm_job_gives_up_when_it_makes_no_progress(tmp_path):
    saves = 'mkdir -p "$workdir/checkpoints/$(($(ls "$workdir/checkpoints" | wc -l) + 9))"; '
    for body in ("exit 134", f"{saves} exit 134", "exit 134"):  # the count starts anew
        assert slurm_job(tmp_path, body, MAX_RESTARTS="1").returncode == 0
    assert [p.name for p in (tmp_path / "submitted").iterdir()] == ["slurm-7.restarts"]
    last = slurm_job(tmp_path, "exit 134", MAX_RESTARTS="1")
    assert last.returncode == 134
    assert "2 starts without a new checkpoint" in last.stderr
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n" * 3
    cores = "exit $((SRUN_CPUS_PER_TASK - 6))"  # which srun alone would not take from the job
    assert slurm_job(tmp_path, cores, SLURM_CPUS_PER_TASK="6").returncode == 0
    assert not list((tmp_path / "submitted").iterdir())  # it ended with 0


@pytest.mark.object_store
def test_checkpoints_in_an_object_store_are_progress(tmp_path):
    with serving(S3) as store:
        workdir = url(store, "run")
        program = f"""from duc_dlc_jax import storage
(storage.path("{workdir}/checkpoints") / "$(wc -l <"{tmp_path}/srun")" / "arrays").write_text("")"""
        job = {"WORKDIR": workdir, "MAX_RESTARTS": "0", **store.env}
        for _ in range(2):
            saved = slurm_job(tmp_path, f"$PYTHON - <<END\n{program}\nEND\nexit 134", **job)
            assert saved.returncode == 0, saved.stderr
        last = slurm_job(tmp_path, "exit 134", **job)
    assert last.returncode == 134
    assert "1 starts without a new checkpoint" in last.stderr


@pytest.mark.parametrize("code", [75, 134])
def test_a_refused_requeue_is_no_success(tmp_path, code):
    result = slurm_job(tmp_path, f"exit {code}", scontrol="echo disabled >&2; exit 1")
    assert result.returncode == code
    assert "Slurm does not requeue job 7" in result.stderr


def test_a_job_that_slurm_itself_requeues_is_no_failure(tmp_path):
    result = slurm_job(tmp_path, "exit 75", scontrol="exit 1", state="COMPLETING")
    assert result.returncode == 0
    assert "error" not in result.stderr


# launch/kubernetes.yaml, and what processes learn from their cluster


def arguments(**given):
    return SimpleNamespace(**{"coordinator": "", "processes": 0, "process": 0} | given)


def test_kubernetes_pods_find_each_other():
    jobset = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    env = {one["name"]: one["value"] for one in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert str(job["parallelism"]) == str(job["completions"]) == env["JAX_NUM_PROCESSES"]
    name, port = jobset["metadata"]["name"], container["ports"][0]["containerPort"]
    # A pod's host name is JOBSET-GROUP-JOB-POD, in the domain of the JobSet's service.
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{name}-{group['name']}-0-0.{name}:{port}"
    assert distributed.place(arguments(), env | {"JOB_COMPLETION_INDEX": "3"}) == {
        "coordinator_address": env["JAX_COORDINATOR_ADDRESS"],
        "num_processes": 4,
        "process_id": 3,
    }
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    codes = {code for code in cli.EXIT_CODES.values() if code not in (5, cli.STOPPED)}
    assert set(rule["onExitCodes"]["values"]) == codes
    final = " | ".join(map(str, sorted(codes)))
    assert f"  {final}) exit" in (LAUNCH / "slurm.sbatch").read_text()
    assert f"  {final}) ;;" in (LAUNCH / "tpu_pod.sh").read_text()
    assert job["template"]["spec"]["restartPolicy"] == "Never"


CRD = os.environ.get("DUC_DLC_JOBSET_CRD", "")


@pytest.mark.skipif(not CRD, reason="DUC_DLC_JOBSET_CRD names no published schema of JobSet")
def test_kubernetes_file_satisfies_the_published_schema():
    crd = yaml.safe_load(pathlib.Path(CRD).read_text())
    jobset = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    name = jobset["apiVersion"].partition("/")[2]
    (version,) = (one for one in crd["spec"]["versions"] if one["name"] == name)
    assert list(violations(jobset, version["schema"]["openAPIV3Schema"])) == []


def violations(value, schema, where=""):
    """What a value breaks of an OpenAPI schema: its types, choices, required and known fields."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if not schema.get("x-kubernetes-int-or-string") and not isinstance(
        value, kinds[schema["type"]]
    ):
        yield f"{where}: {value!r} is no {schema['type']}"
    if value not in schema.get("enum", [value]):
        yield f"{where}: {value!r} is none of {schema['enum']}"
    if isinstance(value, list):
        for i, one in enumerate(value):
            yield from violations(one, schema["items"], f"{where}[{i}]")
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        yield from (
            f"{where}.{name} is missing" for name in {*schema.get("required", ())} - {*value}
        )
        for name, one in value.items():
            field = fields.get(name, schema.get("additionalProperties"))
            if field:
                yield from violations(one, field, f"{where}.{name}")
            elif where != ".metadata":  # which Kubernetes itself knows
                yield f"{where}.{name} is no field"


def slurm(**changes):
    base = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "gpu[07-09,12]", "SLURM_PROCID": "2"}
    return base | {"SLURM_JOB_ID": "5001", "SLURM_LOCALID": "1"} | changes


def test_slurm_tasks_find_each_other():
    expected = {"coordinator_address": "gpu07:62345", "num_processes": 4, "process_id": 2}
    assert distributed.place(arguments(), slurm()) == expected
    single = distributed.place(arguments(), slurm(SLURM_STEP_NODELIST="login1,gpu2"))
    assert single["coordinator_address"] == "login1:62345"
    given = distributed.place(arguments(coordinator="10.0.0.1:99"), slurm())
    assert given == expected | {"coordinator_address": "10.0.0.1:99"}
    assert distributed.place(arguments(), slurm(SLURM_NTASKS="1")) is None


@pytest.mark.parametrize(
    ("tasks", "node", "shared"),
    [
        ("2(x2)", 1, True),
        ("16(x2)", 1, True),
        ("1(x2)", 1, False),
        ("1,4", 0, False),
        ("1,4", 1, True),
        ("12(x3),1(x2),2", 4, False),
        ("12(x3),1(x2),2", 5, True),
    ],
)
def test_slurm_tasks_that_see_all_cards_of_their_node_take_one_each(tasks, node, shared):
    where = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)}
    found = distributed.place(arguments(), slurm(CUDA_VISIBLE_DEVICES="0,1", **where))
    assert found.get("local_device_ids") == ([1] if shared else None)
    alone = distributed.place(arguments(), slurm(CUDA_VISIBLE_DEVICES="1", **where))
    assert "local_device_ids" not in alone


def test_flags_that_do_not_fit():
    with pytest.raises(ConfigError, match="--process=2 --processes=2"):
        distributed.place(arguments(coordinator="a:1", processes=2, process=2), {})
    with pytest.raises(ConfigError, match="need --coordinator"):
        distributed.place(arguments(processes=2), {})
    assert distributed.place(arguments(), {}) is None


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", ROOT / "tests" / "tpu_stand_in.sh"]
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
