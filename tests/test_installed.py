"""The installed wheel in an empty folder, and checkpoints that move between Python versions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duc_dlc_jax.data.builders import scenes
from duc_dlc_jax.data.labels import label_spec, voc_colour
from runs import SMALL, TINY, command, environment, run

pytestmark = pytest.mark.installed
ROOT = Path(__file__).parent.parent
ADE20K = Path(os.environ.get("DUC_DLC_SHARED_DATA", ""), "ade20k_sample")


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


def size(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_every_command_works_in_an_empty_folder(site, few_scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = {"PYTHONPATH": str(site)}

    def module(name, *arguments):
        return run([sys.executable, "-m", f"duc_dlc_jax.{name}", *arguments], **env).stdout

    where = "import duc_dlc_jax; print(duc_dlc_jax.__file__)"
    assert run([sys.executable, "-c", where], **env).stdout.startswith(str(site))
    prepared = module("data.prepare", "--dataset=scenes", f"--data_dir={few_scenes}")
    assert "already prepared" in prepared
    run(command(few_scenes, "run", **SMALL), **env)
    module("evaluate", "--workdir=run", "--json=scores.json", "--report=page")
    assert "<title>scenes, val</title>" in Path("page/index.html").read_text()
    assert json.loads(Path("scores.json").read_text())["step"] == 6
    Image.new("RGB", (64, 48)).save("black.png")
    module("predict", "--model=run", "--input=black.png", "--output=out")
    assert size("out/ids/black.png") == (64, 48)
    module("export", "--workdir=run", "--output=bundle", "--format=stablehlo")
    assert "answers as the trained network" in module("export", "--verify=bundle")
    module("predict", "--model=bundle", "--input=black.png", "--output=again")
    assert size("again/ids/black.png") == (64, 48)
    again = module("evaluate", "--model=bundle", f"--data_dir={few_scenes}", "--json=again.json")
    assert "single scale, whole image" in again
    scores, again = (json.loads(Path(f"{name}.json").read_text()) for name in ("scores", "again"))
    assert again["mIoU"] == pytest.approx(scores["mIoU"], abs=1e-4)
    assert "step 6 of 4, 6" in module("surgery", "show", "--workdir=run")
    figures = json.loads(module("describe", "--config=configs/ade20k.py", "--json"))
    assert sum(figures["parameters"].values()) == 35_927_638


def write_folders(root: Path, colours: bool) -> None:
    """Parts of ADE20K's images, and drawn scenes under its classes, as two folders; odd sizes.

    Masks are RGB pictures, or palette PNGs of ADE20K's ids; one photo is cut off.
    """
    spec = label_spec("ade20k")
    table = np.array([voc_colour(k) for k in range(256)], np.uint8)  # by raw id; ignored is black
    drawn = ("sky", "building", "road", "sidewalk", "tree", "car", "pole", "signboard")
    ids = np.zeros(256, np.uint8)
    ids[: len(drawn)] = [spec.classes.index(name) + 1 for name in drawn]
    pairs = {"train/scene_0": scenes.draw("train", 0), "val/scene": scenes.draw("val", 0)}
    pairs = {name: (image, ids[label]) for name, (image, label) in pairs.items()}
    for i, path in enumerate(sorted(ADE20K.glob("images/*.jpg"))):
        label = Image.open(ADE20K / "annotations" / f"{path.stem}.png")
        pairs[f"train/{path.stem}"] = np.array(Image.open(path)), np.array(label)
        pairs[f"{'val' if i == 0 else 'train'}/part_{i}"] = pairs[f"train/{path.stem}"]
    for i, (name, (image, label)) in enumerate(pairs.items()):
        height, width = (97, 131) if name.startswith("val") else (90 + 7 * i, 141 - 3 * i)
        photo = Image.fromarray(image[-height:, :width])
        mask = Image.fromarray(
            table[label[-height:, :width]] if colours else label[-height:, :width]
        )
        if not colours:
            mask.putpalette(table.tobytes())
        for kind, picture, suffix in (("images", photo, ".jpg"), ("labels", mask, "_mask.png")):
            path = root / kind / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    broken = root / "images" / "train" / "scene_0.jpg"
    broken.write_bytes(broken.read_bytes()[:1000])
    entries = [
        {"name": name, **({"color": [int(v) for v in table[k]]} if colours else {"id": k})}
        for k, name in enumerate(("void", *spec.classes))
    ]
    (root / "classes.json").write_text(json.dumps(entries))


@pytest.mark.skipif(not ADE20K.is_dir(), reason="DUC_DLC_SHARED_DATA has no ade20k_sample")
@pytest.mark.parametrize("masks", ["colours", "palette"])
def test_two_folders_in_an_empty_folder(site, tmp_path, monkeypatch, masks):
    monkeypatch.chdir(tmp_path)
    write_folders(tmp_path, masks == "colours")
    fields = TINY | {name.replace("__", "."): value for name, value in SMALL.items()}
    fields = [f"--config.{name}={value}" for name, value in fields.items() if name != "data.name"]
    fit = [sys.executable, "-m", "duc_dlc_jax.fit", "--images=images", "--labels=labels"]
    fit += ["--workdir=run", *fields]
    env = {"PYTHONPATH": str(site)}
    if masks == "palette":
        refused = run(fit, check=False, **env)
        assert refused.returncode == 2
        assert "scene_0.jpg: unreadable or truncated" in refused.stderr
        assert "--skip_bad" in refused.stderr
        assert not Path("run").exists()
    printed = run([*fit, "--skip_bad"], **env).stdout
    for words in (
        "Left out  1",
        "5 train, 2 val: the folders",
        "2 images; single scale",
        "predict ",
    ):
        assert words in printed, printed
    spec = label_spec("ade20k")
    labels = json.loads(Path("run/labels.json").read_text())
    assert labels["classes"] == list(spec.classes)
    road = spec.classes.index("road")
    assert labels["palette"][road] == list(voc_colour(road + 1))
    scores = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(scores[-1]["val/mIoU"])
    predict = ["--model=run", "--input=images/val", "--output=out"]
    run([sys.executable, "-m", "duc_dlc_jax.predict", *predict], **env)
    assert size("out/ids/scene.png") == (131, 97)


@pytest.mark.skipif(
    "DUC_DLC_OTHER_PYTHON" not in os.environ, reason="DUC_DLC_OTHER_PYTHON is unset"
)
@pytest.mark.parametrize("direction", ["here_to_there", "there_to_here"])
def test_checkpoints_move_between_python_versions(few_scenes, tmp_path, direction):
    """$DUC_DLC_OTHER_PYTHON: the interpreter of another version's environment."""
    any_jax = {"XLA_FLAGS": ""}  # no flag that one of the two versions does not know
    pythons = [sys.executable, os.environ["DUC_DLC_OTHER_PYTHON"]]
    if direction == "there_to_here":
        pythons.reverse()
    run(command(few_scenes, tmp_path, python=pythons[0], **SMALL), **any_jax)
    before = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    arguments = ["-m", "duc_dlc_jax.evaluate", f"--workdir={tmp_path}"]
    run([pythons[1], *arguments, f"--json={tmp_path / 'scores.json'}"], **any_jax)
    after = json.loads((tmp_path / "scores.json").read_text())
    assert after["mIoU"] == pytest.approx(before["val/mIoU"], abs=1e-3)
    more = command(few_scenes, tmp_path, python=pythons[1], **SMALL, train__steps=8)
    result = subprocess.run(more, env=environment(**any_jax), capture_output=True, text=True)
    assert "resuming from step 6" in result.stderr, result.stderr[-2000:]
    assert result.returncode == 0, result.stderr[-2000:]
