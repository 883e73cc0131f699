"""launch/offline.sh: what is packed arrives, damage is noticed; jobs that fail end no others.

Wheels need a network, and what the jobs measure a GPU: neither is here.
"""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "launch" / "offline.sh"


def run(*arguments, **variables):
    command = [SCRIPT, *map(str, arguments)]
    env = os.environ | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


@pytest.fixture
def packed(tmp_path):
    """(folder of the parts, bytes of the records): 2.5 MB in parts of 1 MiB."""
    records = tmp_path / "data" / "camvid" / "2.0.0"
    records.mkdir(parents=True)
    content = np.random.default_rng(0).bytes(2_500_000)
    (records / "camvid-train.array_record").write_bytes(content)
    weights = tmp_path / "weights.npz"
    weights.write_bytes(b"numbers")
    parts = tmp_path / "parts"
    flags = ("--have=all", f"--records={records}", f"--weights={weights}", "--part_mib=1")
    result = run("pack", parts, *flags)
    assert result.returncode == 0, result.stderr
    return parts, content


def test_parts_are_small_and_join_again(packed, tmp_path):
    parts, content = packed
    sizes = [path.stat().st_size for path in parts.glob("part-*")]
    assert len(sizes) == 3
    assert max(sizes) <= 2**20
    result = run("unpack", parts, tmp_path / "there")
    assert result.returncode == 0, result.stderr
    arrived = tmp_path / "there" / "data" / "camvid" / "2.0.0" / "camvid-train.array_record"
    assert arrived.read_bytes() == content
    assert (tmp_path / "there" / "weights.npz").read_bytes() == b"numbers"
    assert "PYTHONPATH" in result.stdout


def test_a_flipped_bit_is_noticed(packed, tmp_path):
    parts, _ = packed
    part = parts / "part-001"
    data = bytearray(part.read_bytes())
    data[1000] ^= 1
    part.write_bytes(data)
    result = run("unpack", parts, tmp_path / "there")
    assert result.returncode == 2
    assert "not as packed" in result.stderr
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack"], "pack needs a folder"),
        (["pack", "out", "--records=nowhere", "--have=all"], "no such folder"),
        (["pack", "out", "--part_mib=x"], "a number of MiB"),
        (
            ["measure", "out", "dance"],
            "unknown job dance; there are step networks layers memory fed resume",
        ),
        (["fly"], "pack, unpack or measure"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    arguments = [str(tmp_path / a) if a == "out" else a for a in arguments]
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.fixture
def measured(tmp_path):
    """Runs `measure` with an interpreter that fails where a command matches `breaks`.

    Returns its result, the commands with the variables that they saw, and the lines of jobs.jsonl.
    """
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$JAX_COMPILATION_CACHE_DIR|${{XLA_FLAGS:-}}|$*" >>{tmp_path}/commands\n'
        '[[ -z "$BREAKS" || "$*" != *$BREAKS* ]] || exit 7\n'
    )
    python.chmod(0o755)

    def measure(*jobs, breaks="", **variables):
        variables = {"JAX_COMPILATION_CACHE_DIR": "", "XLA_FLAGS": ""} | variables
        result = run("measure", out, *jobs, PYTHON=str(python), BREAKS=breaks, **variables)
        commands = [line.split("|") for line in (tmp_path / "commands").read_text().splitlines()]
        lines = (out / "jobs.jsonl").read_text().splitlines()
        return result, commands, [json.loads(line) for line in lines]

    return measure


def test_a_job_that_fails_does_not_end_the_others(measured):
    result, commands, jobs = measured("layers", "step", "networks", breaks="--what=layers")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: failed, with exit status: layers (7)"
    assert [(job["job"], job["status"]) for job in jobs] == [
        ("layers", 7), ("step", 0), ("networks", 0)
    ]  # fmt: skip
    assert all(job["seconds"] >= 0 for job in jobs)
    assert len(commands) == 4


def test_a_part_that_fails_does_not_end_its_job(measured):
    result, commands, jobs = measured("fed", breaks="workers=4", DATA_DIR="records")
    assert result.returncode == 1
    assert jobs[0]["status"] == 7
    for (_, _, command), field in zip(
        commands, ("threads=8", "workers=4", "on_device=True"), strict=True
    ):
        assert f"--config.data.{field}" in command
        assert "--config.data.dir=records" in command


def test_without_records_only_their_jobs_fail(measured):
    result, _, jobs = measured("fed", "layers", DATA_DIR="")
    assert result.returncode == 1
    assert "the folder of the prepared records" in result.stderr
    assert [job["status"] > 0 for job in jobs] == [True, False]


def test_the_step_is_timed_with_defaults_and_profiled_without_graphs(measured, tmp_path):
    result, commands, _ = measured("step")
    assert result.returncode == 0, result.stderr
    (cache, flags, timed), (_, other_flags, profiled) = commands
    assert cache == str(tmp_path / "out" / "cache")
    assert (flags, "--profile" in timed, "--peer=torch" in timed) == ("", False, True)
    assert "--xla_gpu_enable_command_buffer= " in other_flags
    assert ("--profile" in profiled, "--peer" in profiled) == (True, False)


def test_the_cache_that_is_given_and_measuring_again(measured):
    _, commands, _ = measured("memory", JAX_COMPILATION_CACHE_DIR="/elsewhere", AGAIN="1")
    assert [cache for cache, *_ in commands] == ["/elsewhere"] * 2
    timed, largest = (command for *_, command in commands)
    assert "--again" in timed
    assert "--what=networks" in timed
    assert "50/32@480x16+train.accumulate=2" in timed
    assert "--what=memory" in largest
    assert "50/32@480x16+model.remat=all" in largest
