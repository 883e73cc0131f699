"""The network's parts and their dtypes against docs/network.md; its numbers: test_model_numbers."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duc_dlc_jax import optimizer, sharding, train_step
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.models import counts, layers, segmenter
from duc_dlc_jax.models.resnet import ResNet
from networks import IMAGE, jit, random_variables, shapes_of
from runs import tiny_config

# Grids and dilations


@pytest.mark.parametrize("size", [(480, 480), (481, 473), (33, 97), (50, 63)])
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_grids_have_ceil_of_size_over_stride_cells(output_stride, size):
    config = tiny_config("", model__output_stride=output_stride)
    model = segmenter.create(config.model, 5)
    backbone = ResNet(14, 8, "plain", "3x3", output_stride, layers.Conv, layers.BatchNorm)
    image = jnp.zeros((2, *size, 3))
    outputs = jax.eval_shape(backbone.init_with_output, jax.random.key(0), image)[0]
    strides = [4, 8, min(16, output_stride), output_stride]
    expected = [tuple(-(-n // s) for n in size) for s in strides]
    assert [o.shape[1:3] for o in outputs] == expected
    assert [o.shape[-1] for o in outputs] == [32, 64, 128, 256]
    grids = list(counts.grids(*size, output_stride).values())
    assert grids == [size, expected[0], expected[1], expected[3], expected[1]]
    logits = jax.eval_shape(model.init_with_output, jax.random.key(0), image)[0]
    assert logits.shape == (2, *size, 5)


def convolutions(model):
    """Path -> its Conv module, for every convolution of the network."""
    found = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, layers.Conv):
            found["/".join(context.module.path)] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes_of(model)
    return found


@pytest.mark.parametrize(
    ("output_stride", "layer3", "layer4"),
    [
        (32, [(2, 1), (1, 1)], [(2, 1), (1, 1)]),
        (16, [(2, 1), (1, 1)], [(1, 1), (1, 2)]),
        (8, [(1, 1), (1, 2)], [(1, 2), (1, 4)]),
    ],
)
@pytest.mark.parametrize("stride_on", ["3x3", "1x1"])
def test_strides_and_dilations_of_the_blocks(stride_on, output_stride, layer3, layer4):
    config = tiny_config(
        "", model__depth=26, model__stride_on=stride_on, model__output_stride=output_stride
    )
    found = convolutions(segmenter.create(config.model, 5))
    for layer, expected in {"layer2": [(2, 1), (1, 1)], "layer3": layer3, "layer4": layer4}.items():
        for block, (stride, dilation) in enumerate(expected):
            first, second = (found[f"backbone/{layer}_{block}/conv{i}"] for i in (1, 2))
            assert second.dilation == dilation
            strides = (1, stride) if stride_on == "3x3" else (stride, 1)
            assert (first.stride, second.stride) == strides
    for rate in (3, 6, 12, 18):
        assert found[f"dlc/d{rate}_conv2"].dilation == rate
    assert (found["duc/low_conv"].kernel, found["duc/low_conv"].dilation) == (3, 2)
    assert (found["duc/guidance_conv"].kernel, found["duc/guidance_conv"].stride) == (3, 4)


def test_auxiliary_logits_in_training_alone():
    model = segmenter.create(tiny_config("", model__aux_head=True).model, 5)
    variables = {k: v for k, v in shapes_of(model).items() if k != "intermediates"}

    def collections(train):
        apply = functools.partial(
            model.apply, train=train, mutable=["batch_stats", "intermediates"]
        )
        rngs = {"dropout": jax.random.key(0)}
        return jax.eval_shape(lambda v, x: apply(v, x, rngs=rngs), variables, IMAGE)[1]

    (aux,) = collections(True)["intermediates"]["aux_logits"]
    assert (model.aux_stride, aux.shape) == (16, (1, 4, 4, 5))
    assert "intermediates" not in collections(False)


def test_dropout_of_whole_channels_before_the_classifier():
    model = nn.Dropout(0.5, broadcast_dims=(1, 2), deterministic=False)
    found = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            found.append((context.module.rate, context.module.broadcast_dims, args[0].shape[-1]))
        return call(*args, **kwargs)

    config = tiny_config("", model__dropout=0.25)
    with nn.intercept_methods(note):
        shapes_of(segmenter.create(config.model, 5))
    assert found == [(0.25, (1, 2), 16 + 4 * 8)]
    kept = np.asarray(model.apply({}, jnp.ones((1, 4, 4, 64)), rngs={"dropout": jax.random.key(0)}))
    assert {len(np.unique(kept[..., c])) for c in range(64)} == {1}


# Batch normalisation


def batch_norms(train=True, valid=None, **changes) -> list[layers.BatchNorm]:
    """The modules that a call of the tiny network applies."""
    model = segmenter.create(tiny_config("", model__aux_head=True, **changes).model, 5)
    variables = {k: v for k, v in shapes_of(model).items() if k != "intermediates"}
    found = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, layers.BatchNorm):
            found.append(context.module)
        return call(*args, **kwargs)

    def apply(variables, images, valid):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, images, train, valid, rngs=rngs, mutable=["batch_stats"])

    with nn.intercept_methods(note):
        jax.eval_shape(apply, variables, IMAGE, valid)
    assert len(found) > 20
    return found


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_field_reaches_every_batch_norm_in_training(frozen):
    found = batch_norms(model__bn_frozen=frozen)
    assert {norm.use_running_average for norm in found} == {frozen}


VALID = jax.ShapeDtypeStruct((1, 2), jnp.int32)


@pytest.mark.parametrize(
    ("call", "masked"),
    [
        ({"valid": VALID, "model__bn_padding": "masked"}, True),
        ({"valid": VALID, "model__bn_padding": "counted"}, False),
        ({"model__bn_padding": "masked", "model__bn_frozen": True}, False),
        ({"model__bn_padding": "masked", "train": False}, False),
    ],
    ids=["masked", "counted", "frozen", "inference"],
)
def test_masked_padding_reaches_every_batch_norm_that_takes_statistics(call, masked):
    assert {norm.valid_sizes is not None for norm in batch_norms(**call)} == {masked}


def test_masked_padding_needs_the_valid_sizes():
    config = tiny_config("", model__bn_padding="masked")
    model, rule = segmenter.create(config.model, 5), optimizer.create(config.optimizer, 10)
    state = train_step.create_state(model, rule, config)
    step = train_step.make_train_step(model, rule, config)
    step = sharding.jit_train_step(step, sharding.make_mesh(devices=jax.devices()[:1]))
    batch = {"image": IMAGE, "label": jax.ShapeDtypeStruct((1, 64, 64), jnp.uint8)}
    with pytest.raises(ConfigError, match=r'bn_padding="masked" needs .* "valid", int32 \[B, 2\]'):
        step.lower(state, batch, config.seed)
    step.lower(state, batch | {"valid": VALID}, config.seed)


PART = np.array([[40, 25], [9, 64]], np.int32)  # pixels of the 64 x 64 of two crops


@pytest.fixture(scope="module")
def padded_steps():
    """One float64 step from one state: before, and after it with the padding of `PART` or none."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (2, 64, 64, 3), np.uint8),
        "label": rng.integers(0, 5, (2, 64, 64)).astype(np.uint8),
    }
    sizes = {"all": np.full((2, 2), 64, np.int32), "part": PART}
    with jax.enable_x64(True):
        after = {}
        for padding in ("counted", "masked"):
            config = tiny_config("", model__dtype="float64", model__bn_padding=padding)
            model, rule = segmenter.create(config.model, 5), optimizer.create(config.optimizer, 10)
            before = train_step.create_state(model, rule, config, random_variables(model))
            step = jit(train_step.make_train_step(model, rule, config))
            for name, valid in sizes.items():
                after[padding, name] = jax.device_get(
                    step(before, batch | {"valid": valid}, config.seed)
                )
        return batch, jax.device_get(before), after


