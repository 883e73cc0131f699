"""launch/offline.sh: what is packed arrives, damage is noticed. Wheels need a network: not here."""

import pathlib
import subprocess

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "launch" / "offline.sh"


def run(*arguments):
    command = [SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


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
            "unknown job dance; there are layers, step, networks, resume",
        ),
        (["fly"], "pack, unpack or measure"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    arguments = [str(tmp_path / a) if a == "out" else a for a in arguments]
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
