"""The installed wheel in an empty folder, and checkpoints that move between Python versions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from runs import command, environment, run

pytestmark = pytest.mark.installed
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the package as the wheel installs it, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={folder}", str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", f"--target={target}", str(wheel)], check=True)
    return target


def test_every_command_works_in_an_empty_folder(site, scenes_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = {"PYTHONPATH": str(site)}

    def module(name, *arguments):
        return run([sys.executable, "-m", f"duc_dlc_jax.{name}", *arguments], **env).stdout

    where = "import duc_dlc_jax; print(duc_dlc_jax.__file__)"
    assert run([sys.executable, "-c", where], **env).stdout.startswith(str(site))
    prepared = module("data.prepare", "--dataset=scenes", f"--data_dir={scenes_dir}")
    assert "already prepared" in prepared
    run(command(scenes_dir, "run"), **env)
    module("evaluate", "--workdir=run", "--json=scores.json")
    assert json.loads(Path("scores.json").read_text())["step"] == 6
    Image.new("RGB", (64, 48)).save("black.png")
    module("predict", "--model=run", "--input=black.png", "--output=out")
    assert Image.open("out/ids/black.png").size == (64, 48)
    figures = json.loads(module("describe", "--config=configs/ade20k.py", "--json"))
    assert sum(figures["parameters"].values()) == 35_927_638


@pytest.mark.skipif(
    "DUC_DLC_OTHER_PYTHON" not in os.environ, reason="DUC_DLC_OTHER_PYTHON is unset"
)
@pytest.mark.parametrize("direction", ["here_to_there", "there_to_here"])
def test_checkpoints_move_between_python_versions(scenes_dir, tmp_path, direction):
    """$DUC_DLC_OTHER_PYTHON: the interpreter of another version's environment."""
    pythons = [sys.executable, os.environ["DUC_DLC_OTHER_PYTHON"]]
    if direction == "there_to_here":
        pythons.reverse()
    run(command(scenes_dir, tmp_path, python=pythons[0]))
    before = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    arguments = ["-m", "duc_dlc_jax.evaluate", f"--workdir={tmp_path}"]
    run([pythons[1], *arguments, f"--json={tmp_path / 'scores.json'}"])
    after = json.loads((tmp_path / "scores.json").read_text())
    assert after["mIoU"] == pytest.approx(before["val/mIoU"], abs=1e-3)
    more = command(scenes_dir, tmp_path, python=pythons[1], train__steps=8)
    result = subprocess.run(more, env=environment(), capture_output=True, text=True)
    assert "resuming from step 6" in result.stderr, result.stderr[-2000:]
    assert result.returncode == 0, result.stderr[-2000:]