def test_masked_padding_without_any_is_the_counted_one(padded_steps):
    """Loss, gradients, parameters and statistics of a step."""
    *_, after = padded_steps
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        after["masked", "all"],
        after["counted", "all"],
    )
    jax.tree.map(np.testing.assert_array_equal, after["counted", "all"], after["counted", "part"])


def test_masked_padding_changes_all_statistics(padded_steps):
    *_, after = padded_steps
    state, metrics = after["masked", "part"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, metrics)))
    same = jax.tree.map(np.array_equal, state.batch_stats, after["masked", "all"][0].batch_stats)
    assert not any(jax.tree.leaves(same)), same


def test_masked_statistics_of_the_guidance_are_those_of_the_valid_pixels(padded_steps):
    """Its 1x1 convolution is on the image: the unpadded crops give the expected mean."""
    batch, before, after = padded_steps
    with jax.enable_x64(True):
        image = np.asarray(layers.normalize(jnp.asarray(batch["image"]), jnp.float64))
    values = image @ before.params["duc"]["g_conv1"]["kernel"][0, 0]
    valid = [v[:h, :w].reshape(-1, 8) for v, (h, w) in zip(values, PART, strict=True)]
    expected = 0.9 * before.batch_stats["duc"]["g_bn"]["mean"] + 0.1 * np.concatenate(valid).mean(0)
    ours = after["masked", "part"][0].batch_stats["duc"]["g_bn"]["mean"]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


