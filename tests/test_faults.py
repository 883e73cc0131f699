"""Runs that are killed, told to stop, or find their files damaged, and started again."""

import contextlib
import json
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from runs import SMALL, environment, free_port, run, saved_state
from runs import command as tiny_command

pytestmark = pytest.mark.fault

TIMEOUT = 600  # seconds, for what takes a few on an idle machine
KILLED = {"train__steps": 60, "optimizer__ema_decay": 0.9}  # as in tests/killed_runs.py


def command(data_dir, workdir, *extra, **changes):
    return tiny_command(data_dir, workdir, *extra, **SMALL | changes)


def start(arguments, workdir, devices=1, piped=False, **env):
    """Starts a run whose processes can be found again; its output goes to workdir/log.txt.

    piped: by way of a process of its own, whose files grow as they like.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if piped:
        arguments = ["bash", "-c", 'exec "$@" &> >(cat)', "-", *arguments]
    with open(workdir / "log.txt", "w") as log:
        env = environment(devices, DUC_DLC_TEST_RUN=str(workdir), **env)
        return subprocess.Popen(arguments, env=env, stdout=log, stderr=log)


def wait_for(condition, process=None, seconds=TIMEOUT):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def log(workdir) -> str:
    return (workdir / "log.txt").read_text()


def kill_after(arguments, workdir, saves):
    """Starts a run and kills it with SIGKILL some time after its `saves`-th new checkpoint."""
    generator = random.Random(saves)
    folder, seen = workdir / "checkpoints", set()
    before = {p.name for p in folder.glob("[0-9]*")}
    process = start(arguments, workdir)

    def saved():
        seen.update({p.name for p in folder.glob("[0-9]*") if p.name.isdigit()} - before)
        return len(seen) >= saves

    wait_for(saved, process)
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


def assert_same_state(first, second, step):
    first, second = saved_state(first, step), saved_state(second, step)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def evaluations(workdir) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["val/mIoU"] for line in lines if "val/mIoU" in line}


@pytest.fixture(scope="module")
def unkilled(few_scenes, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unkilled")
    run(command(few_scenes, workdir, **KILLED))
    return workdir


def test_a_killed_run_with_workers_equals_the_uninterrupted_one(few_scenes, unkilled, tmp_path):
    """Killed in the middle of epochs while worker processes hold batches ahead."""
    changes = {"data__in_memory": True, "data__workers": 2, "train__checkpoint_every": 5}
    arguments = command(few_scenes, tmp_path, **KILLED | changes)
    for saves in (1, 2):
        kill_after(arguments, tmp_path, saves)
        wait_for(lambda: not processes_of(tmp_path))  # no worker outlives its trainer
    ended = run(arguments)
    assert "leaked shared_memory" not in ended.stderr  # nor does a batch
    assert_same_state(unkilled, tmp_path, 60)
    assert evaluations(unkilled)[60] == evaluations(tmp_path)[60]


def test_a_run_killed_at_20_points_equals_the_uninterrupted_one(few_scenes, unkilled, tmp_path):
    """5 kills in a step, 10 in a save, 5 while an old checkpoint is deleted; seed 0."""
    program = pathlib.Path(__file__).parent / "killed_runs.py"
    arguments = [sys.executable, str(program), str(few_scenes), str(tmp_path), "20", "0"]
    ended = run(arguments, timeout=3000, tensorflow=True)
    report = json.loads(ended.stdout.splitlines()[-1])
    trials = report["trials"]
    assert [one["kind"] for one in trials] == ["step", "save", "delete", "save"] * 5
    assert report["end"] == "finished"
    in_save = [one for one in trials if one["kind"] == "save" and one["unfinished"]]
    whole = max(count for one in trials for count in one["files"].values())
    in_delete = [
        one for one in trials if one["kind"] == "delete" and min(one["files"].values()) < whole
    ]
    print(f"{len(in_save)} unfinished saves, {len(in_delete)} unfinished deletions")
    assert len(in_save) >= 5
    assert len(in_delete) >= 3
    assert_same_state(unkilled, tmp_path, 60)


# A signal to stop: exit code 75, a checkpoint, and nothing else is different afterwards.

STOPPED = {"train__steps": 8, "train__log_every": 1, "train__eval_every": 4}
MOMENTS = {  # of a signal: the line after which it comes
    "compilation": "starts from scratch",
    "evaluation": "step 4/8",  # written before the evaluation of step 4
    "training": "step 5/8",
}


def test_a_signal_saves_and_the_next_start_goes_on(few_scenes, tmp_path):
    """One run that three signals stop, and one that none does."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run(command(few_scenes, straight, **STOPPED))
    for moment, sign in MOMENTS.items():
        arguments = command(few_scenes, stopped, data__workers=int(moment == "training"), **STOPPED)
        cold = {"JAX_COMPILATION_CACHE_DIR": ""} if moment == "compilation" else {}
        process = start(arguments, stopped, **cold)
        wait_for(lambda sign=sign: sign in log(stopped), process)
        if moment == "training":  # a cluster tells the workers, too
            for pid in processes_of(stopped):
                for name in ("USR1", "TERM", "HUP"):
                    subprocess.run(["kill", f"-{name}", pid], check=False)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=TIMEOUT) == 75, log(stopped)[-3000:]
        assert "leaked shared_memory" not in log(stopped)
        assert "resource_tracker" not in log(stopped)  # Python's helper lived through them
        (step,) = [
            int(line.split("step ")[1].split()[0])
            for line in log(stopped).splitlines()
            if line.startswith("stopped by SIG")
        ]
        assert (stopped / "checkpoints" / str(step)).is_dir()
        assert step in {"compilation": [1], "evaluation": [4], "training": [5, 6, 7, 8]}[moment]
        if moment == "evaluation":
            assert evaluations(stopped) == {}
    run(command(few_scenes, stopped, **STOPPED))
    assert_same_state(straight, stopped, 8)
    assert evaluations(straight) == evaluations(stopped)


