"""Checkpoints rebuilt: averages whose BN statistics fit, other classes, differences."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from duc_dlc_jax import (
    bn_statistics,
    evaluate,
    grafting,
    optimizer,
    plans,
    surgery,
    train,
    train_step,
    workdirs,
)
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.checkpoints import Checkpoints
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import label_spec
from duc_dlc_jax.export import manifest
from duc_dlc_jax.models import layers, segmenter
from networks import jit, random_variables
from runs import run, tiny_config

pytestmark = pytest.mark.commands

SPEC = label_spec("scenes")


@pytest.fixture(autouse=True)
def quick_programs(monkeypatch):
    monkeypatch.setattr(jax, "jit", jit)


def config_of(scenes_dir, **changes):
    return tiny_config(scenes_dir, model__width=4, model__aux_head=True, **changes)


def write_run(workdir, config, seeds=(0, 1, 2), spec=SPEC):
    """A run of checkpoints 1, 2, ... with random networks; their averages are others."""
    model = segmenter.create(config.model, spec.num_classes)
    rule = optimizer.create(config.optimizer, 1)
    saved = Checkpoints(workdir, keep_latest=len(seeds))
    for step, seed in enumerate(seeds, 1):
        state = train_step.create_state(model, rule, config, random_variables(model, seed=seed))
        average = random_variables(model, seed=seed + 100) if state.ema else {}
        state = state.replace(step=jnp.asarray(step, jnp.int32), ema=average)
        saved.save(state, 4 * step, config, {"final_score": 0.5 - 0.1 * step, "mIoU": 0.4})
    saved.wait()
    saved.close()
    workdirs.write(workdir, config, spec)
    return model


@pytest.fixture(scope="module")
def trained(scenes_dir, tmp_path_factory):
    """(workdir, model) of a run with an EMA."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, write_run(folder, config_of(scenes_dir, optimizer__ema_decay=0.9))


def arrays(workdir, step):
    with Checkpoints(workdir) as saved:
        return saved.arrays(step)


def resumes(workdir, step):
    """`main` goes on from the workdir at this step, without a change of the configuration."""
    config, spec, model = workdirs.description(workdir)
    records: Any = SimpleNamespace(spec=spec)
    assert workdirs.changed_fields(workdir, config) == {}
    with Checkpoints(workdir) as saved:
        mesh = train.sharding.make_mesh()
        state, position = train._first_state(config, workdir, model, saved, mesh, records)
    assert (int(state.step), position) == (step, 4 * step)


def gap_to_data(workdir, batches=16, variables=None):
    """How far the BN statistics are from those of training batches that none of them has seen."""
    loaded = workdirs.load(workdir)
    data = surgery.training_batches(loaded.config, 40, batches)
    variables = variables or loaded.variables
    return bn_statistics.gap(
        variables["batch_stats"], bn_statistics.estimate(loaded.model, variables, data)
    )[0]


def test_average_of_the_last_checkpoints(trained, tmp_path):
    """The mean of the parameters, in float64; statistics that fit; the state goes on being one."""
    workdir, _ = trained
    lines = surgery.average(workdir, tmp_path / "new", 2, "estimate", 24)
    assert "the mean of steps 2, 3" in lines[0]
    old, new = [arrays(workdir, step) for step in (2, 3)], arrays(tmp_path / "new", 3)
    assert set(new) == set(old[0])
    for path, value in new.items():
        kind = path.split("/")[0]
        if kind == "params":
            mean = np.mean([np.asarray(x[path], np.float64) for x in old], 0).astype(value.dtype)
            np.testing.assert_array_equal(value, mean, err_msg=path)
            np.testing.assert_array_equal(value, new[f"ema/{path}"])
        elif kind not in ("batch_stats", "ema"):
            np.testing.assert_array_equal(value, old[1][path])
    found = workdirs.load(tmp_path / "new")
    assert (found.step, found.spec) == (3, SPEC)
    assert gap_to_data(tmp_path / "new") < 0.3
    resumes(tmp_path / "new", 3)


