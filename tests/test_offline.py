"""launch/offline.sh: what is packed arrives, damage is noticed; jobs that fail end no others.

Wheels need a network, and what the jobs measure a GPU: neither is here.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "launch" / "offline.sh"


def run(*arguments, **variables):
    command = [SCRIPT, *map(str, arguments)]
    env = os.environ | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)


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


def test_what_the_package_needs_is_packed_and_nothing_else(tmp_path):
    """With an interpreter whose pip downloads nothing, and builds what has no wheel."""
    python, there = tmp_path / "python", tmp_path / "freeze.txt"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'[[ "$2" == pip ]] || exec {sys.executable} "$@"\n'
        f'name="${{@: -1}}"; echo "$3 $name" >>{tmp_path}/pip\n'
        '[[ "$3" == download ]] || { mkdir -p "$7" && touch "$7/promise-1-py3-none-any.whl"; }\n'
        '[[ "$3 $name" != "download promise"* ]]\n'
    )
    python.chmod(0o755)
    result = run("pack", tmp_path / "parts", "--have=jax,numpy,torch", PYTHON=str(python))
    assert result.returncode == 0, result.stderr
    asked = [line.split() for line in (tmp_path / "pip").read_text().splitlines()]
    names = {pin.partition("==")[0].lower() for _, pin in asked}
    assert {"grain", "array-record", "optax", "tensorflow-datasets", "promise"} <= names
    assert (
        not {"jax", "jaxlib", "numpy", "scipy", "tensorflow-cpu", "torch", "moto", "trio"} & names
    )
    assert [pin.partition("==")[0] for verb, pin in asked if verb == "wheel"] == ["promise"]
    packed = subprocess.run(["tar", "-tf", tmp_path / "parts" / "part-000"], capture_output=True)
    assert b"wheels/promise-1-py3-none-any.whl" in packed.stdout
    (tmp_path / "pip").unlink()
    there.write_text("\n".join(sorted(names - {"grain"})) + "\nSciPy @ file:///x\nNumPy==2.5\n")
    run("pack", tmp_path / "again", f"--have={there}", PYTHON=str(python))
    left = {
        line.split()[1].partition("==")[0] for line in (tmp_path / "pip").read_text().splitlines()
    }
    assert left == {"grain", "jax", "jaxlib", "ml-dtypes", "opt-einsum"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack"], "pack needs a folder"),
        (["pack", "out", "--records=nowhere", "--have=all"], "no such folder"),
        (["pack", "out", "--part_mib=x"], "a number of MiB"),
        (
            ["measure", "out", "dance"],
            "unknown job dance; there are options step remat layers networks resume fed",
        ),
        (["measure", "out", "--second=5"], "unknown option --second=5; --seconds=N is one"),
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
        jobs = sorted(jobs, key=lambda job: not job.startswith("--"))  # options first
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
    _, commands, _ = measured(
        "remat", "largest", JAX_COMPILATION_CACHE_DIR="/elsewhere", AGAIN="1", FIELDS="--config.a=1"
    )
    assert [cache for cache, *_ in commands] == ["/elsewhere"] * 2
    timed, largest = (command for *_, command in commands)
    assert "--again" in timed
    assert "--what=train,networks" in timed
    assert "50/32@480x16+train.accumulate=2" in timed
    assert "--what=memory" in largest
    assert "50/32@480x16+model.remat=all" in largest
    assert all("--config.a=1" in command for *_, command in commands)
    assert not any("--stop_after_s" in command for *_, command in commands)


def test_no_job_begins_that_might_end_too_late(measured):
    """Of 199 seconds the benchmark gets what is left; runs that take 300 and 200 get none."""
    result, commands, _ = measured(
        "resume", "camvid", "layers", "grid", "--seconds=199", WEIGHTS="w", DATA_DIR="d"
    )
    assert result.returncode == 0, result.stderr
    for job in ("resume", "camvid"):
        assert f"not begun, for want of time: {job}" in result.stdout
    assert len(commands) == 3
    for *_, command in commands:
        assert 150 <= int(command.split("--stop_after_s=")[1]) <= 180