def start_two(few_scenes, folder, *flags, piped=False, **changes):
    """Two processes of two devices each, with a workdir in common."""
    flags += (f"--coordinator=localhost:{free_port()}", "--processes=2")
    return [
        start(
            command(few_scenes, folder / "run", *flags, f"--process={i}", **changes),
            folder / str(i),
            devices=2,
            piped=piped,
        )
        for i in range(2)
    ]


# Of one length, as the schedule is part of the program.
ENDLESS = {"train__steps": 100000, "train__log_every": 5, "train__checkpoint_every": 50}
SLOW_EVALUATION = {"data__eval_split": "train", "eval__mode": "sliding", "eval__stride": 32}
EVALUATED = ENDLESS | {"train__log_every": 1, "train__eval_every": 4} | SLOW_EVALUATION


@pytest.mark.parametrize(
    ("number", "changes", "sign", "step"),
    [
        (signal.SIGINT, ENDLESS, "step 10/", ""),
        (signal.SIGTERM, EVALUATED, "step 4/", "4 "),
    ],
)
def test_a_signal_to_one_process_of_two_stops_both_at_the_same_step(
    few_scenes, tmp_path, number, changes, sign, step
):
    """In training; and in the evaluation of step 4, which is broken off in both."""
    processes = start_two(few_scenes, tmp_path, **changes)
    wait_for(lambda: sign in log(tmp_path / "0"), processes[0])
    processes[1].send_signal(number)
    assert [process.wait(timeout=TIMEOUT) for process in processes] == [75, 75]
    ends = [log(tmp_path / str(i)).splitlines()[-1] for i in range(2)]
    assert f"stopped by SIGTERM; step {step}" in ends[0]  # as the others hear of any signal
    assert ends[1] == ends[0].replace("SIGTERM", number.name)


LOST = {  # whom the other one names
    0: r"coordination service|leader task",
    1: r"Process 1 of the run is silent|Task 1 heartbeat|\(stopped sending heartbeats\):\s+1\b",
}


@pytest.mark.parametrize("which", LOST)
def test_a_killed_process_of_two_ends_the_other_which_names_it(few_scenes, tmp_path, which):
    other = 1 - which
    processes = start_two(few_scenes, tmp_path, "--heartbeat_timeout=20", **ENDLESS)
    wait_for(lambda: "step 10/" in log(tmp_path / "0"), processes[0])
    processes[which].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    assert processes[other].wait(timeout=TIMEOUT) not in (0, 75)
    print(f"the other ended after {time.monotonic() - begin:.0f} s, heartbeat 20 s")
    assert re.search(LOST[which], log(tmp_path / str(other)))


