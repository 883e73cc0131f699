"""Several processes that train one grid: who takes what, what a dead one leaves, equal scores."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from duc_dlc_jax import config as config_lib
from duc_dlc_jax.ablate import claims, grid, runner
from duc_dlc_jax.ablate.__main__ import listed, train_all
from duc_dlc_jax.ablate.grid import Variant, parts
from duc_dlc_jax.ablate.results import Results
from duc_dlc_jax.config import ConfigError
from runs import environment, grid_file

VARIANTS = [Variant("fcn", parts("none", "none"), 2), Variant("duc", parts("duc", "none"), 2)]
RUNS = grid.runs(VARIANTS)  # fcn-seed0, fcn-seed1, duc-seed0, duc-seed1
ENDED = {"seed": 0, "val": {"mIoU": 0.5, "PA": 0.75, "boundary": {"mean_iou": 0.25}}}

# Claims the first run that is free, says so, and keeps it.
HOLDER = """
import sys, time
from pathlib import Path
from duc_dlc_jax.ablate import claims, grid
runs = grid.runs([grid.Variant("fcn", {}, 2), grid.Variant("duc", {}, 2)])
with claims.Claims(Path(sys.argv[1])).claimed(lambda held: claims.choose(runs, held, "")) as run:
    print(run.name, flush=True)
    time.sleep(300)
