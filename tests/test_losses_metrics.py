"""Loss, scores and optimiser against plain formulas, and against what goes wrong silently.

The tests named `test_planted_fault_*` break one thing and show that the others would notice.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import losses, metrics, optimizer, pixel_scores, sharding, train_step
from duc_dlc_jax.data.labels import IGNORE, label_spec
from duc_dlc_jax.models import resizing, segmenter
from runs import tiny_config

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


# Schedule and length


def test_poly_factors():
    factors = optimizer.poly_schedule(1.0, 0.9, 1000)
    shares = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    expected = (0.909533, 0.771890, 0.535887, 0.287175, 0.125893, 0.015849)
    for share, factor in zip(shares, expected, strict=True):
        assert float(factors(round(1000 * share))) == pytest.approx(factor, abs=1e-6)
    assert float(factors(0)) == 1
    assert float(factors(1000)) == float(factors(1001)) == 0


@pytest.mark.parametrize(
    ("name", "images", "dropping", "ours"),
    [
        ("ade20k", 20_210, 151_560, 151_575),
        ("pascal_context", 4_998, 24_960, 24_990),
        ("cityscapes", 2_975, 44_400, 44_625),
    ],
)
def test_steps_of_a_run(name, images, dropping, ours):
    """The source code drops the last partial batch of an epoch; here batches cross its border."""
    train = pytest.importorskip("duc_dlc_jax.train")
    config = config_lib.load(f"configs/{name}.py")
    assert config.train.batch_size == 16
    assert int(config.train.epochs) * (images // 16) == dropping
    assert train.total_steps(config, images) == ours
    config.train.steps = 7
    assert train.total_steps(config, images) == 7


# Optimiser

PARTS = ("backbone", "duc", "dlc", "classifier", "aux_conv", "aux_bn", "aux_classifier")


def settings(**changes) -> ml_collections.ConfigDict:
    """`config.optimizer` reduced to plain gradient descent with one rate, then `changes`."""
    c = config_lib.default().optimizer
    c.update({"momentum": 0.0, "weight_decay": 0.0, "new_layer_multiplier": 1.0, "power": 0.0})
    c.update(changes)
    return c


def update_of(rule, gradients, params=None):
    params = jax.tree.map(jnp.zeros_like, gradients) if params is None else params
    return rule.update(gradients, rule.init(params), params)[0]


def rates(rule) -> dict[str, float]:
    """Learning rate of each part of the network: the step that a gradient of 1 causes."""
    config = tiny_config("", model__aux_head=True)
    model = segmenter.create(config.model, 5)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    assert sorted(shapes) == sorted(PARTS)
    updates = update_of(rule, jax.tree.map(lambda leaf: jnp.ones(2, leaf.dtype), shapes))
    found = {}
    for part in PARTS:
        values = {float(v) for leaf in jax.tree.leaves(updates[part]) for v in np.unique(leaf)}
        assert len(values) == 1, f"{part} has several rates: {values}"
        found[part] = round(-values.pop(), 6)
    return found


TIMES_TEN = {part: 0.01 if part == "backbone" else 0.1 for part in PARTS}


def test_everything_but_the_backbone_learns_ten_times_faster():
    rule = optimizer.create(settings(learning_rate=0.01, new_layer_multiplier=10.0), 100)
    assert rates(rule) == TIMES_TEN


def test_planted_fault_times_ten_on_the_wrong_group():
    rule = optimizer.create(settings(learning_rate=0.1, new_layer_multiplier=0.1), 100)
    assert rates(rule) == {part: 0.1 if part == "backbone" else 0.01 for part in PARTS}
    assert rates(optimizer.create(settings(learning_rate=0.01), 100)) != TIMES_TEN


def test_clip_norm_bounds_the_gradient_of_the_whole_network():
    rng = np.random.default_rng(0)
    gradients = {
        name: {"kernel": jnp.asarray(100 * rng.normal(size=(3, 4)).astype(np.float32))}
        for name in ("backbone", "duc")
    }
    norm = float(optax.tree.norm(gradients))
    assert norm > 100
    clipped = update_of(optimizer.create(settings(learning_rate=1.0, clip_norm=2.0), 9), gradients)
    assert float(optax.tree.norm(clipped)) == pytest.approx(2, rel=1e-5)
    expected = jax.tree.map(lambda g: -g * 2 / norm, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, expected)
    for bound in (0.0, 2 * norm):  # off, and out of reach
        free = update_of(
            optimizer.create(settings(learning_rate=1.0, clip_norm=bound), 9), gradients
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-6), free, gradients)


def test_rule_in_numpy():
    """Clip, then coupled decay, then momentum, then the two rates, over three steps of poly."""
    c = settings(learning_rate=0.1, clip_norm=1.5, momentum=0.9, weight_decay=0.05, power=0.9)
    c.new_layer_multiplier = 10.0
    rule = optimizer.create(c, 3)
    rng = np.random.default_rng(0)
    params = {name: {"scale": rng.normal(size=4)} for name in ("backbone", "dlc")}
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    memory = rule.init(ours)
    velocity = dict.fromkeys(params, 0)
    for step in range(3):
        gradients = {name: {"scale": rng.normal(size=4)} for name in params}
        norm = np.sqrt(sum((g["scale"] ** 2).sum() for g in gradients.values()))
        for name, part in params.items():
            g = gradients[name]["scale"] * min(1, 1.5 / norm) + 0.05 * part["scale"]
            velocity[name] = 0.9 * velocity[name] + g
            rate = 0.1 * (1 - step / 3) ** 0.9 * (1 if name == "backbone" else 10)
            part["scale"] = part["scale"] - rate * velocity[name]
        given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradients)
        updates, memory = rule.update(given, memory, ours)
        ours = optax.apply_updates(ours, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, params)


# Averaged weights


def ema_error(average, states, decay, part) -> float:
    """Largest distance of `average` from decay ** t weighted states, in units of the last move."""
    expected = jax.tree.map(np.float64, getattr(states[0], part))
    for state in states[1:]:
        expected = jax.tree.map(
            lambda mean, new: decay * mean + (1 - decay) * new, expected, getattr(state, part)
        )
    errors = jax.tree.map(
        lambda a, b: float(np.max(np.abs(a - b) / (1 + np.abs(b)))), average, expected
    )
    return max(jax.tree.leaves(errors))


@pytest.mark.parametrize("part", ["params", "batch_stats"])
def test_ema_averages_parameters_and_statistics(bfloat16_run, part):
    states = bfloat16_run.states
    decay = bfloat16_run.config.optimizer.ema_decay
    assert set(states[-1].ema) == {"params", "batch_stats"}
    assert states[-1].variables() is states[-1].ema
    for count in (1, 4, 11):
        assert ema_error(states[count - 1].ema[part], states[:count], decay, part) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, states[0].ema[part], getattr(states[0], part))


def test_planted_fault_ema_without_batch_statistics(bfloat16_run):
    """Averaged weights beside the live statistics, or beside those of the start."""
    states = bfloat16_run.states
    decay = bfloat16_run.config.optimizer.ema_decay
    for faulty in (states[-1].batch_stats, states[0].batch_stats):
        assert ema_error(faulty, states, decay, "batch_stats") > 1e-2


def test_without_ema_the_live_network_is_evaluated(bfloat16_run):
    config = tiny_config("")
    assert config.optimizer.ema_decay == 0
    first = bfloat16_run.states[0]
    variables = {"params": first.params, "batch_stats": first.batch_stats}
    rule = optimizer.create(config.optimizer, 1)
    state = train_step.create_state(segmenter.create(config.model, 5), rule, config, variables)
    assert state.ema == {}
    assert state.variables() == variables


def test_no_buffer_of_a_new_state_appears_twice(bfloat16_run):
    """The state is donated: a buffer that is parameter and average at once could not be."""
    config = bfloat16_run.config
    first = bfloat16_run.states[0]
    variables = jax.tree.map(
        jnp.asarray, {"params": first.params, "batch_stats": first.batch_stats}
    )
    rule = optimizer.create(config.optimizer, 1)
    model = segmenter.create(config.model, 5)
    leaves = jax.tree.leaves(train_step.create_state(model, rule, config, variables))
    arrays = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    twice = [a for a, b in itertools.pairwise(sorted(arrays)) if a == b]
    assert not twice


@pytest.mark.parametrize("grid", ["corners", "stride", "half_pixel"])
@pytest.mark.parametrize(
    ("way", "smoothing"), [("bands", 0), ("bands", 0.1), ("taps", 0.1), ("grid", 0)]
)
def test_the_loss_in_slabs_equals_that_of_all_logits(grid, way, smoothing, monkeypatch):
    """Value, accuracy and gradient, 37 rows in 5 slabs of 8; ignored pixels and rows.

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