RAISING = """
import runpy, sys
from duc_dlc_jax import train

original = train.device_batches

def batches(*args):
    for number, batch in enumerate(original(*args)):
        if number == 10:
            raise KeyError("x")
        yield batch

train.device_batches = batches
runpy.run_module("duc_dlc_jax.main", run_name="__main__", alter_sys=True)
"""


def test_an_error_in_one_process_of_two_ends_both_with_its_code(few_scenes, tmp_path):
    """The other one is in a collective by then; its heartbeat would be missed after 100 s."""
    flags = (f"--coordinator=localhost:{free_port()}", "--processes=2")
    processes = []
    for i in range(2):
        arguments = command(few_scenes, tmp_path / "run", *flags, f"--process={i}", **ENDLESS)
        if i == 1:
            assert arguments[1:3] == ["-m", "duc_dlc_jax.main"]
            arguments[1:3] = ["-c", RAISING]
        processes.append(start(arguments, tmp_path / str(i), devices=2))
    wait_for(lambda: "step 5/" in log(tmp_path / "0"), processes[0])
    assert [process.wait(timeout=TIMEOUT) for process in processes] == [1, 1]
    assert "KeyError: 'x'" in log(tmp_path / "1")
    assert "process 1 ended with code 1: KeyError: 'x'" in log(tmp_path / "0")


def fill_disk_of(process):
    """From now on no file of the process grows beyond 40 kB; start it `piped` for the log's sake.

    Whatever the sizes of the data files, which depend on how fast they are written: a checkpoint's
    `_METADATA` and its largest array take more.
    """
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))


def test_a_full_disk_of_one_process_of_two_ends_both_with_its_code(few_scenes, tmp_path):
    changes = ENDLESS | {"train__checkpoint_every": 4, "train__log_every": 1}
    processes = start_two(few_scenes, tmp_path, piped=True, **changes)
    wait_for(lambda: (tmp_path / "run/checkpoints/4").is_dir(), processes[0])
    fill_disk_of(processes[0])
    assert [process.wait(timeout=TIMEOUT) for process in processes] == [4, 4]
    wait_for(lambda: "a checkpoint cannot be written to" in log(tmp_path / "0"))
    wait_for(lambda: "process 0 ended with code 4" in log(tmp_path / "1"))


ENDING = """
import sys
from absl import flags
from duc_dlc_jax import distributed

distributed.LOOK_EVERY = 0.0
distributed.define_flags()
flags.FLAGS(sys.argv)
distributed.start(flags.FLAGS)
sys.exit(75)
"""


def test_processes_that_ask_the_service_all_the_time_end_with_their_code(tmp_path):
    """Without the wait for the thread that asks, 5 of 6 ended by an abort of C++."""
    for trial in range(2):
        flags = (f"--coordinator=localhost:{free_port()}", "--processes=2")
        processes = [
            start(
                [sys.executable, "-c", ENDING, *flags, f"--process={i}"],
                tmp_path / f"{trial}-{i}",
            )
            for i in range(2)
        ]
        assert [process.wait(timeout=TIMEOUT) for process in processes] == [75, 75]


def test_a_process_that_does_not_arrive_is_named(few_scenes, tmp_path):
    flags = (f"--coordinator=localhost:{free_port()}", "--processes=3", "--start_timeout=15")
    processes = [
        start(command(few_scenes, tmp_path / "run", *flags, f"--process={i}"), tmp_path / str(i))
        for i in (0, 2)
    ]
    assert [process.wait(timeout=TIMEOUT) for process in processes] == [5, 5]
    for i in (0, 2):
        assert "process 1 of 3 did not arrive; there: 0 (" in log(tmp_path / str(i))


