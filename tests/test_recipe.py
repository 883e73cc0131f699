"""Options of loss and optimiser, each against NumPy, and PyTorch where that is installed."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import losses, optimizer, pixel_scores, train_step
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.models import resizing, segmenter
from networks import NARROW, jit, random_variables
from runs import tiny_config

WEIGHTS = (0.5, 2.0, 1.0, 0.25)


def examples():
    """Logits float64 [2, 5, 6, 4] and labels; some are ignored."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (2, 5, 6)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.2] = IGNORE
    return rng.normal(0, 2, (2, 5, 6, 4)), labels


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def loss_of(logits, labels, **fields):
    """Loss and its gradient, in float64."""
    with jax.enable_x64(True):
        loss = functools.partial(losses.cross_entropy, chosen=losses.Options(**fields))
        value, gradient = jit(jax.value_and_grad(loss))(jnp.asarray(logits), jnp.asarray(labels))
    return float(value), np.asarray(gradient)


# Class weights and smoothing


def test_class_weights_in_numpy():
    logits, labels = examples()
    total, divisor = 0.0, 0.0
    for pixel in zip(*np.nonzero(labels != IGNORE), strict=True):
        weight = WEIGHTS[labels[pixel]]
        total -= weight * log_softmax(logits)[pixel][labels[pixel]]
        divisor += weight
    value, gradient = loss_of(logits, labels, class_weights=WEIGHTS)
    assert value == pytest.approx(total / divisor, rel=1e-12)
    assert not gradient[labels == IGNORE].any()
    assert value != pytest.approx(loss_of(logits, labels)[0], rel=1e-3)


def test_label_smoothing_in_numpy():
    logits, labels = examples()
    values = []
    for pixel in zip(*np.nonzero(labels != IGNORE), strict=True):
        target = np.full(4, 0.1 / 4)
        target[labels[pixel]] += 0.9
        values.append(-(target * log_softmax(logits)[pixel]).sum())
    assert loss_of(logits, labels, label_smoothing=0.1)[0] == pytest.approx(
        np.mean(values), rel=1e-12
    )


@pytest.mark.parametrize("weights", [(), WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_and_smoothing_equal_pytorch(weights, smoothing):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    logits, labels = examples()
    x = torch.tensor(logits).permute(0, 3, 1, 2).requires_grad_()
    table = torch.tensor(weights, dtype=torch.float64) if weights else None
    expected = torch.nn.functional.cross_entropy(
        x, torch.tensor(labels.astype(np.int64)), table, ignore_index=255, label_smoothing=smoothing
    )
    expected.backward()
    value, gradient = loss_of(logits, labels, class_weights=weights, label_smoothing=smoothing)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, x.grad.permute(0, 2, 3, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # shares .5, .3, .2 and none
        ("inverse_log", [1 / np.log(1.52), 1 / np.log(1.32), 1 / np.log(1.22), 1]),
        ("median_frequency", [0.3 / 0.5, 1, 0.3 / 0.2, 1]),
    ],
)
def test_weights_from_the_pixels_of_the_training_split(rule, expected):
    np.testing.assert_allclose(losses.balanced(rule, [50, 30, 20, 0]), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_weights": (1.0, 2.0)}, r"class_weights has 2 numbers; the data set has 4 classes"),
        ({"class_balance": "inverse_log"}, r"'inverse_log' needs the training split's pixels"),
        (
            {"class_balance": "inverse_log", "class_weights": WEIGHTS},
            r"class_weights and loss\.class_balance='inverse_log' are both set",
        ),
    ],
)
def test_weights_that_fit_nothing_are_refused(fields, message):
    settings = config_lib.default().loss
    settings.update(fields)
    with pytest.raises(ConfigError, match=message):
        losses.options(settings, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss.label_smoothing": 1.5},
            r"loss\.label_smoothing=1\.5; allowed: numbers in \[0, 1\]$",
        ),
        (
            {"loss.ohem_min_kept": -1},
            r"loss\.ohem_min_kept=-1; allowed: whole numbers in \[0, inf\)",
        ),
        ({"optimizer.multipliers": ("classifier",)}, "allowed: PATH=FACTOR, as in classifier=20"),
        ({"model.context_width": 30}, r"model\.context_width=30; allowed: multiples of 4"),
    ],
)
def test_values_out_of_range(changes, message):
    config = config_lib.default()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        config_lib.validate(config)