def test_planted_fault_averages_without_their_statistics(trained, tmp_path):
    """Averaged parameters with the statistics of a checkpoint, or the average of theirs, are caught
    by the figure that `average` and `show --batches` print; the written ones are not.
    """
    workdir, _ = trained
    lines = surgery.average(workdir, tmp_path / "right", 3, "estimate", 64)
    of_the_latest, written = (float(line.split(" by ")[1].split()[0]) for line in lines[2:])
    assert written < 0.3 < 1 < of_the_latest
    surgery.average(workdir, tmp_path / "averaged", 3, "average", 4)
    right, wrong = (workdirs.load(tmp_path / name).variables for name in ("right", "averaged"))
    jax.tree.map(np.testing.assert_array_equal, right["params"], wrong["params"])
    assert gap_to_data(tmp_path / "averaged") > 1
    ema = workdirs.load(workdir).variables  # EMA parameters with the statistics of the raw network
    raw = {p.split("/", 1)[1]: v for p, v in arrays(workdir, 1).items() if p.startswith("batch_")}
    mixed = {**ema, "batch_stats": traverse_util.unflatten_dict(raw, sep="/")}
    data = surgery.training_batches(workdirs.load(workdir).config, 0, 2)
    own = bn_statistics.estimate(trained[1], ema, data)
    assert bn_statistics.gap(mixed["batch_stats"], own)[0] > 1
    shown = surgery.show(tmp_path / "averaged", batches=2)[-1]
    assert float(shown.split(" by ")[1].split()[0]) > 1


