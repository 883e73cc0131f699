"""`main --verify_resume`: does a killed and resumed run equal one that was left alone?

Three fresh processes: N steps straight; the same to a kill -9 after N / 2; and the rest. Every
array of the two last checkpoints is compared bit for bit, and every record that was read.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from duc_dlc_jax import storage
from duc_dlc_jax.checkpoints import COMPLETE, by_path
from duc_dlc_jax.errors import NotEqual


def verify(arguments: Sequence[str], workdir: epath.Path, steps: int) -> str:
    """Runs `main` with the arguments of this command; returns what was found equal.

    steps: N; what the runs leave is in workdir/verify_resume.

    Raises NotEqual, with the arrays and records that differ, and RuntimeError where a run fails.
    """
    folder = workdir / "verify_resume"
    folder.rmtree(missing_ok=True)
    straight, killed = folder / "straight", folder / "killed"
    half = max(steps // 2, 1)
    own = ("verify_resume", "verify_steps", "workdir=")
    kept = [word for word in arguments if not word.lstrip("-").startswith(own)]
    for i, word in enumerate(kept):
        if word.lstrip("-") == "workdir":
            del kept[i : i + 2]  # and its value
            break
    changes = [f"--config.train.steps={steps}", f"--config.train.checkpoint_every={half}"]
    command = [sys.executable, "-m", "duc_dlc_jax.main", *kept, *changes, "--record_names"]
    _run(command, straight)
    _run(command, killed, kill_after=half)
    _run(command, killed)
    return compare(straight, killed, steps)


def _run(command: list[str], workdir: epath.Path, kill_after: int = 0) -> None:
    """One process; with `kill_after` it is killed once the checkpoint of that step is there."""
    workdir.mkdir(parents=True, exist_ok=True)
    print(f"{'killed' if kill_after else 'runs'}: {workdir}", file=sys.stderr)
    remote = storage.is_remote(workdir)
    path = workdir / "log.txt"
    if remote:
        path = epath.Path(tempfile.mkdtemp(prefix="verify_resume-")) / f"{workdir.name}.txt"
    with open(path, "a", encoding="utf-8") as log:
        process = subprocess.Popen([*command, f"--workdir={workdir}"], stdout=log, stderr=log)
        saved = workdir / "checkpoints" / str(kill_after) / COMPLETE
        while kill_after and process.poll() is None and not saved.exists():
            time.sleep(0.2 if remote else 0.02)
        if kill_after:
            process.send_signal(signal.SIGKILL)
        code = process.wait()
    wanted = -signal.SIGKILL if kill_after else 0
    if code != wanted:
        raise RuntimeError(
            f"the run in {workdir} ended with {code} instead of {wanted}; see {path}"
        )


def compare(first: epath.Path, second: epath.Path, step: int) -> str:
    """Two workdirs at a step; returns a sentence, or raises NotEqual."""
    states = [_arrays(workdir, step) for workdir in (first, second)]
    records = [_records(workdir) for workdir in (first, second)]
    wrong = [name for name in states[0] | states[1] if not _equal(states, name)]
    lines = [f"{name}: {_difference(states, name)}" for name in wrong[:20]]
    lines += [f"{len(wrong) - 20} more arrays"] * (len(wrong) > 20)
    for at in sorted(records[0] | records[1]):
        names = [one.get(at) for one in records]
        if names[0] != names[1]:
            lines.append(f"records of step {at}: {names[0]} and {names[1]}")
    if lines:
        raise NotEqual(f"{second} differs from {first} at step {step}:\n" + "\n".join(lines))
    values = sum(array.size for array in states[0].values())
    names = sum(len(row) for row in records[0].values())
    return (
        f"equal bit for bit: {len(states[0])} arrays of {values:,} numbers, and the {names} "
        f"records of {len(records[0])} steps"
    )


def _arrays(workdir: epath.Path, step: int) -> dict[str, np.ndarray]:
    path = storage.absolute(workdir) / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        saved = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        state = reader.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {name: np.asarray(leaf) for name, leaf in by_path(state).items()}


def _records(workdir: epath.Path) -> dict[int, list[str]]:
    """Names by step, of the last time that a step was done."""
    rows = storage.json_lines((workdir / "records.jsonl").read_text(encoding="utf-8"))
    return {row["step"]: row["records"] for row in rows}


def _equal(states: list[dict[str, np.ndarray]], name: str) -> bool:
    first, second = (state.get(name) for state in states)
    if first is None or second is None or first.shape != second.shape:
        return False
    return first.tobytes() == second.tobytes()


def _difference(states: list[dict[str, np.ndarray]], name: str) -> str:
    first, second = (state.get(name) for state in states)
    if first is None or second is None:
        return "only in one of them"
    if first.shape != second.shape:
        return f"{first.shape} and {second.shape}"
    count = np.count_nonzero(first != second)
    most = np.max(np.abs(first.astype(np.float64) - second.astype(np.float64)))
    return f"{count} of {first.size} numbers, by up to {most:.3g}"
