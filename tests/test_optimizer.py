"""Schedule, optimiser and averaged weights against plain formulas, and against silent faults.

The tests named `test_planted_fault_*` break one thing and show that the others would notice.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import optimizer, train_step
from duc_dlc_jax.models import segmenter
from runs import tiny_config

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
    config = config_lib.load(f"configs/{name}.py")
    assert config.train.batch_size == 16
    assert int(config.train.epochs) * (images // 16) == dropping
    assert optimizer.total_steps(config, images) == ours
    config.train.batch_size = 8  # after 100 steps of 16: every image is seen as often as before
    assert optimizer.total_steps(config, images, 100, 1600) == 2 * ours - 100
    config.train.steps = 7
    assert optimizer.total_steps(config, images) == 7


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
