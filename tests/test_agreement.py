"""Our figures against official and independent tools, on the same masks."""

from __future__ import annotations

import os
import pathlib
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from duc_dlc_jax import metrics, submit
from duc_dlc_jax.data.labels import IGNORE, label_spec


def matrix_of(labels, predictions, classes):
    """Sum over pairs of train-id masks of the confusion matrices, int64."""
    pairs = zip(labels, predictions, strict=True)
    matrices = [metrics.confusion_matrix(jnp.asarray(a), jnp.asarray(b), classes) for a, b in pairs]
    return sum(np.asarray(m, np.int64) for m in matrices)


# cityscapesScripts


@pytest.fixture
def official():
    return pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")


def blocks(rng, values, size, cell=8):
    """Squares of random values, uint8 [*size]."""
    small = rng.choice(values, [n // cell for n in size])
    return np.kron(small, np.ones((cell, cell), int)).astype(np.uint8)


@pytest.mark.parametrize("classes", ["all", "some absent"])
def test_cityscapes_equals_cityscapesscripts(official, tmp_path, classes):
    """The archive for the server, scored by the official script, and our scores of the same."""
    rng, spec, size = np.random.default_rng(0), label_spec("cityscapes"), (64, 128)
    raw_ids = np.array([i for i in spec.raw_to_train if i >= 0])
    if classes == "some absent":
        raw_ids = raw_ids[raw_ids < 24]
    names = [f"berlin_00000{i}_000019" for i in range(4)]
    labels, examples, masks = [], [], []
    for name in names:
        raw = blocks(rng, raw_ids, size)
        label = spec.encode(raw)
        prediction = np.roll(np.where(label == IGNORE, 0, label), 5, axis=1).astype(np.uint8)
        noise = rng.random(size) < 0.2
        prediction[noise] = rng.integers(0, label[label < IGNORE].max() + 1, noise.sum())
        masks.append(str(tmp_path / f"{name}_gtFine_labelIds.png"))
        Image.fromarray(raw).save(masks[-1])
        labels.append(label)
        examples.append({"name": name, "prediction": prediction})
    submit.write_archive(tmp_path / "results.zip", spec, examples, len(examples))
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        archive.extractall(tmp_path / "results")

    args = official.args
    args.evalLabels, args.quiet, args.JSONOutput = [], True, False
    args.evalInstLevelScore = args.evalPixelAccuracy = False
    args.predictionPath, args.predictionWalk = str(tmp_path / "results"), None
    found = [official.getPrediction(args, mask) for mask in masks]
    theirs = official.evaluateImgLists(found, masks, args)

    predictions = [example["prediction"] for example in examples]
    ours = metrics.scores(matrix_of(labels, predictions, spec.num_classes))
    print(f"{classes}: {ours['mIoU']!r}, theirs {float(theirs['averageScoreClasses'])!r}")
    assert 0.05 < ours["mIoU"] < 0.95
    assert ours["mIoU"] == pytest.approx(theirs["averageScoreClasses"], rel=1e-15)
    their_classes = [theirs["classScores"][name] for name in spec.classes]
    np.testing.assert_array_equal(ours["iou"], their_classes)
    assert np.isnan(their_classes).any() == (classes == "some absent")


# ADE20K


def benchmark_scores(labels, predictions, classes):
    """The SceneParsing benchmark's definition: ids from 1, 0 is unlabelled; sums over images."""
    hits = labelled = 0
    intersection, union = np.zeros(classes), np.zeros(classes)
    for label, prediction in zip(labels, predictions, strict=True):
        hits += ((label == prediction) & (label > 0)).sum()
        labelled += (label > 0).sum()
        prediction = prediction * (label > 0)
        for k in range(1, classes + 1):
            intersection[k - 1] += ((label == k) & (prediction == k)).sum()
            union[k - 1] += ((label == k) | (prediction == k)).sum()
    return hits / labelled, intersection, union


def shifted(label):
    """By 5 pixels to the right; nothing is labelled 0 in a prediction."""
    moved = np.roll(label, 5, axis=1)
    return np.where(moved == 0, 1, moved)


def swapped(label):
    """The two most frequent ids take each other's place."""
    first, second = np.argsort(-np.bincount(label[label > 0]))[:2]
    return np.select([label == first, label == second, label == 0], [second, first, 1], label)


def without_a_class(label):
    """The most frequent id is never predicted."""
    return np.where((label == 0) | (label == np.bincount(label[label > 0]).argmax()), 150, label)


@pytest.mark.real_data
@pytest.mark.parametrize("derive", [shifted, swapped, without_a_class])
def test_ade20k_equals_the_benchmark_on_real_annotations(derive):
    folder = pathlib.Path(os.environ.get("DUC_DLC_SHARED_DATA", "-"), "ade20k_sample/annotations")
    if not folder.is_dir():
        pytest.skip("DUC_DLC_SHARED_DATA has no ade20k_sample/annotations")
    spec = label_spec("ade20k")
    raw = [np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    wrong = [derive(label.astype(int)) for label in raw]
    accuracy, intersection, union = benchmark_scores(raw, wrong, 150)
    labels = [spec.encode(mask) for mask in raw]
    matrix = matrix_of(labels, [mask - 1 for mask in wrong], 150)
    ours, zero = metrics.scores(matrix), metrics.scores(matrix, absent="zero")
    their_iou = intersection / union.clip(1)
    present = union > 0
    print(f"{derive.__name__}: PA {ours['PA']!r}, theirs {float(accuracy)!r}")
    print(f"mIoU, present: {ours['mIoU']!r}, theirs {float(their_iou[present].mean())!r}")
    print(f"mIoU of 150: {zero['mIoU']!r}, theirs {float(their_iou.mean())!r}")
    assert 0 < accuracy < 1
    assert ours["PA"] == accuracy
    np.testing.assert_array_equal(ours["iou"][present], their_iou[present])
    assert np.isnan(ours["iou"][~present]).all()
    assert ours["mIoU"] == pytest.approx(their_iou[present].mean(), rel=1e-14)
    # The benchmark's own mean is over all 150, as all occur in its validation set.
    assert zero["mIoU"] == pytest.approx(their_iou.mean(), rel=1e-14)


# scikit-learn


@pytest.mark.parametrize("seed", range(8))
def test_scores_equal_scikit_learn(seed):
    """Random masks; pixels are ignored, a class occurs nowhere, one is only predicted."""
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(4, 20))
    labels = rng.integers(0, classes - 2, (3, 20, 30))  # the last two are never labelled
    guesses = rng.integers(0, classes - 1, labels.shape)
    predictions = np.where(rng.random(labels.shape) < 0.6, labels, guesses)
    labels[rng.random(labels.shape) < rng.uniform(0, 0.9)] = IGNORE
    labels[1] = IGNORE
    known = range(classes)
    matrix = matrix_of(labels.astype(np.uint8), predictions, classes)
    ours = metrics.scores(matrix)
    valid = labels != IGNORE
    truth, said = labels[valid], predictions[valid]
    np.testing.assert_array_equal(matrix, sk.confusion_matrix(truth, said, labels=known))
    occurs = np.union1d(truth, said)
    jaccard = sk.jaccard_score(truth, said, labels=occurs, average=None, zero_division=0)
    np.testing.assert_allclose(ours["iou"][occurs], jaccard, rtol=1e-15)
    assert np.isnan(np.delete(ours["iou"], occurs)).all()
    assert np.isnan(ours["iou"][classes - 1])
    recall = sk.recall_score(truth, said, labels=np.unique(truth), average=None)
    np.testing.assert_allclose(ours["accuracy"][np.unique(truth)], recall, rtol=1e-15)
    weighted = sk.jaccard_score(truth, said, labels=occurs, average="weighted", zero_division=0)
    expected = {
        "PA": sk.accuracy_score(truth, said),
        "mPA": recall.mean(),
        "mIoU": jaccard.mean(),
        "fwIoU": weighted,
    }
    for name, value in expected.items():
        print(f"seed {seed}, {name}: {ours[name]!r}, theirs {float(value)!r}")
        assert ours[name] == pytest.approx(value, rel=1e-14), name
    np.testing.assert_array_equal(ours["pixels"], np.bincount(truth, minlength=classes))


def test_masks_without_any_label_have_no_score():
    labels = np.full((2, 4, 5), IGNORE, np.uint8)
    scores = metrics.scores(matrix_of(labels, np.zeros((2, 4, 5), int), 3))
    assert np.isnan([scores[name] for name in ("PA", "mPA", "mIoU", "fwIoU")]).all()
