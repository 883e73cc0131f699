"""Loss and scores against plain formulas, and against what goes wrong silently.

The tests named `test_planted_fault_*` break one thing and show that the others would notice.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from duc_dlc_jax import losses, metrics, pixel_scores, sharding
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import IGNORE, label_spec
from duc_dlc_jax.models import resizing

# Loss


def examples(images=4, classes=5, seed=0):
    """Logits [B, 6, 7, K] and labels; later images are harder, and ignore more of their pixels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (images, 6, 7)).astype(np.uint8)
    ease = np.linspace(4, 0, images)[:, None, None, None]
    logits = rng.normal(0, 1, (images, 6, 7, classes)) + ease * np.eye(classes)[labels]
    share = np.linspace(0, 0.8, images)[:, None, None]
    labels[rng.random(labels.shape) < share] = IGNORE
    return logits.astype(np.float32), labels


def expected_loss(logits, labels) -> float:
    """-log softmax of the label, averaged over the valid pixels one by one."""
    values = []
    for pixel in zip(*np.nonzero(labels != IGNORE), strict=True):
        scores = logits[pixel].astype(np.float64)
        values.append(np.log(np.exp(scores).sum()) - scores[labels[pixel]])
    return float(np.mean(values))


def per_device_mean(logits, labels, devices=2):
    """The planted fault: the mean of the devices' own means, as PyTorch's data parallel does."""
    parts = zip(np.split(logits, devices), np.split(labels, devices), strict=True)
    return np.mean([losses.cross_entropy(jnp.asarray(x), jnp.asarray(y)) for x, y in parts])


def ignore_as_class(logits, labels):
    """The planted fault: ignored pixels count, as pixels of a class."""
    return losses.cross_entropy(logits, jnp.where(labels == IGNORE, 0, labels))


@pytest.mark.parametrize(
    ("classes", "expected"), [(150, 5.010635), (60, 4.094345), (59, 4.077537), (19, 2.944439)]
)
def test_cross_entropy_at_zero_logits_is_log_of_the_classes(classes, expected):
    labels = np.random.default_rng(0).integers(0, classes, (2, 8, 8)).astype(np.uint8)
    labels[0, :3] = IGNORE
    with jax.enable_x64(True):
        loss = losses.cross_entropy(jnp.zeros((2, 8, 8, classes)), jnp.asarray(labels))
    assert round(float(loss), 6) == expected


def loss_sums(logits, labels):
    return losses.sums(pixel_scores.pixel_scores(logits, labels), labels)


def test_cross_entropy_averages_over_the_valid_pixels_of_the_global_batch():
    logits, labels = examples()
    assert 0 < (labels == IGNORE).sum() < labels.size
    loss = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    assert float(loss) == pytest.approx(expected_loss(logits, labels), rel=1e-6)


def test_sums_of_the_parts_divide_to_the_loss_of_the_whole():
    """What gradient accumulation and several devices do."""
    logits, labels = examples()
    sums = [
        loss_sums(jnp.asarray(x[None]), jnp.asarray(y[None]))
        for x, y in zip(logits, labels, strict=True)
    ]
    total, count = (float(sum(values)) for values in zip(*sums, strict=True))
    assert count == (labels != IGNORE).sum()
    assert total / count == pytest.approx(expected_loss(logits, labels), rel=1e-6)


def test_planted_fault_per_device_loss_means():
    logits, labels = examples()
    valid = (labels != IGNORE).sum((1, 2))
    assert valid[:2].sum() > 1.5 * valid[2:].sum()  # uneven, so that the two means differ
    right = expected_loss(logits, labels)
    assert abs(per_device_mean(logits, labels) - right) > 0.1 * right


def test_ignored_pixels_change_neither_loss_nor_gradient():
    logits, labels = examples()
    wild = np.where((labels == IGNORE)[..., None], 1e4 * logits, logits)
    gradients = []
    for x in (logits, wild):
        value, gradient = jax.value_and_grad(losses.cross_entropy)(
            jnp.asarray(x), jnp.asarray(labels)
        )
        assert float(value) == pytest.approx(expected_loss(logits, labels), rel=1e-6)
        assert not np.asarray(gradient)[labels == IGNORE].any()
        gradients.append(np.asarray(gradient))
    np.testing.assert_array_equal(*gradients)
    assert gradients[0][labels != IGNORE].all()