# Hard pixels


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.3, 0), (0.3, 20), (0.05, 10), (0.9, 1000)])
@pytest.mark.parametrize("weights", [(), WEIGHTS])
def test_ohem_in_numpy(threshold, min_kept, weights):
    """By sorting: pixels below the threshold, and the hardest 2 x min_kept of both images."""
    logits, labels = examples()
    valid = np.nonzero(labels != IGNORE)
    nll = np.array([-log_softmax(logits)[p][labels[p]] for p in zip(*valid, strict=True)])
    least = min(2 * min_kept, len(nll))
    kept = np.exp(-nll) < threshold
    kept[np.argsort(-nll)[:least]] = True
    weight = np.array([(weights or np.ones(4))[labels[p]] for p in zip(*valid, strict=True)])
    expected = (weight * nll)[kept].sum() / weight[kept].sum()
    value, gradient = loss_of(
        logits, labels, class_weights=weights, ohem_threshold=threshold, ohem_min_kept=min_kept
    )
    assert value == pytest.approx(expected, rel=1e-12)
    assert (np.abs(gradient).sum(-1) > 0).sum() == kept.sum()
    assert 0 < kept.sum() <= len(nll)


def test_ohem_over_slabs_of_rows_is_that_of_the_whole(monkeypatch):
    """Nine slabs of one row: which pixels count follows from the losses of all."""
    logits, labels = examples()
    coarse, labels = logits[:, :3, :4], np.pad(labels, ((0, 0), (0, 4), (0, 2)), mode="wrap")
    chosen = losses.Options(WEIGHTS, ohem_threshold=0.3, ohem_min_kept=20)
    monkeypatch.setattr(pixel_scores, "SLAB_BYTES", 8 * 8 * 4)

    def in_slabs(logits):
        return losses.loss_and_accuracy(logits, y, chosen, "corners", 4)

    def whole(logits):
        full = resizing.resize_bilinear(logits, y.shape[1:], "corners", 1 / 4)
        return losses.loss_and_accuracy(full, y, chosen)

    with jax.enable_x64(True):
        x, y = jnp.asarray(coarse), jnp.asarray(labels)
        ours, theirs = (jit(jax.value_and_grad(f, has_aux=True))(x) for f in (in_slabs, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), ours, theirs)


def test_the_bound_is_the_kth_largest_exactly():
    values = np.random.default_rng(0).gamma(0.3, size=(3, 7, 5)).astype(np.float32)
    values[0, :, :2] = 0
    ordered = np.sort(values.ravel())[::-1]
    kth = jit(losses._kth_largest)
    for k in (1, 2, 50, 104, 105):
        assert kth(values, k) == ordered[k - 1]


def test_a_batch_without_labels_has_no_loss_under_any_option():
    logits, labels = examples()
    fields = {"class_weights": WEIGHTS, "label_smoothing": 0.1, "ohem_threshold": 0.7}
    value, gradient = loss_of(logits, np.full_like(labels, IGNORE), **fields, ohem_min_kept=5)
    assert value == 0
    assert not gradient.any()


# Optimiser


def settings(**changes):
    c = config_lib.default().optimizer
    c.update({"power": 0.0, "weight_decay": 0.0, "momentum": 0.0} | changes)
    return c


def test_warm_up_before_poly():
    rate = optimizer.poly_schedule(2.0, 0.9, 10, 4)
    expected = [2 * (1 - i / 10) ** 0.9 * min((i + 1) / 4, 1) for i in range(10)]
    np.testing.assert_allclose([rate(i) for i in range(10)], expected, rtol=1e-6)


def params():
    rng = np.random.default_rng(1)
    names = ("backbone/layer1_0/conv1", "backbone/layer4_0/conv1", "dlc/reduce_conv", "classifier")
    tree: dict = {}
    for name in names:
        *path, last = name.split("/")
        part = tree
        for key in path:
            part = part.setdefault(key, {})
        part[last] = {"kernel": rng.normal(size=3), "bias": rng.normal(size=3)}
    return tree


def test_multipliers_by_the_beginning_of_names():
    c = settings(
        learning_rate=0.1, multipliers=("backbone/layer4=0.5", "classifier=20", "backbone=0")
    )
    rule, tree = optimizer.create(c, 5), params()
    updates, _ = rule.update(jax.tree.map(np.ones_like, tree), rule.init(tree), tree)
    factors = {
        "/".join(k.key for k in path): float(-leaf[0] / 0.1)
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }
    for leaf in ("kernel", "bias"):
        assert factors[f"backbone/layer1_0/conv1/{leaf}"] == 0
        assert factors[f"backbone/layer4_0/conv1/{leaf}"] == pytest.approx(0.5)
        assert factors[f"dlc/reduce_conv/{leaf}"] == pytest.approx(10)
        assert factors[f"classifier/{leaf}"] == pytest.approx(20)