def test_estimated_statistics_are_those_of_all_pixels(trained):
    """Of the first BN, by hand: mean and variance over every pixel of every batch."""
    workdir, model = trained
    found = workdirs.load(workdir)
    batches = list(itertools.islice(surgery.training_batches(found.config, 0, 3), 3))
    estimated = bn_statistics.estimate(model, found.variables, batches)
    kernel = found.variables["params"]["backbone"]["conv1"]["kernel"]
    outputs = np.concatenate([
        np.asarray(layers.convolve(layers.normalize(b["image"], jnp.float32), kernel, 2, 1))
        for b in batches
    ])  # fmt: skip
    own = estimated["backbone"]["bn1"]
    np.testing.assert_allclose(own["mean"], outputs.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(own["var"], outputs.var((0, 1, 2)), rtol=1e-3)


def test_frozen_statistics_stay(trained):
    workdir, model = trained
    found = workdirs.load(workdir)
    batches = list(surgery.training_batches(found.config, 0, 1))
    frozen = model.clone(backbone_frozen=True)
    kept = bn_statistics.estimate(frozen, found.variables, batches)["backbone"]
    jax.tree.map(np.testing.assert_array_equal, kept, found.variables["batch_stats"]["backbone"])
    with pytest.raises(ConfigError, match="bn_frozen"):
        bn_statistics.estimate(model.clone(bn_frozen=True), found.variables, batches)


def test_ema_becomes_the_network(trained, tmp_path):
    workdir, _ = trained
    surgery.ema(workdir, tmp_path / "new", "latest")
    old, new = arrays(workdir, 3), arrays(tmp_path / "new", 3)
    for path, value in old.items():
        if path.startswith("ema/"):
            np.testing.assert_array_equal(new[path.removeprefix("ema/")], value)
            np.testing.assert_array_equal(new[path], value)
    with pytest.raises(ConfigError, match="holds a run already"):
        surgery.ema(workdir, tmp_path / "new")


def test_classes_keep_their_weights_by_name(trained, tmp_path):
    workdir, _ = trained
    spec = label_spec("camvid")
    lines = "\n".join(surgery.classes(workdir, tmp_path / "new", spec))
    old, new = arrays(workdir, 1), arrays(tmp_path / "new", 0)  # 1 is the best
    common = [name for name in spec.classes if name in SPEC.classes]
    assert len(common) == 7
    assert f"classes with trained weights: {len(common)}: {', '.join(common)}" in lines
    kernel, trained_kernel = (
        x[f"{kind}params/classifier/kernel"] for x, kind in ((new, ""), (old, "ema/"))
    )
    assert kernel.shape[-1] == 11
    for name in common:
        here, there = spec.classes.index(name), SPEC.classes.index(name)
        np.testing.assert_array_equal(kernel[..., here], trained_kernel[..., there])
    pole = spec.classes.index("pavement")
    assert not any(np.array_equal(kernel[..., pole], c) for c in np.moveaxis(trained_kernel, -1, 0))
    for path in ("params/backbone/conv1/kernel", "batch_stats/dlc/reduce_bn/var"):
        np.testing.assert_array_equal(new[path], old[f"ema/{path}"])
    assert workdirs.load(tmp_path / "new").spec == spec
    resumes(tmp_path / "new", 0)


def test_training_starts_from_a_checkpoint(trained, scenes_dir, tmp_path, caplog):
    """config.init.checkpoint: the first state is the other run's best network."""
    workdir, model = trained
    config = config_of(scenes_dir, init__checkpoint=str(workdir))
    mesh = train.sharding.make_mesh()
    with Checkpoints(tmp_path / "new") as saved, caplog.at_level(logging.INFO, "absl"):
        state, position = train._first_state(
            config, tmp_path / "new", model, saved, mesh, SimpleNamespace(spec=SPEC)
        )
    assert (int(state.step), position) == (0, 0)
    best = workdirs.load(workdir).variables
    jax.tree.map(np.testing.assert_array_equal, state.variables(), best)
    assert "the network of step 1" in caplog.text
    assert "drawn anew: none" in caplog.text


def test_where_a_run_began_does_not_change(trained, scenes_dir, tmp_path, monkeypatch):
    """What differs is named; a path counts as the same however it is written."""
    workdir, _ = trained
    config = config_of(scenes_dir, optimizer__ema_decay=0.9)
    config.train.log_every, config.init.checkpoint = 7, "~/city"
    start = str(tmp_path / "city")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert workdirs.changed_fields(workdir, config) == {
        "train.log_every": (2, 7),
        "init.checkpoint": ("", start),
    }
    with pytest.raises(ConfigError, match=rf"began with init\.checkpoint='', not '{start}'"):
        train.train(config, workdir)
    workdirs.write(tmp_path / "run", config, SPEC)
    config.init.checkpoint = start
    assert workdirs.changed_fields(tmp_path / "run", config) == {}
    config.init.checkpoint = ""  # left out: it stays what it was
    assert workdirs.start_of(tmp_path / "run", config).checkpoint == start


def test_a_run_does_not_start_from_itself(trained, scenes_dir, monkeypatch):
    monkeypatch.chdir(trained[0].parent)
    with pytest.raises(ConfigError, match=r"init\.checkpoint=/.*/run is the workdir itself"):
        train.train(config_of(scenes_dir, init__checkpoint="run"), trained[0])


def test_a_bundle_says_where_the_first_weights_came_from(tmp_path):
    """Also of a run that started from another: the licence goes along."""
    first, second = tiny_config("", init__weights="resnet50"), tiny_config("")
    second.init.checkpoint = str(tmp_path / "city")
    assert manifest._weights(second)["licence"] == "unknown"
    workdirs.write(tmp_path / "city", first, SPEC)
    found = manifest._weights(second)
    assert (found["licence"], found["through"]) == ("BSD-3-Clause", "city")
    assert found["file"] == "resnet50-0676ba61.pth"


def test_fit_plans_the_network_of_the_run_it_starts_from(trained):
    workdir, _ = trained
    draft = plans._Draft({"init.checkpoint": str(workdir)})
    plans._network(draft, plans.Machine("cpu", "cpu", 1, 2**30, 2**30, 2))
    assert draft.config.model == workdirs.load(workdir).config.model
    assert draft.config.init.checkpoint == str(workdir.resolve())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__stride_on": "1x1"}, r"set --config\.model\.stride_on=3x3"),
        (
            {"model__dlc_width": 24},
            r"dlc/.* has shape .*trained with --config\.model\.dlc_width=16",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(trained, scenes_dir, changes, message):
    workdir, _ = trained
    config = config_of(scenes_dir, init__checkpoint=str(workdir), **changes)
    fresh = train_step.init_variables(segmenter.create(config.model, 8), 0)
    with pytest.raises(ConfigError, match=message):
        grafting.from_workdir(workdir, fresh, config.model, SPEC)


def test_one_start_at_a_time():
    config = tiny_config("", init__checkpoint="runs/a", init__weights="resnet50")
    with pytest.raises(ConfigError, match="both set"):
        config_lib.validate(config)


def test_diff_names_every_difference(trained, scenes_dir, tmp_path):
    workdir, _ = trained
    assert surgery.diff(workdir, workdir) == []
    lines = surgery.diff(workdir, workdir, "1", "2")
    assert any(line.startswith("params/dlc/reduce_conv/kernel: max |diff") for line in lines)
    assert any(line.startswith("step: ") for line in lines)
    write_run(tmp_path / "plain", config_of(scenes_dir, model__dlc_width=24), seeds=(0,))
    lines = surgery.diff(workdir, tmp_path / "plain")
    text = "\n".join(lines)
    assert "config.optimizer.ema_decay: 0.9 and 0.0" in text
    assert f"ema/params/classifier/bias: only in {workdir}" in text
    assert "params/dlc/reduce_conv/kernel: shapes (1, 1, 48, 16) and (1, 1, 48, 24)" in text


def test_show(trained):
    workdir, _ = trained
    lines = surgery.show(workdir, "latest")
    assert lines[0].endswith("step 3 of 1, 2, 3; 12 images consumed")
    assert "final_score 0.2000" in lines[2]
    assert "EMA" in lines[3]
    assert any(line.startswith("params/classifier") for line in lines)


def test_too_few_checkpoints_and_no_average(trained, scenes_dir, tmp_path):
    workdir, _ = trained
    with pytest.raises(ConfigError, match=r"has 3 checkpoints.*train\.keep_latest"):
        surgery.average(workdir, tmp_path / "new", 4, "average", 1)
    write_run(tmp_path / "plain", config_of(scenes_dir), seeds=(0,))
    with pytest.raises(ConfigError, match="ema_decay is 0"):
        surgery.ema(tmp_path / "plain", tmp_path / "new")


def test_data_of_other_classes_are_refused(scenes_dir, tmp_path):
    backwards = dataclasses.replace(SPEC, classes=SPEC.classes[::-1])
    write_run(tmp_path, config_of(scenes_dir), seeds=(0,), spec=backwards)
    args = SimpleNamespace(checkpoint="best", data_dir="", split="")
    with pytest.raises(ConfigError, match=r"8 classes \(sky, .*labels 8 \(sign, .*surgery classes"):
        evaluate.open_run(args, str(tmp_path))


class Flags(dict):
    """absl's flags, by name and as attributes."""

    def __getattr__(self, name):
        return self[name].value


def test_the_command(trained, tmp_path, monkeypatch):
    workdir, _ = trained
    command = [sys.executable, "-m", "duc_dlc_jax.surgery", "average", f"--workdir={workdir}"]
    flags = [f"--output={tmp_path / 'new'}", "--last=2", "--statistics=average"]
    assert "the mean of steps 2, 3" in run([*command, *flags]).stdout
    for call, message in (
        ("average", "needs --output="),
        ("other", "one command of show, diff"),
    ):
        arguments = {"workdir": str(workdir), "output": "", "last": 2}
        values = {name: SimpleNamespace(value=value) for name, value in arguments.items()}
        monkeypatch.setattr(surgery.flags, "FLAGS", Flags(values))
        with pytest.raises(ConfigError, match=message):
            surgery.main(["surgery", call])
