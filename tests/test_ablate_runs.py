"""A run of a grid: it is a training run, goes on with the same bits, and leaves its crops."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import duc_dlc_jax
from duc_dlc_jax import boundaries, workdirs
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.ablate import crops, runner
from duc_dlc_jax.ablate.grid import Variant, parts
from duc_dlc_jax.ablate.results import Files
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.errors import NotFinite
from duc_dlc_jax.models import pretrained
from duc_dlc_jax.train import train
from networks import NARROW, jit
from runs import tiny_config

pytestmark = pytest.mark.commands


@pytest.fixture(scope="module")
def trained(few_scenes, tmp_path_factory):
    """Seeds 0, 1 and 0 again of one variant, by one trainer, and the variant's configuration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", jit)
        patch.setattr(runner, "TIMED_IMAGES", 1)
        patch.setattr(runner, "TIMED_STEPS", 1)
        changes = {f"model__{name}": value for name, value in NARROW.items()}
        base = tiny_config(few_scenes, **changes, train__steps=4, train__eval_every=2)
        variant = Variant("bilinear", parts("bilinear", "none"))
        configs = [variant.config(base, seed) for seed in (0, 1)]
        trainer = runner.Trainer(configs[0], runner.Data(base.data))
        folder = tmp_path_factory.mktemp("files")
        files = Files(masks=folder / "crops" / "a.png", weights=folder / "bilinear.npz")
        results = [
            trainer.run(configs[0], files),
            trainer.run(configs[1]),
            trainer.run(configs[0]),
        ]
        workdir = tmp_path_factory.mktemp("run")
        scores = train(configs[1], workdir)
        yield SimpleNamespace(
            results=results, config=configs[1], files=files, scores=scores, trainer=trainer
        )


def test_a_run_is_the_training_run_of_its_configuration(trained):
    """The same seed by `train`: the same confusion matrix; other seeds differ."""
    matrices = [np.array(result["val"]["confusion_matrix"]) for result in trained.results]
    np.testing.assert_array_equal(matrices[1], trained.scores["matrix"])
    np.testing.assert_array_equal(matrices[0], matrices[2])
    assert np.any(matrices[0] != matrices[1])


def cut_off_at_the_fourth_step(trainer, monkeypatch) -> list[int]:
    """A KeyboardInterrupt in its place, once; returns a list that grows with each step."""
    steps, step = [], trainer._step

    def stopping(*arguments):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(trainer, "_step", stopping)
    return steps


def test_a_run_says_which_weights_it_read_and_keeps_that_when_it_goes_on(
    trained, tmp_path, monkeypatch
):
    """The file is another one when it goes on: what it began from counts."""
    config = trained.config.copy_and_resolve_references()
    config.train.checkpoint_every = 3
    config.init.weights = str(tmp_path / "weights.npz")
    monkeypatch.setattr(
        pretrained,
        "load_backbone",
        lambda path, source, params, stats, model: (params, stats, None),
    )
    trainer, files = trained.trainer, Files(unfinished=tmp_path / "unfinished")
    cut_off_at_the_fourth_step(trainer, monkeypatch)
    (tmp_path / "weights.npz").write_bytes(b"one")
    with pytest.raises(KeyboardInterrupt):
        trainer.run(config, files)
    (tmp_path / "weights.npz").write_bytes(b"two")
    result = trainer.run(config, files)
    assert result["weights_sha256"] == hashlib.sha256(b"one").hexdigest()


def test_seeds_share_the_compiled_program(trained):
    assert trained.results[0]["seconds"]["compile"] > 0
    assert [result["seconds"]["compile"] for result in trained.results[1:]] == [0, 0]


