"""launch/local.sh, with a stand-in for Python that reports how it was called."""

import os
import pathlib
import subprocess
import time

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "launch" / "local.sh"
STAND_IN = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then echo 12345; exit; fi
echo "$JAX_NUM_CPU_DEVICES $*" > "{folder}/called-${{*: -1}}"
{body}
"""


def launch(folder, *arguments, body="", **env):
    python = folder / "python"
    python.write_text(STAND_IN.format(folder=folder, body=body))
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "LOG_DIR": str(folder / "logs")} | env
    command = [SCRIPT, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


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
    assert launch(tmp_path, "--processes=2", "--", body=body).returncode == 3
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("arguments", [["--processes=0"], ["--processes=two"], ["--config=c.py"]])
def test_wrong_options_end_before_anything_starts(tmp_path, arguments):
    result = launch(tmp_path, *arguments)
    assert result.returncode == 2
    assert "error: " in result.stderr
    assert not list(tmp_path.glob("called*"))
