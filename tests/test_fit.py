"""From two folders to a trained model: the plan, the configuration file, resuming."""

import argparse
import dataclasses
import json
import logging
import os
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import describe, fit, plans, protocols, train, train_step, workdirs
from duc_dlc_jax.data import folders, prepare
from duc_dlc_jax.data.builders import scenes
from duc_dlc_jax.data.labels import DataError
from duc_dlc_jax.models import counts, segmenter
from runs import SMALL, TINY, run

pytestmark = pytest.mark.commands

SHARED = os.environ.get("DUC_DLC_SHARED_DATA", "")
GIB = 2**30
CPU = plans.Machine("cpu", "cpu", 1, 8 * GIB, 16 * GIB, 4)
SHALLOW = {"model.depth": 14}  # where the network does not matter: quicker to trace
GPU = plans.Machine("gpu", "NVIDIA A100", 1, 32 * GIB, 64 * GIB, 12)
FIELDS = {name: value for name, value in TINY.items() if name != "data.name"}
FIELDS |= {name.replace("__", "."): value for name, value in SMALL.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> argparse.Namespace:
    """Twelve drawn scenes of 96x128 pixels as two folders."""
    root = tmp_path_factory.mktemp("own")
    found = argparse.Namespace(images=root / "images", labels=root / "labels")
    for folder in vars(found).values():
        folder.mkdir()
    for i in range(12):
        image, label = scenes.draw("train", i)
        Image.fromarray(image[48:144, :128]).save(found.images / f"{i}.png")
        Image.fromarray(label[48:144, :128]).save(found.labels / f"{i}.png")
    return found


def request(two, **changes) -> fit.Request:
    flags = {"classes": None, "name": "", "val_share": 0.15, "seed": 0}
    flags |= {"binary": False, "skip_bad": False, "fields": FIELDS}
    return fit.Request(**{"images": str(two.images), "labels": str(two.labels)} | flags | changes)


def inspection(train=100, size=(480, 640), classes=5) -> folders.Inspection:
    """What `inspect` returns for images of one size, without files."""
    pair = folders.Pair("a", pathlib.Path("a"), pathlib.Path("a"))
    scans = [folders.Scan(pair, size)] * train
    spec = folders.classes.infer_spec(
        "mine",
        folders.classes.Values("grey ids", False, dict.fromkeys(range(classes), "a"), {}, ()),
    )
    return folders.Inspection(spec, {"train": scans, "val": scans[:7]}, "grey ids", "", "", ())


# The plan


def test_small_network_on_a_cpu():
    plan = plans.make(inspection(), CPU, {})
    demo = config_lib.load("configs/demo.py")
    assert plan.config.model == demo.model
    assert plan.config.data.crop_size == 256
    assert plan.config.train.steps == plans.CPU_STEPS
    assert plan.config.optimizer.new_layer_multiplier == 1


def test_the_papers_network_on_an_accelerator():
    plan = plans.make(inspection(train=1000), GPU, {})
    assert plan.config.model.depth == 50
    assert plan.config.model.dtype == "bfloat16"
    assert (plan.config.data.base_size, plan.config.data.crop_size) == (480, 480)
    assert plan.config.train.batch_size == 16
    assert plan.config.train.steps == 40 * 1000 / 16
    assert "--weights" in plan.why["model.depth"]


def test_a_misspelt_name_of_weights_is_no_file():
    with pytest.raises(config_lib.ConfigError, match=r"init\.weights=resnet51 .*mean resnet50\?"):
        plans.make(inspection(), CPU, {"init.weights": "resnet51"})
    with pytest.raises(FileNotFoundError, match="nothing/resnet51: no such file"):
        plans.make(inspection(), CPU, {"init.weights": "nothing/resnet51"})


def test_val_images_of_many_sizes_share_programs():
    found = inspection()
    assert plans.make(found, CPU, {}).config.eval.pad_sides == ()
    pair = found.scans["val"][0].pair
    sizes = [(300 + 7 * i, 400 + 11 * i) for i in range(20)]
    many = dataclasses.replace(
        found, scans=found.scans | {"val": [folders.Scan(pair, size) for size in sizes]}
    )
    config = plans.make(many, CPU, {}).config
    protocol = protocols.Protocol.from_config(config)
    padded = {protocol.padded_size(size) for size in sizes}
    assert len(config.eval.pad_sides) == 3
    assert len(padded) <= 9
    assert all(side % 32 == 0 for size in padded for side in size)
    assert max(config.eval.pad_sides) < 609 + 32


@pytest.mark.parametrize(("images", "steps"), [(10, 2000), (1001, 2503), (10**5, 40000)])
def test_steps_follow_from_the_images(images, steps):
    assert plans.make(inspection(train=images), GPU, SHALLOW).config.train.steps == steps


@pytest.mark.parametrize(
    ("size", "base", "crop"),
    [((1080, 1920), 1080, 480), ((250, 200), 200, 192), ((20, 90), 20, 32)],
)
def test_crop_follows_from_the_short_side(size, base, crop):
    data = plans.make(inspection(size=size), GPU, SHALLOW).config.data
    assert (data.base_size, data.crop_size) == (base, crop)


def test_batch_fits_the_memory():
    config = plans.make(inspection(), GPU, SHALLOW).config
    model = segmenter.create(config.model, 5)
    state = train_step.state_bytes(model, config)
    image = counts.activation_bytes(model, 480, 480)
    for images, devices, batch in ((2.5, 1, 2), (100, 1, 16), (2.5, 2, 4), (9, 32, 32)):
        memory = int(state + images * image)
        machine = dataclasses.replace(GPU, memory=memory, devices=devices)
        assert plans.make(inspection(), machine, SHALLOW).config.train.batch_size == batch


def test_given_fields_stay():
    given = {"train.batch_size": 3, "model.depth": 26, "train.steps": 7, "optimizer.momentum": 0.8}
    plan = plans.make(inspection(), CPU, given)
    assert {n: v for n, v in config_lib.fields(plan.config) if n in given} == given
    assert all(plan.why[name] == plans.GIVEN for name in given)
    assert plan.config.optimizer.learning_rate == pytest.approx(2e-2 * 3 / 16, rel=1e-3)
    with pytest.raises(config_lib.ConfigError, match=r"nearest one is train\.steps"):
        plans.make(inspection(), CPU, {"train.step": 7})


def test_a_step_that_does_not_fit_halves_the_batch(monkeypatch):
    def seconds(plan):
        if plan.config.train.batch_size > 4:
            raise MemoryError("a batch of it needs too much memory")
        return 0.5

    monkeypatch.setattr(plans, "step_seconds", seconds)
    monkeypatch.setattr(plans.Machine, "here", lambda: CPU)
    plan, measured = fit.make_plan(
        inspection(), request(argparse.Namespace(images="", labels=""), fields={})
    )
    assert (plan.config.train.batch_size, measured) == (4, 0.5)
    assert plans.expected(plan, measured).startswith("3:20 for 400 steps")
    wanted = {"train.batch_size": 8}
    with pytest.raises(
        config_lib.ConfigError, match=r"needs too much memory on 1 x cpu.*crop_size=128"
    ):
        fit.make_plan(
            inspection(), request(argparse.Namespace(images="", labels=""), fields=wanted)
        )


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("My Cats-2", "my_cats_2"),
        ("2024 run", "own_2024_run"),
        ("camvid", "own_camvid"),
        ("__", "images"),
    ],
)
def test_names_of_data_sets(text, name):
    assert fit.safe_name(text) == name