def test_a_result_holds_what_the_tables_need(trained):
    result = json.loads(json.dumps(trained.results[1]))
    assert config_lib.from_json(json.dumps(result["config"])).to_dict() == trained.config.to_dict()
    assert [point["step"] for point in result["curve"]] == [2, 4]
    assert result["curve"][-1]["mIoU"] == pytest.approx(result["val"]["mIoU"], abs=1e-6)
    assert all(np.isfinite(point["loss"]) and point["loss"] > 0 for point in result["curve"])
    assert set(result["parameters"]) == {"backbone", "bilinear", "classifier"}
    assert set(result["macs"]) == {"backbone", "bilinear", "classifier"}
    assert min(result["images_per_second"].values()) > 0
    assert result["step_bytes_per_device"] > 0
    assert result["val"]["boundary"]["f"].keys() == result["val"]["iou"].keys()
    assert result["hardware"]["device"] == "cpu"
    assert result["hardware"]["cpu"]
    assert result["hardware"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert result["code"]["version"] == duc_dlc_jax.__version__
    assert result["weights_sha256"] == ""
    assert sum(v for k, v in result["seconds"].items() if k != "total") == pytest.approx(
        result["seconds"]["total"]
    )


def test_the_weights_are_the_final_network(trained):
    with np.load(trained.files.weights) as saved:
        names = set(saved.files)
        assert all(np.isfinite(saved[name]).all() for name in names)
    assert "params/bilinear/low_conv/kernel" in names
    assert "batch_stats/bilinear/low_bn/mean" in names


def test_a_run_that_was_cut_off_goes_on_with_the_same_bits(trained, tmp_path, monkeypatch):
    """Saved after 3 of 4 steps, between two points of the curve."""
    config = trained.config.copy_and_resolve_references()
    config.train.checkpoint_every = 1
    trainer, files = trained.trainer, Files(unfinished=tmp_path)
    steps = cut_off_at_the_fourth_step(trainer, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(config, files)
    result = trainer.run(config, files)
    assert len(steps) == 4 + 1
    for name in ("curve", "val", "crops"):
        assert result[name] == trained.results[1][name]
    assert result["seconds"]["save"] > 0
    assert workdirs.load(tmp_path).step == 3


def test_the_masks_are_the_crops_of_the_labels_and_predictions(trained, few_scenes):
    val = runner.Data(tiny_config(few_scenes).data).val
    rows = trained.results[0]["crops"]
    chosen = crops.choose(val)
    masks = []
    for path in (trained.files.masks.with_name("label.png"), trained.files.masks):
        with Image.open(path) as image:
            assert image.mode == "P"
            masks.append(crops.split(np.asarray(image)))
    for row, crop, label, prediction in zip(rows, chosen, *masks, strict=True):
        assert row == {**dataclasses.asdict(crop), "boundary_iou": row["boundary_iou"]}
        np.testing.assert_array_equal(label, crop.of(val[crop.record]["label"]))
        found = boundaries.scores(boundaries.counts(label, prediction, val.spec.num_classes))
        assert row["boundary_iou"] == pytest.approx(found["mean_iou"], abs=1e-6)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_one_figure_that_is_not_finite_ends_the_run(trained, monkeypatch, name):
    """Such a step is not taken: the run would have fewer than its budget."""
    monkeypatch.setattr(jax, "jit", jit)
    config = trained.config.copy_and_resolve_references()
    trainer = runner.Trainer(config, SimpleNamespace(**vars(runner.Data(config.data))))
    good = {"loss": np.float32(1), "grad_norm": np.float32(1)}
    figures = iter([good | {name: np.float32(np.nan)}, *[good] * 3])
    trainer._compiled = lambda state, batch, seed: (state, next(figures))
    with pytest.raises(NotFinite, match=r"nan.* in step 1"):
        trainer.run(config)


# The crops


class Labels:
    """A split of labels alone, uint8 [H, W] each."""

    def __init__(self, labels):
        self._labels = labels

    def __len__(self):
        return len(self._labels)

    def size(self, index):
        return self._labels[index].shape

    def __getitem__(self, index):
        return {"label": self._labels[index], "name": str(index)}


def test_the_crops_follow_from_order_and_labels_alone():
    """Images 1, 4, 7, 10, 13, 16 of 18; the squares around a small object, by plain loops."""
    rng = np.random.default_rng(0)
    labels = [np.zeros((30, 48), np.uint8) for _ in range(18)]
    for label in labels:
        y, x = rng.integers(0, 24), rng.integers(0, 42)
        label[y : y + 4, x : x + 4] = rng.integers(1, 4, (4, 4))
        label[:, 20] = IGNORE
    chosen = crops.choose(Labels(labels))
    assert [crop.record for crop in chosen] == [1, 4, 7, 10, 13, 16]
    for crop in chosen:
        assert crop.side == 10
        label = labels[crop.record]
        counts = {}
        for top in range(30 - 10 + 1):
            for left in range(48 - 10 + 1):
                inside = np.s_[top : top + 10, left : left + 10]
                counts[top, left] = crops.outline(label)[inside].sum()
        assert (crop.top, crop.left) == max(counts, key=lambda k: (counts[k], -k[0], -k[1]))
        assert crop.of(label).shape == (10, 10)


def test_an_outline_pixel_has_another_class_beside_it():
    label = [[0, 0, 1], [0, IGNORE, 1], [2, 2, 1], [IGNORE, 2, IGNORE]]
    label = np.array(label, np.uint8)
    expected = np.array([[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]], bool)
    np.testing.assert_array_equal(crops.outline(label), expected)


def test_a_split_of_few_images_has_a_crop_of_each():
    assert [c.record for c in crops.choose(Labels([np.eye(9, dtype=np.uint8)] * 2))] == [0, 1]