def test_a_multiplier_of_nothing_is_refused():
    rule, tree = optimizer.create(settings(multipliers=("head=2",)), 5), params()
    with pytest.raises(ConfigError, match="begins with 'head'; the parts are backbone, classifier"):
        rule.update(tree, rule.init(tree), tree)


@pytest.mark.parametrize("kernels_only", [False, True])
def test_adamw_in_numpy(kernels_only):
    """Three steps: bias-corrected means, decay beside them, poly and the two rates."""
    c = settings(
        name="adamw", learning_rate=0.1, weight_decay=0.05, power=0.9, adam_betas=(0.8, 0.9)
    )
    c.update({"decay_kernels_only": kernels_only, "adam_epsilon": 1e-3})
    rule, ours, rng = optimizer.create(c, 3), params(), np.random.default_rng(0)
    leaves = {jax.tree_util.keystr(p): v for p, v in jax.tree_util.tree_leaves_with_path(ours)}
    expected = {name: (v.copy(), np.zeros(3), np.zeros(3)) for name, v in leaves.items()}
    memory = rule.init(jax.tree.map(jnp.asarray, ours))
    for step in range(3):
        gradients = jax.tree.map(lambda v: rng.normal(size=v.shape), ours)
        for path, g in jax.tree_util.tree_leaves_with_path(gradients):
            name = jax.tree_util.keystr(path)
            w, m, v = expected[name]
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            scaled = m / (1 - 0.8 ** (step + 1)) / (np.sqrt(v / (1 - 0.9 ** (step + 1))) + 1e-3)
            decay = 0 if kernels_only and "bias" in name else 0.05
            rate = 0.1 * (1 - step / 3) ** 0.9 * (1 if "backbone" in name else 10)
            expected[name] = w - rate * (scaled + decay * w), m, v
        updates, memory = rule.update(gradients, memory, ours)
        ours = optax.apply_updates(ours, updates)
    for path, value in jax.tree_util.tree_leaves_with_path(ours):
        np.testing.assert_allclose(
            value, expected[jax.tree_util.keystr(path)][0], rtol=1e-4, atol=1e-5
        )


def test_adamw_equals_pytorch():
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    c = settings(name="adamw", learning_rate=0.01, weight_decay=0.1, new_layer_multiplier=1.0)
    rule, rng = optimizer.create(c, 9), np.random.default_rng(0)
    ours = {"classifier": {"kernel": rng.normal(size=(4, 3))}}
    theirs = torch.nn.Parameter(torch.tensor(ours["classifier"]["kernel"]))
    peer, memory = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1), rule.init(ours)
    for _ in range(5):
        gradient = rng.normal(size=(4, 3))
        theirs.grad = torch.tensor(gradient)
        peer.step()
        updates, memory = rule.update({"classifier": {"kernel": gradient}}, memory, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours["classifier"]["kernel"], theirs.detach(), rtol=1e-5, atol=1e-6)


# In a training step


@pytest.fixture(scope="module")
def frozen_step():
    """States before and after a step with all loss options, a frozen backbone and decay."""
    config = tiny_config(
        "",
        **{f"model__{name}": value for name, value in NARROW.items()},
        model__backbone_frozen=True,
        model__aux_head=True,
        loss__class_balance="median_frequency",
        loss__label_smoothing=0.1,
        loss__ohem_threshold=0.7,
        loss__ohem_min_kept=50,
        optimizer__weight_decay=0.1,
    )
    model = segmenter.create(config.model, 3)
    rule = optimizer.create(config.optimizer, 10)
    before = train_step.create_state(model, rule, config, random_variables(model))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 64, 64, 3), np.uint8),
        "label": rng.integers(0, 3, (4, 64, 64)).astype(np.uint8),
    }
    step = jit(train_step.make_train_step(model, rule, config, [5, 3, 2]))
    after, metrics = step(before, batch, config.seed)
    return SimpleNamespace(before=before, after=after, metrics=metrics)


@pytest.mark.parametrize("part", ["params", "batch_stats"])
def test_a_frozen_backbone_stays_and_the_rest_learns(frozen_step, part):
    assert np.isfinite(frozen_step.metrics["loss"])
    before, after = getattr(frozen_step.before, part), getattr(frozen_step.after, part)
    jax.tree.map(np.testing.assert_array_equal, before["backbone"], after["backbone"])
    for name in set(before) - {"backbone"}:
        moved = jax.tree.map(
            lambda a, b: bool(np.any(np.asarray(a) != b)), before[name], after[name]
        )
        assert all(jax.tree.leaves(moved)), name