# Files


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoints_before(few_scenes, tmp_path):
    changes = ENDLESS | {"train__checkpoint_every": 2, "train__log_every": 1}
    process = start(command(few_scenes, tmp_path, **changes), tmp_path, piped=True)
    wait_for(lambda: (tmp_path / "checkpoints" / "4").is_dir(), process)
    fill_disk_of(process)
    assert process.wait(timeout=TIMEOUT) == 4, log(tmp_path)[-3000:]
    wait_for(lambda: "a checkpoint cannot be written to" in log(tmp_path))
    kept = [int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*") if p.name.isdigit()]
    assert max(kept) >= 4
    last_step = max(
        int(row.split("/")[0][5:]) for row in log(tmp_path).splitlines() if row[:5] == "step "
    )
    assert last_step <= max(kept) + 4, "the error came later than with the next save"
    process = start(command(few_scenes, tmp_path, **changes), tmp_path)
    wait_for(lambda: f"step {max(kept) + 2}/" in log(tmp_path), process)
    process.kill()
    assert f"resuming from step {max(kept)}" in log(tmp_path)


def test_a_diverging_run_names_its_batch_and_saves_nothing_of_it(few_scenes, tmp_path):
    changes = {"optimizer__learning_rate": 1e30, "train__log_every": 1}
    result = run(command(few_scenes, tmp_path, "--record_names", **changes), check=False)
    assert result.returncode == 3, result.stderr[-3000:]
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: loss")]
    step = int(line.split("in step ")[1].split(",")[0])
    rows = [json.loads(x) for x in (tmp_path / "records.jsonl").read_text().splitlines()]
    (names,) = [row["records"] for row in rows if row["step"] == step]
    assert ", ".join(names) in line
    saved = [int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")]
    assert all(number < step for number in saved)
    for number in saved:
        assert all(np.isfinite(x).all() for x in saved_state(tmp_path, number).values())


RESTORE = """
import json, sys, jax
from duc_dlc_jax import checkpoints, optimizer, sharding, train_step
from duc_dlc_jax.models import segmenter
from runs import SMALL, tiny_config
config = tiny_config("", **SMALL)
model, rule = segmenter.create(config.model, 8), optimizer.create(config.optimizer, 6)
everywhere = sharding.replicated(sharding.make_mesh())
like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    jax.eval_shape(lambda: train_step.create_state(model, rule, config)),
)
state, position = checkpoints.Checkpoints(sys.argv[1]).restore(2, like)
devices = sorted({len(x.sharding.device_set) for x in jax.tree.leaves(state)})
print(json.dumps([devices, position, checkpoints.checksums(state)]))
"""


def test_saved_on_eight_devices_restored_on_four_and_one(few_scenes, tmp_path):
    changes = {"train__steps": 2, "train__batch_size": 8}
    run(command(few_scenes, tmp_path, **changes), devices=8)
    saved = json.loads((tmp_path / "checkpoints" / "2" / "data" / "metadata").read_text())
    tests = str(pathlib.Path(__file__).parent)
    program = f"import sys; sys.path.insert(0, {tests!r})\n{RESTORE}"
    for devices in (4, 1):
        printed = run([sys.executable, "-c", program, str(tmp_path)], devices=devices).stdout
        found, position, checksums = json.loads(printed)
        assert (found, position) == ([devices], 16)
        assert len(checksums) > 50
        assert checksums == saved["checksums"]


def test_verify_resume_finds_equal_runs_and_notices_one_flipped_bit(few_scenes, tmp_path):
    from duc_dlc_jax import config as config_lib
    from duc_dlc_jax import verify_resume
    from duc_dlc_jax.errors import NotEqual

    flags = ("--verify_resume", "--verify_steps=4")
    result = run(command(few_scenes, tmp_path, *flags, optimizer__ema_decay=0.9))
    assert result.stdout.startswith("equal bit for bit: ")
    assert "16 records of 4 steps" in result.stdout
    folders = [tmp_path / "verify_resume" / name for name in ("straight", "killed")]
    flip_a_bit_of_the_momentum(folders[1], 4)
    with pytest.raises(NotEqual, match=r"opt_state/.*kernel: 1 of \d+ numbers, by up to"):
        verify_resume.compare(*folders, 4)
    row = folders[0] / "records.jsonl"
    row.write_text(row.read_text().replace("train", "other", 1))
    with pytest.raises(NotEqual, match="records of step 1"):
        verify_resume.compare(*folders, 4)
    assert config_lib.from_json((folders[0] / "config.json").read_text()).train.steps == 4


def flip_a_bit_of_the_momentum(workdir, step):
    """Saves the state again with one bit of one number of the momentum changed."""
    import jax
    import orbax.checkpoint as ocp

    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        state = checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))
        names = jax.tree_util.tree_leaves_with_path(state)
        kernel = next(
            leaf
            for key, leaf in names
            if "opt_state" in jax.tree_util.keystr(key) and "kernel" in jax.tree_util.keystr(key)
        )
        kernel.reshape(-1).view(np.uint32)[5] ^= 1
        checkpointer.save(path, state, force=True)