"""


# Which run comes next


@pytest.mark.parametrize(
    ("held", "current", "expected"),
    [
        ([], "", "fcn-seed0"),
        (["fcn-seed0"], "", "duc-seed0"),  # nobody compiles what another process has compiled
        (["fcn-seed0"], "fcn", "fcn-seed1"),  # but who has the programs stays with them
        (["fcn-seed7"], "", "duc-seed0"),  # another process's --seeds
        (["fcn-seed0", "duc-seed0"], "", "fcn-seed1"),
        (["fcn-seed0", "fcn-seed1"], "fcn", "duc-seed0"),
        ([run.name for run in RUNS], "fcn", None),
    ],
)
def test_a_process_stays_with_its_variant_and_avoids_those_of_others(held, current, expected):
    chosen = claims.choose(RUNS, held, current)
    assert (chosen and chosen.name) == expected


def test_runs_that_are_done_are_passed_over_and_failed_ones_come_last(tmp_path):
    found = Results(tmp_path)
    found.write(RUNS[0], ENDED)
    found.write_failure(RUNS[1], RuntimeError("out of memory"))
    tried: list[str] = []
    for _ in range(3):
        with found.claimed(RUNS, tried, "fcn") as chosen:
            tried.append(chosen.name)
    assert tried == ["duc-seed0", "duc-seed1", "fcn-seed1"]
    with found.claimed(RUNS, tried, "fcn") as chosen:
        assert chosen is None


# Claims


def test_a_claimed_run_is_taken_by_nobody_else_until_the_block_ends(tmp_path):
    one, two = Results(tmp_path), Results(tmp_path)
    assert one.claims.holders() == {}
    with one.claimed(RUNS, (), "") as first, two.claimed(RUNS, (), "fcn") as second:
        assert (first.name, second.name) == ("fcn-seed0", "fcn-seed1")
        us = f"{socket.gethostname()}, pid {os.getpid()}"
        assert one.claims.holders() == {"fcn-seed0": us, "fcn-seed1": us}
        assert listed(RUNS, one).splitlines()[0].split(" on ")[1].startswith(us + " model.")
        one.write(first, ENDED)
        assert "running" not in listed(RUNS, one).splitlines()[0]
    with contextlib.suppress(KeyError), one.claimed(RUNS, (), "") as first:
        assert first.name == "fcn-seed1"
        raise KeyError
    assert one.claims.holders() == {}


def test_a_killed_process_frees_its_run(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "claims")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "fcn-seed0\n"
        found = Results(tmp_path)
        assert found.claims.holders() == {"fcn-seed0": f"{socket.gethostname()}, pid {process.pid}"}
        with found.claimed(RUNS, (), "") as chosen:
            assert chosen.name == "duc-seed0"
    finally:
        process.kill()
        process.communicate()
    assert found.claims.holders() == {}
    with found.claimed(RUNS, (), "") as chosen:
        assert chosen.name == "fcn-seed0"


def test_without_locks_one_warning_and_no_claims(tmp_path, monkeypatch, caplog):
    def refuse(file, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    found = Results(tmp_path)
    for tried, expected in ((), "fcn-seed0"), (("fcn-seed0",), "fcn-seed1"):
        with found.claimed(RUNS, tried, "fcn") as chosen:
            assert chosen.name == expected
            assert found.claims.holders() == {}
    warnings = [r.getMessage() for r in caplog.records if "has no locks" in r.getMessage()]
    assert len(warnings) == 1
    assert "start no second process in this workdir" in warnings[0]


# The loop


@pytest.fixture
def trained(monkeypatch) -> dict:
    """Names of the runs trained here -> what happens in it, in place of training."""
    happens: dict = {}

    class Trainer:
        def __init__(self, config, data):
            self.upsampling = {"none": "fcn", "duc": "duc"}[config.model.upsampling]

        def run(self, config, files):
            name = f"{self.upsampling}-seed{config.seed}"
            happens.setdefault(name, lambda: None)()
            return ENDED | {"seed": config.seed, "seconds": {"total": 1.0}}

    monkeypatch.setattr(runner, "Trainer", Trainer)
    monkeypatch.setattr(runner, "Data", lambda data: None)
    return happens


def test_what_other_processes_did_meanwhile_is_noticed(trained, tmp_path, capsys):
    """One that works on duc-seed0, has ended duc-seed1 and freed fcn-seed1 again."""
    mine, other = Results(tmp_path), Results(tmp_path)
    with contextlib.ExitStack() as held, contextlib.ExitStack() as freed:
        freed.enter_context(other.claimed(RUNS[1:2], (), ""))
        held.enter_context(other.claimed(RUNS[2:3], (), ""))

        def meanwhile():
            other.write(RUNS[3], ENDED)
            freed.close()

        trained["fcn-seed0"] = meanwhile
        assert train_all(config_lib.default(), RUNS, mine, float("inf"), False) == 1
        assert list(trained) == ["fcn-seed0", "fcn-seed1"]
    assert "fcn-seed1 starts, 2 of 4 runs are left" in capsys.readouterr().out


def test_a_run_that_failed_is_tried_once_by_each_process(trained, tmp_path):
    calls = []

    def fail():
        calls.append(1)
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    trained["fcn-seed0"] = fail
    for number in (1, 2):
        assert train_all(config_lib.default(), RUNS, Results(tmp_path), float("inf"), False) == 1
        assert len(calls) == number
    trained["fcn-seed0"] = lambda: None
    assert train_all(config_lib.default(), RUNS, Results(tmp_path), float("inf"), False) == 0
    assert Results(tmp_path).failures() == {}


def test_a_run_that_another_process_began_with_another_budget_is_refused(trained, tmp_path):
    """It was begun, and its process died, after this one had looked."""
    base, found = config_lib.default(), Results(tmp_path)

    def meanwhile():
        other = base.copy_and_resolve_references()
        other.train.epochs = 30.0
        folder = found.files(RUNS[1]).unfinished
        (folder / "checkpoints" / "2").mkdir(parents=True)
        (folder / "config.json").write_text(
            config_lib.to_json(RUNS[1].variant.config(other, RUNS[1].seed))
        )

    trained["fcn-seed0"] = meanwhile
    with pytest.raises(ConfigError, match=r"unfinished/fcn-seed1 was run with train\.epochs=30\.0"):
        train_all(base, RUNS, found, float("inf"), False)
    assert found.claims.holders() == {}


# Two commands


class Command:
    """`ablate` as a process of its own, with its output in files beside the workdir."""

    def __init__(self, path: Path, workdir: Path, name: str, *extra: str):
        words = [sys.executable, "-m", "duc_dlc_jax.ablate", f"--config={path}"]
        self.log = workdir.with_name(f"{workdir.name}-{name}.log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*words, f"--workdir={workdir}", *extra],
                env=environment(), stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def wait(self) -> str:
        assert self.process.wait(timeout=600) == 0, self.log.read_text()[-4000:]
        return self.log.read_text()

    def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.02)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def trained_by(log: str) -> list[str]:
    return re.findall(r"^(\S+-seed\d): mIoU", log, re.MULTILINE)


@pytest.fixture(scope="module")
def alone(few_scenes, tmp_path_factory):
    """The grid of two variants and two seeds, and its workdir after one process.

    The variants differ in their crops: one compiled program serves both.
    """
    folder = tmp_path_factory.mktemp("alone")
    kinds = (("a", 0.0), ("b", 0.5))
    change = "parts('none', 'none') | {{'data.photometric_probability': {}}}"
    a, b = (f"Variant({name!r}, {change.format(share)}, 2)" for name, share in kinds)
    changes = {"train__steps": 40, "train__eval_every": 20, "train__checkpoint_every": 5}
    path = grid_file(folder / "mine.py", few_scenes, f"[{a}, {b}]", **changes)
    log = Command(path, folder / "alone", "one").wait()
    assert trained_by(log) == ["a-seed0", "a-seed1", "b-seed0", "b-seed1"]
    return path, folder / "alone"


def assert_equal(workdir: Path, alone: Path, count: int) -> None:
    found = {f"{r['variant']}-seed{r['seed']}": r for r in Results(workdir).all()}
    expected = {f"{r['variant']}-seed{r['seed']}": r for r in Results(alone).all()}
    assert len(found) == count
    for name, result in found.items():
        for what in ("curve", "val", "crops"):
            assert result[what] == expected[name][what], f"{name}: {what}"
        masks = [Results(folder).masks(name).read_bytes() for folder in (workdir, alone)]
        assert masks[0] == masks[1]


@pytest.mark.commands
def test_two_processes_share_a_grid(alone, tmp_path):
    path, expected = alone
    workdir = tmp_path / "two"
    both = [Command(path, workdir, name) for name in ("first", "second")]
    try:
        logs = [command.wait() for command in both]
    finally:
        for command in both:
            command.end()
    names = [trained_by(log) for log in logs]
    once = ["a-seed0", "a-seed1", "b-seed0", "b-seed1"]
    assert sorted(name for part in names for name in part) == once
    assert {part[0][0] for part in names} == {"a", "b"}  # a variant each, to begin with
    ends = [
        re.search(r"(\d) of 4 runs are done(?:, (\d) running in other processes)?;", log)
        for log in logs
    ]
    done, running = zip(*[(int(end[1]), int(end[2] or 0)) for end in ends], strict=True)
    assert max(done) == 4
    assert [d + r for d, r in zip(done, running, strict=True)] == [4, 4]
    assert_equal(workdir, expected, 4)
    assert list((workdir / "unfinished").iterdir()) == []
    assert list(workdir.rglob("*.partial")) == []


@pytest.mark.commands
def test_a_run_of_killed_processes_goes_on_with_the_same_bits(alone, tmp_path):
    """The first one is stopped in its run, so that the second one takes the other, then killed.

    The second one takes over and is killed too, as soon as a new checkpoint is there; the third one
    is the same command.
    """
    path, expected = alone
    workdir, seed = tmp_path / "taken_over", "--seeds=0"
    unfinished, commands = workdir / "unfinished", []

    def start(name: str) -> Command:
        commands.append(Command(path, workdir, name, seed))
        return commands[-1]

    def saved() -> set[str]:
        found = (unfinished / "a-seed0" / "checkpoints").glob("[0-9]*")
        return {path.name for path in found if path.name.isdigit()}

    try:
        first = start("first")
        first.until(saved)
        first.process.send_signal(signal.SIGSTOP)
        second = start("second")
        second.until((unfinished / "b-seed0").exists)
        lines = listed(grid.runs(grid.load(str(path)).variants, seeds=[0]), Results(workdir))
        assert f"running on {socket.gethostname()}, pid {first.process.pid} " in lines
        seen = saved()
        first.end()
        second.until(lambda: saved() - seen)
        second.end()
        log = start("third").wait()
    finally:
        for command in commands:
            command.end()
    assert "b-seed0: mIoU" in second.log.read_text()
    assert trained_by(log) == ["a-seed0"]
    for text in (second.log.read_text(), log):
        assert "going on from step" in text
    assert "2 of 2 runs are done; the same command goes on" in log
    assert_equal(workdir, expected, 2)
    assert list(unfinished.iterdir()) == []
