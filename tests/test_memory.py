"""What saves memory in training: activations computed again, and batches taken in parts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duc_dlc_jax import accumulation, losses, optimizer, sharding, train_step
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.models import segmenter
from networks import NARROW, QUICK, random_variables
from runs import tiny_config

BATCH, CLASSES = 4, 5
ORDER = [0, 2, 1, 3]  # as two parts take the images: 0 and 2, then 1 and 3
BACKBONE = {"model__upsampling": "none", "model__context": "none"}
WEIGHTS = (0.5, 2.0, 1.0, 0.25, 1.5)


def batch_of(order=range(BATCH)):
    """Random images whose parts have different shares of ignored pixels."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (BATCH, 64, 64, 3), np.uint8)
    label = rng.integers(0, CLASSES, (BATCH, 64, 64)).astype(np.uint8)
    label[0, :50] = label[2, :, :30] = IGNORE
    valid = np.array([[64, 64], [40, 64], [64, 32], [64, 64]], np.int32)
    batch = {"image": image, "label": label, "valid": valid}
    return {name: value[list(order)] for name, value in batch.items()}


def prepared(groups=1, dtype="float64", **changes):
    """(model, state, step) of the narrow network without dropout."""
    fields = {f"model__{name}": value for name, value in NARROW.items()}
    fields |= {"model__dtype": dtype, "model__dropout": 0.0}
    config = tiny_config("", **fields | changes)
    model = segmenter.create(config.model, CLASSES, groups)
    rule = optimizer.create(config.optimizer, 10)
    state = train_step.create_state(model, rule, config, random_variables(model))
    return model, state, train_step.make_train_step(model, rule, config)


def stepped(order=range(BATCH), groups=1, dtype="float64", **changes):
    """The state after one step, and its figures."""
    with jax.enable_x64(dtype == "float64"):
        _, state, step = prepared(groups, dtype, **changes)
        return jax.device_get(jax.jit(step, compiler_options=QUICK)(state, batch_of(order), 0))


def difference(first, second) -> float:
    """The largest of any array, relative to its largest value."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    wide = ((np.float64(a), np.float64(b)) for a, b in pairs if np.size(a))
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in wide)


@pytest.fixture(scope="module")
def parts():
    """One step of the backbone on a batch in two parts."""
    return stepped(train__accumulate=2, **BACKBONE)


def test_parts_equal_as_many_groups_of_the_batch(parts):
    """Gradients, figures and running statistics: those of BN in two groups, of the same images."""
    grouped = stepped(ORDER, groups=2, **BACKBONE)
    print(f"largest relative difference {difference(grouped, parts):.1e}")
    assert difference(grouped, parts) < 1e-12


@pytest.mark.parity
def test_parts_are_not_the_batch_where_its_statistics_are_taken(parts):
    """So the test above is not about a network that does not notice."""
    whole = stepped(**BACKBONE)
    assert difference(whole[0].params, parts[0].params) > 1e-6
    assert whole[1]["loss"] != pytest.approx(parts[1]["loss"], rel=1e-6)


def test_parts_equal_the_batch_where_statistics_are_frozen():
    """With class weights too: the divisor is the batch's, whatever a part ignores."""
    fields = {"model__bn_frozen": True, "model__aux_head": True, "loss__class_weights": WEIGHTS}
    fields |= BACKBONE
    whole, parts = stepped(**fields), stepped(train__accumulate=2, **fields)
    print(f"largest relative difference {difference(whole, parts):.1e}")
    assert difference(whole, parts) < 1e-12


@pytest.mark.parametrize("fields", [{}, {"class_weights": WEIGHTS, "label_smoothing": 0.1}])
def test_losses_of_parts_add_up_to_that_of_the_batch(fields):
    """And their mean does not: the fault that this is about."""
    rng, labels = np.random.default_rng(0), batch_of()["label"][:, :8, :8]
    labels[0] = IGNORE
    logits = rng.normal(size=(*labels.shape, CLASSES)).astype(np.float32)
    chosen = losses.Options(**fields)
    whole = losses.loss_and_accuracy(jnp.asarray(logits), jnp.asarray(labels), chosen)
    found = []
    for of in (labels, None):
        parts = (
            losses.loss_and_accuracy(
                jnp.asarray(logits[i::2]), jnp.asarray(labels[i::2]), chosen, of=of
            )
            for i in range(2)
        )
        found.append(np.sum(jax.device_get(list(parts)), 0))
    np.testing.assert_allclose(found[0], whole, rtol=1e-6)
    assert abs(found[1][0] / 2 - whole[0]) > 1e-3