def test_planted_fault_ignore_counted_as_class():
    logits, labels = examples()
    right = expected_loss(logits, labels)
    assert (
        abs(float(ignore_as_class(jnp.asarray(logits), jnp.asarray(labels))) - right) > 0.1 * right
    )
    predictions = jnp.asarray(logits.argmax(-1))
    ours = metrics.confusion_matrix(jnp.asarray(labels), predictions, 5)
    wrong = metrics.confusion_matrix(
        jnp.where(labels == IGNORE, 0, jnp.asarray(labels)), predictions, 5
    )
    assert int(ours.sum()) == (labels != IGNORE).sum() < int(wrong.sum())


def test_all_ignored_gives_zero_and_a_zero_gradient():
    logits, labels = examples()
    value, gradient = jax.value_and_grad(losses.cross_entropy)(
        jnp.asarray(logits), jnp.full(labels.shape, IGNORE, jnp.uint8)
    )
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(logits))  # NaN would not be equal


def test_gradient_is_softmax_minus_one_hot_over_the_count():
    logits, labels = examples()
    exact = logits.astype(np.float64)
    softmax = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
    one_hot = np.eye(256)[labels][..., :5]
    valid = (labels != IGNORE)[..., None]
    expected = (softmax - one_hot) * valid / valid.sum()
    gradient = jax.grad(losses.cross_entropy)(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("grid", ["corners", "stride", "half_pixel"])
@pytest.mark.parametrize(
    ("way", "smoothing"), [("bands", 0), ("bands", 0.1), ("taps", 0.1), ("grid", 0)]
)
def test_the_loss_in_slabs_equals_that_of_all_logits(grid, way, smoothing, monkeypatch):
    """Value, accuracy and gradient, 37 rows in 5 slabs of 8, ignored pixels and rows.

    In the ways of CPUs, of GPUs and of TPUs: bands is what this machine takes by itself.
    """
    if way != "bands":
        monkeypatch.setattr(pixel_scores, "_by_platform", lambda f, _, __, *x: f(way, *x))
    rng = np.random.default_rng(0)
    chosen = losses.Options((0.5, 2.0, 1.0, 0.25), smoothing)
    with jax.enable_x64(True):
        logits = jnp.asarray(3 * rng.normal(size=(2, 5, 7, 4)))
        labels = rng.integers(0, 4, (2, 37, 50)).astype(np.uint8)
        labels[:, 30:] = labels[0, :, :9] = IGNORE
        labels = jnp.asarray(labels)
        monkeypatch.setattr(pixel_scores, "SLAB_BYTES", 8 * 50 * 4 * 8)
        monkeypatch.setattr(pixel_scores, "COLUMNS", 1)  # three blocks

        def whole(logits):
            """Plain: no slabs, and the gradient of JAX."""
            x = resizing.resize_bilinear(logits, (37, 50), grid, 1 / 8)
            target = jax.nn.one_hot(labels, 4, dtype=x.dtype)  # 0 where ignored
            weights = jnp.asarray(chosen.class_weights)
            soft = (1 - smoothing) * target + smoothing / 4 * target.sum(-1, keepdims=True)
            total = -(soft * weights[None, None, None] * jax.nn.log_softmax(x)).sum()
            right = (x.argmax(-1) == labels).sum() / (labels != IGNORE).sum()
            return total / (target @ weights).sum(), right

        def slabs(logits):
            return losses.loss_and_accuracy(logits, labels, chosen, grid, 8)

        (expected, gradient), (value, ours) = (
            jax.jit(jax.value_and_grad(f, has_aux=True))(logits) for f in (whole, slabs)
        )
        np.testing.assert_allclose(value, expected, rtol=1e-13)
        np.testing.assert_allclose(ours, gradient, rtol=0, atol=1e-15)
        program = jax.jit(jax.value_and_grad(slabs, has_aux=True)).lower(logits).compile()
    assert "f64[2,8,50,4]" in program.as_text()
    assert "f64[2,37,50,4]" not in program.as_text()


@pytest.mark.parametrize("way", ["bands", "taps", "grid"])
def test_logits_that_are_large_or_not_finite(way):
    """exp() of any of them alone would leave float32; one that is not finite must show."""
    how = (), "corners", 8, None, 1, way
    rng = np.random.default_rng(0)
    for cells in ((3, 4), (1, 1)):  # one cell has no neighbour
        labels = jnp.asarray(rng.integers(0, 3, (1, 8 * cells[0], 8 * cells[1])).astype(np.uint8))
        logits = jnp.asarray(1e4 * rng.normal(size=(1, *cells, 3)).astype(np.float32))
        resized = resizing.resize_bilinear(logits, labels.shape[1:], "corners", 1 / 8)
        expected = jax.nn.logsumexp(resized, -1)
        found: Any = pixel_scores.pixel_scores(logits, labels, *how)
        np.testing.assert_allclose(found.normalizer, expected, rtol=2e-6, atol=3e-3)  # 3 ulp of 1e4
        np.testing.assert_array_equal(found.right, resized.argmax(-1) == labels)
        for bad in (np.nan, np.inf):
            found = pixel_scores.pixel_scores(logits.at[0, 0, 0, 1].set(bad), labels, *how)
            assert not np.isfinite(found.normalizer[0, 0, 0])


# Scores


def test_scores_of_the_example():
    scores = metrics.scores(np.array([[3, 1], [2, 4]]))
    np.testing.assert_allclose(scores["iou"], [0.5, 4 / 7], rtol=1e-12)
    np.testing.assert_allclose(scores["accuracy"], [0.75, 2 / 3], rtol=1e-12)
    rounded = {name: round(scores[name], 6) for name in ("PA", "mPA", "mIoU", "final_score")}
    assert rounded == {"PA": 0.7, "mPA": 0.708333, "mIoU": 0.535714, "final_score": 0.617857}


def test_confusion_matrix_has_labels_in_rows():
    labels = jnp.asarray([[0, 0, 0, 0, 1], [1, 1, 1, 1, 1]], jnp.uint8)
    predictions = jnp.asarray([[0, 0, 0, 1, 0], [0, 1, 1, 1, 1]])
    matrix = metrics.confusion_matrix(labels, predictions, 2)
    np.testing.assert_array_equal(matrix, [[3, 1], [2, 4]])
    assert matrix.dtype == jnp.int32


def test_confusion_matrix_leaves_ignored_pixels_out_of_rows_and_columns():
    logits, labels = examples(classes=7)
    predictions = logits.argmax(-1)
    expected = np.zeros((7, 7), int)
    for label, prediction in zip(labels.flat, predictions.flat, strict=True):
        if label != IGNORE:
            expected[label, prediction] += 1
    ours = metrics.confusion_matrix(jnp.asarray(labels), jnp.asarray(predictions), 7)
    np.testing.assert_array_equal(ours, expected)
    ours = metrics.host_confusion_matrix(labels, predictions.astype(np.uint8), 7)
    np.testing.assert_array_equal(ours, expected)


def test_classes_that_are_absent():
    """Class 2 is in neither label nor prediction, class 3 is predicted without being labelled."""
    matrix = np.zeros((4, 4), int)
    matrix[:2, :2] = [[3, 1], [2, 4]]
    matrix[0, 3] = 2
    skipped, zero = metrics.scores(matrix), metrics.scores(matrix, absent="zero")
    np.testing.assert_allclose(skipped["iou"], [3 / 8, 4 / 7, np.nan, 0])
    np.testing.assert_allclose(zero["iou"], [3 / 8, 4 / 7, 0, 0])
    assert skipped["mIoU"] == pytest.approx((3 / 8 + 4 / 7) / 3)
    assert zero["mIoU"] == pytest.approx((3 / 8 + 4 / 7) / 4)
    assert skipped["mPA"] == pytest.approx((0.5 + 2 / 3) / 2)  # over the classes labelled
    assert zero["mPA"] == pytest.approx((0.5 + 2 / 3) / 4)
    assert skipped["PA"] == zero["PA"] == pytest.approx(7 / 12)


def test_no_pixel_at_all_has_no_score():
    scores = metrics.scores(np.zeros((3, 3), int))
    assert np.isnan([scores[name] for name in ("PA", "mPA", "mIoU", "final_score")]).all()


def test_scores_count_beyond_int32():
    matrix = np.array([[3, 1], [2, 4]], np.int64) * 2_000_000_000
    assert matrix.max() > np.iinfo(np.int32).max
    assert metrics.scores(matrix)["mIoU"] == metrics.scores(matrix // 2_000_000_000)["mIoU"]


def test_matrices_of_the_images_are_summed_in_int64(monkeypatch):
    evaluate = pytest.importorskip("duc_dlc_jax.evaluate")
    spec = label_spec("camvid")
    evaluator = evaluate.Evaluator(SimpleNamespace(resize_grid="corners", logit_stride=8), spec)
    most = np.iinfo(np.int32).max
    one = np.full((spec.num_classes, spec.num_classes), most, np.int32)
    predictions = np.zeros((1, 2, 2), np.uint8)
    labelled = lambda variables, batch: (one, predictions)  # noqa: E731
    monkeypatch.setattr(evaluator.predictor, "_label", labelled)
    monkeypatch.setattr(sharding, "local_copy", lambda variables, mesh: variables)
    image = {"image": np.zeros((2, 2, 3), np.uint8), "label": np.zeros((2, 2), np.uint8)}
    scores, _ = evaluator.run({}, [image] * 3)
    batches = -(-3 // jax.local_device_count())
    assert scores["matrix"].dtype == np.int64
    assert (scores["matrix"] == batches * most).all()


def test_boundaries_have_the_width_and_the_absent_classes_that_the_scores_say(monkeypatch):
    """Class 0 is a square of 100 pixels, 1 around it; 0.01 of the diagonal, 283 pixels, is 3."""
    evaluate = pytest.importorskip("duc_dlc_jax.evaluate")
    spec = label_spec("camvid")
    model = SimpleNamespace(resize_grid="corners", logit_stride=8)
    evaluator = evaluate.Evaluator(model, spec, boundary=True, boundary_width=0.01)
    label = np.ones((200, 200), np.uint8)
    label[50:150, 50:150] = 0
    matrix = metrics.host_confusion_matrix(label, label, spec.num_classes)
    monkeypatch.setattr(evaluator.predictor, "_label", lambda *_: (matrix, label[None]))
    monkeypatch.setattr(sharding, "local_copy", lambda variables, mesh: variables)
    example = {"image": np.zeros((200, 200, 3), np.uint8), "label": label}
    edges = evaluator.run({}, [example], absent="zero")[0]["boundary"]
    assert edges["counts"][0, 0] == 100**2 - (100 - 2 * 3) ** 2
    assert edges["widths"].startswith("boundary IoU: 0.01 of the diagonal")
    np.testing.assert_array_equal(edges["iou"], [1, 1] + [0] * (spec.num_classes - 2))
    assert edges["mean_iou"] == pytest.approx(2 / spec.num_classes)
    args = {"workdir": "x", "model": "", "boundary": False, "boundary_width": 0.01}
    args |= {"pictures": 0, "json": "", "report": ""}
    monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(**args))
    with pytest.raises(ConfigError, match=r"--boundary_width=0\.01 needs --boundary"):
        evaluate.main([])


def test_counts_beyond_int32_are_summed_over_processes(monkeypatch):
    evaluate = pytest.importorskip("duc_dlc_jax.evaluate")
    counts = np.array([[0, 7, 2**31 - 1], [2**31, 2**40 + 5, 2**61 + 3]])
    monkeypatch.setattr(jax, "process_count", lambda: 3)

    def gathered(parts):
        assert parts.dtype == np.int32
        return np.stack([parts] * 3)

    monkeypatch.setattr(evaluate.multihost_utils, "process_allgather", gathered)
    np.testing.assert_array_equal(evaluate.sum_over_processes(counts), 3 * counts)