# Dtypes


def dtypes(tree) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_dropout_is_drawn_anew_at_each_step_and_for_each_seed(bfloat16_run):
    seed = bfloat16_run.config.seed
    losses = [bfloat16_run.loss(*drawn) for drawn in ((0, seed), (1, seed), (0, seed + 1))]
    assert len(set(losses)) == 3
    assert bfloat16_run.loss(1, seed) == losses[1]


def test_state_stays_float32_after_ten_bfloat16_steps(bfloat16_run):
    first, last = bfloat16_run.states[0], bfloat16_run.states[-1]
    assert int(last.step) == 10
    for name in ("params", "batch_stats", "ema"):
        assert dtypes(getattr(last, name)) == {"float32"}, name
    assert dtypes(last.opt_state) == {"float32", "int32"}  # momentum; the schedule's step
    assert jax.tree.structure(first) == jax.tree.structure(last)
    for name in ("params", "batch_stats"):
        same = jax.tree.map(np.array_equal, getattr(first, name), getattr(last, name))
        assert not any(jax.tree.leaves(same)), f"{name} that ten steps left as they were: {same}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_compute_dtype(dtype):
    """Activations have the compute dtype; state and logits are never narrower than float32."""
    wide = "float64" if dtype == "float64" else "float32"
    with jax.enable_x64(dtype == "float64"):
        config = tiny_config("", model__dtype=dtype)
        model = segmenter.create(config.model, 5)
        rule = optimizer.create(config.optimizer, 10)
        state = jax.eval_shape(
            lambda: train_step.create_state(
                model,
                rule,
                config,
                dict(model.init(jax.random.key(0), jnp.zeros(IMAGE.shape, jnp.uint8))),
            )
        )
        assert dtypes([state.params, state.batch_stats]) == {wide}
        batch = {"image": IMAGE, "label": jax.ShapeDtypeStruct((1, 64, 64), jnp.uint8)}
        after, metrics = jax.eval_shape(
            train_step.make_train_step(model, rule, config), state, batch, config.seed
        )
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
        assert metrics["loss"].dtype == wide
        activations = []

        def note(call, args, kwargs, context):
            output = call(*args, **kwargs)
            called = context.method_name == "__call__"
            if called and isinstance(context.module, layers.Conv | layers.BatchNorm):
                activations.append(str(output.dtype))
            return output

        with nn.intercept_methods(note):
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            logits = jax.eval_shape(model.apply, variables, IMAGE)
        assert set(activations) == {dtype}
        assert logits.dtype == wide