def test_a_device_splits_the_images_that_it_holds():
    """8 images on 2 devices, 2 parts: of 0..3 on the first, 0 and 2 are in the first part."""
    found = accumulation.split({"image": jnp.arange(8)}, 2)["image"]
    np.testing.assert_array_equal(found, [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_a_batch_that_does_not_divide_over_devices_and_parts():
    message = (
        r"batch_size=16 does not divide over 4 devices x train\.accumulate=3 parts "
        r"\(16 = 1 x 4 x 3 \+ 4\); use 12 or 24"
    )
    with pytest.raises(ConfigError, match=message):
        sharding.check_batch(16, 4, 3)
    sharding.check_batch(24, 4, 3)


def test_hard_pixels_of_parts_are_refused():
    config = config_lib.default()
    config.train.accumulate, config.loss.ohem_threshold = 2, 0.7
    with pytest.raises(ConfigError, match=r"accumulate=2 and loss\.ohem_threshold=0\.7 are both"):
        config_lib.validate(config)


def kept_bytes(**changes) -> int:
    """Of what the forward pass of a training step keeps for its backward pass."""
    model, state, _ = prepared(dtype="bfloat16", **changes)
    batch = jax.tree.map(jnp.asarray, batch_of())

    def backward(params):
        def outputs(params):
            return model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                batch["image"],
                train=True,
                coarse=True,
                valid=batch["valid"],
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats"],
            )

        return jax.vjp(outputs, params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, state.params))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def test_less_is_kept_with_remat():
    """Counted as traced: the compiler for CPUs computes nothing twice, whatever it is told."""
    found = {remat: kept_bytes(model__remat=remat) for remat in ("none", "blocks", "all")}
    print({name: f"{count / 2**20:.2f} MiB" for name, count in found.items()})
    assert found["blocks"] < 0.75 * found["none"]
    assert found["all"] < 0.4 * found["none"]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({}, ("blocks", "all")),
        ({"model__dtype": "bfloat16"}, ("blocks", "all")),
        (
            {
                "model__bn_padding": "masked",
                "train__accumulate": 2,
                "model__duc_upsampled": "output",
            },
            ("all",),
        ),
        (
            {"model__upsampling": "jpu", "model__context": "dense_aspp", "model__dropout": 0.2},
            ("all",),
        ),
        (
            {"model__backbone_frozen": True, "model__stem": "deep", "model__aux_head": True},
            ("blocks",),
        ),
    ],
)
def test_remat_changes_no_number(fields, kinds):
    """Parameters, momentum, statistics (updated once) and figures after a step, and their names."""
    fields = {"dtype": fields.get("model__dtype", "float64")} | fields
    fields.pop("model__dtype", None)
    plain = stepped(model__remat="none", **fields)
    for remat in kinds:
        again = stepped(model__remat=remat, **fields)
        same = all(map(np.array_equal, *map(jax.tree.leaves, (plain, again))))
        print(f"{fields} {remat}: {difference(plain, again):.1e}, bit for bit: {same}")
        if fields["dtype"] == "float64":
            assert difference(plain, again) < 1e-12
            continue
        # bfloat16: sums that are fused otherwise are rounded otherwise
        assert again[1]["loss"] == pytest.approx(plain[1]["loss"], rel=1e-5)
        vectors = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.opt_state)])
            for state in (plain[0], again[0])
        )
        first, second = vectors
        distance = np.linalg.norm(first - second) / np.linalg.norm(first)
        print(f"gradients differ by {distance:.1e} of their norm")
        assert distance < 0.02