@pytest.mark.parametrize("name", ["camvid", "My Cats", "2cats"])
def test_names_that_are_no_data_sets_of_ones_own(two, name):
    with pytest.raises(DataError, match=name):
        folders.inspect(two.images, two.labels, name=name)


def test_the_machine_at_hand():
    machine = plans.Machine.here()
    assert machine.is_cpu
    assert 2**26 < machine.memory <= machine.host_memory < 2**45


@pytest.mark.real_data
@pytest.mark.skipif(
    not pathlib.Path(SHARED, "resnet50_imagenet.npz").is_file() or not SHARED,
    reason="DUC_DLC_SHARED_DATA has no resnet50_imagenet.npz",
)
def test_weights_decide_the_network():
    weights = str(pathlib.Path(SHARED, "resnet50_imagenet.npz"))
    given = {"init.weights": weights, "init.source": "keras_v1"}
    config = plans.make(inspection(), CPU, given).config
    assert (config.model.depth, config.model.stride_on, config.model.width) == (50, "1x1", 64)
    assert config.optimizer.new_layer_multiplier == 10
    with pytest.raises(config_lib.ConfigError, match=r"depth=101 needs"):
        plans.make(inspection(), CPU, given | {"model.depth": 101})


# The command


@pytest.fixture(scope="module")
def fitted(two, tmp_path_factory):
    """(workdir, scores) of a tiny run, in this process."""
    workdir = tmp_path_factory.mktemp("fit") / "Own Scenes"
    return workdir, fit.fit(request(two), workdir, command="python -m duc_dlc_jax.fit")


def test_fit_trains_and_evaluates(fitted):
    workdir, scores = fitted
    loaded = workdirs.load(workdir, "latest")
    assert loaded.step == 6
    assert loaded.config.data.name == "own_scenes"
    assert loaded.spec.classes == tuple(f"class_{i}" for i in range(8))
    assert scores["matrix"].shape == (8, 8)
    assert (workdir / "data" / "own_scenes").is_dir()


def test_the_plan_is_an_ordinary_configuration(fitted):
    workdir, _ = fitted
    config = config_lib.load(str(workdir / "config.py"))
    assert config.to_dict() == workdirs.load(workdir).config.to_dict()
    text = (workdir / "config.py").read_text()
    for words in ("python -m duc_dlc_jax.main --config=", "Hardware  1 x cpu", " train, "):
        assert words in text
    assert "own_scenes, 8 classes" in describe.text(describe.describe(config))


def test_training_goes_on_with_the_plan(fitted, caplog):
    """As `main` does it with its --config and --workdir."""
    workdir, scores = fitted
    with caplog.at_level(logging.INFO, "absl"):
        train.train(config_lib.load(str(workdir / "config.py")), workdir)
    assert "resuming from step 6" in caplog.text
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val/mIoU"] == pytest.approx(scores["mIoU"], abs=1e-6)


def test_the_same_call_resumes_and_names_what_changed(fitted, two, capfd, caplog):
    workdir, scores = fitted
    (two.images / "new.png").write_bytes(b"")
    try:
        again = fit.fit(request(two), workdir)
    finally:
        (two.images / "new.png").unlink()
    assert again is not None
    np.testing.assert_array_equal(again["matrix"], scores["matrix"])
    assert "config.py is kept" in capfd.readouterr().out
    assert "1 new (first images/new.png)" in caplog.text


def test_other_flags_need_another_workdir(fitted, two, tmp_path):
    workdir, _ = fitted
    with pytest.raises(config_lib.ConfigError, match=r"seed: 0, now 3.*give another --workdir"):
        fit.fit(request(two, seed=3), workdir)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(config_lib.ConfigError, match="holds a run that fit did not plan"):
        fit.fit(request(two), tmp_path)
    (tmp_path / "config.py").write_text("")
    with pytest.raises(config_lib.ConfigError, match="was not written by fit"):
        fit.fit(request(two), tmp_path)


def test_the_content_of_the_file_of_classes_counts(two, tmp_path, monkeypatch):
    """By whatever path it is given, and where it is found beside the masks."""
    names = [f"c{i}" for i in range(8)]
    monkeypatch.chdir(tmp_path)
    file, beside = tmp_path / "c.json", two.labels.parent / "classes.json"
    file.write_text(json.dumps(names))
    given = request(two, classes=str(file))
    fit._write(tmp_path, given, plans.make(inspection(), CPU, {}), [])
    fit._check_record(tmp_path, given)
    fit._check_record(tmp_path, request(two, classes="c.json"))
    beside.write_text(json.dumps(names, indent=1))
    try:
        fit._check_record(tmp_path, request(two))
        beside.write_text(json.dumps(names[::-1]))
        with pytest.raises(config_lib.ConfigError, match=r"other classes; .*fit\.json has them"):
            fit._check_record(tmp_path, request(two))
    finally:
        beside.unlink()
    with pytest.raises(config_lib.ConfigError, match="other classes"):
        fit._check_record(tmp_path, request(two))
    fit._check_record(tmp_path, request(two, labels=str(tmp_path / "gone")))


def test_files_of_linked_folders_are_recorded(two, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "more").symlink_to(two.images)
    linked = request(two, images=str(tmp_path / "images")).record()["files"]
    assert "images/more/0.png" in linked


def test_a_terminal_is_asked(two, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "step_seconds", lambda plan: None)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert fit.fit(request(two), tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


def test_deterministic_kernels_are_planned_and_kept(two, tmp_path, monkeypatch):
    given = request(two, fields=FIELDS | {"train.deterministic": True})
    monkeypatch.setattr(plans, "step_seconds", lambda plan: os.environ["XLA_FLAGS"])
    monkeypatch.setattr(fit, "_time", lambda plan, seconds: seconds)
    monkeypatch.setattr(fit.prepare, "is_prepared", lambda folder: True)
    monkeypatch.setattr(fit, "train", lambda config, workdir: os.environ["XLA_FLAGS"])
    for _ in range(2):  # the second goes on with the plan
        monkeypatch.setenv("XLA_FLAGS", "")
        assert fit.fit(given, tmp_path, yes=True) == "--xla_gpu_deterministic_ops=true"
    assert "--xla_gpu_deterministic_ops" in (tmp_path / "config.py").read_text()


def test_plan_only_writes_nothing(two, tmp_path):
    flags = [f"--images={two.images}", f"--labels={two.labels}", f"--workdir={tmp_path / 'run'}"]
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    command = [sys.executable, "-m", "duc_dlc_jax.fit", *flags, *fields, "--plan_only"]
    printed = run(command).stdout
    for words in ("Images    12 of 128x96", "class_7", "train.steps", "Time  "):
        assert words in printed
    assert not (tmp_path / "run").exists()
    wrong = run([*command, "--config.train.epoch=3"], check=False)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "unknown configuration field train.epoch" in wrong.stderr


def test_prepare_alone(two, tmp_path, monkeypatch):
    module = [sys.executable, "-m", "duc_dlc_jax.data.prepare", f"--data_dir={tmp_path}"]
    folder = [f"--images={two.images}", f"--labels={two.labels}"]
    printed = run([*module, "--dataset=mine", *folder], tensorflow=True).stdout
    assert " train, " in printed
    assert "8 of 8" in printed
    given = SimpleNamespace(dataset="mine", images=str(two.images), labels=None, raw_dir=None)
    monkeypatch.setattr(prepare.flags, "FLAGS", given)
    with pytest.raises(prepare.app.UsageError, match="--images and --labels belong together"):
        prepare.main(["prepare"])


def test_bad_folders_end_in_one_line(two, tmp_path):
    with pytest.raises(DataError, match="--images and --labels are both"):
        fit.fit(request(two, labels=str(two.images)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
