"""Each alternative to DUC and DLC: its published size, its defining property, exact padding.

What each computes: test_module_forward.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import evaluate, grafting, optimizer, protocols, train_step
from duc_dlc_jax.data.labels import label_spec
from duc_dlc_jax.models import counts, layers, registry, resizing, segmenter
from duc_dlc_jax.models.alternatives import guided_filter as gf
from duc_dlc_jax.models.alternatives.aspp import ASPP
from duc_dlc_jax.models.alternatives.ccl import CCL
from duc_dlc_jax.models.alternatives.dense_aspp import DenseASPP
from duc_dlc_jax.models.alternatives.pixel_shuffle import pixel_shuffle
from networks import NARROW, images_of, jit, on_canvas, random_variables, shapes_of
from runs import tiny_config

CONTEXTS, UPSAMPLINGS = config_lib.CHOICES["model.context"], config_lib.CHOICES["model.upsampling"]
SMALL = NARROW | {"context_width": 8, "context_rates": (1, 2, 3), "dupsampling_width": 4}


def no_dropout(rate, name=None, **_):
    return lambda x: x


def modules(dtype=jnp.float32):
    conv = functools.partial(layers.Conv, dtype=dtype)
    return conv, functools.partial(layers.BatchNorm, use_running_average=True, dtype=dtype)


def model(classes, **changes):
    c = config_lib.default()
    c.model.update(changes)
    config_lib.validate(c)
    return segmenter.create(c.model, classes)


# Parameters


@pytest.mark.parametrize(("depth", "expected"), [(50, 42_004_074), (101, 60_996_202)])
def test_parameters_of_torchvisions_deeplabv3(depth, expected):
    """With its auxiliary head, 21 classes."""
    fields = {"upsampling": "none", "context": "aspp", "output_stride": 8, "aux_head": True}
    assert sum(counts.parameters(model(21, depth=depth, **fields)).values()) == expected


@pytest.mark.parametrize(("depth", "expected"), [(50, 35_322_218), (101, 54_314_346)])
def test_parameters_of_torchvisions_fcn(depth, expected):
    fields = {"upsampling": "none", "context": "fcn", "output_stride": 8, "aux_head": True}
    assert sum(counts.parameters(model(21, depth=depth, **fields)).values()) == expected


def test_parameters_of_dense_aspp_on_densenet_161():
    """With the 19-class classifier on its 1,744 channels."""
    module = DenseASPP(512, 128, (3, 6, 12, 18, 24), *modules(), no_dropout)
    shapes = shapes_of(module, jax.ShapeDtypeStruct((1, 8, 8, 1104), jnp.float32))["params"]
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count + (1104 + 5 * 128 + 1) * 19 == 6_483_587


@pytest.mark.parametrize(
    ("fields", "part", "expected"),
    [
        # bins: 2048 x 512 and BN each; 3x3 on 4096 channels and BN
        ({"context": "psp"}, "psp", 4 * (2048 * 512 + 1024) + 9 * 4096 * 512 + 1024),
        # 3x3 of 512, 1024 and 2048 channels; depthwise 3x3, BN, 1x1 and BN of 1,536 channels
        (
            {"upsampling": "jpu"},
            "jpu",
            9 * 512 * 3584 + 3 * 1024 + 4 * (9 * 1536 + 3072 + 1536 * 512 + 1024),
        ),
        ({"upsampling": "bilinear"}, "bilinear", 9 * 2048 * 512 + 1024),
        # 3x3 to the classes of 32 x 32 pixels
        ({"upsampling": "pixel_shuffle"}, "pixel_shuffle", (9 * 2048 + 1) * 1024 * 11),
        ({"upsampling": "dupsampling"}, "dupsampling", 2049 * 64 + 64 * 32 * 32 * 11 + 1),
        ({"upsampling": "guided_filter"}, "guided_filter", 4 * 64 + 65 * 11),
        ({"context": "ccl"}, "ccl", 512 * 2050 + 9 * 2 * 128 * (512 + 3 * 128) + 8 * 256),
    ],
)
def test_parameters_of_parts(fields, part, expected):
    parts = counts.parameters(
        model(11, depth=14, **{"upsampling": "none", "context": "none"} | fields)
    )
    assert parts[part] == expected
    assert set(parts) <= {"backbone", "classifier", part}


def test_multiply_adds_count_the_groups_of_a_depthwise_convolution():
    parts = counts.macs(
        model(5, depth=14, width=4, upsampling="jpu", duc_width=8, context="none"), 64, 64
    )
    features = 8 * 8 * 32 + 4 * 4 * 64 + 2 * 2 * 128
    separable = 4 * 8 * 8 * (9 * 24 + 24 * 8)
    assert parts["jpu"] == 9 * 8 * features + separable


# What each does


def test_depthwise_convolution_equals_a_convolution_per_channel():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel = (
            jnp.asarray(rng.normal(size=(2, 7, 6, 3))),
            jnp.asarray(rng.normal(size=(3, 3, 1, 3))),
        )
        grouped = layers.Conv(3, 3, 1, 2, 3, dtype=jnp.float64).apply(
            {"params": {"kernel": kernel}}, x
        )
        plain = layers.Conv(1, 3, 1, 2, dtype=jnp.float64)
        for c in range(3):
            one = plain.apply({"params": {"kernel": kernel[..., c : c + 1]}}, x[..., c : c + 1])
            np.testing.assert_allclose(grouped[..., c], one[..., 0], rtol=0, atol=1e-12)


def test_pixel_shuffle_is_the_rearrangement():
    x = jnp.arange(2 * 3 * 2 * 12).reshape(2, 3, 2, 12)
    y = np.asarray(pixel_shuffle(x, 2))
    assert y.shape == (2, 6, 4, 3)
    for i in range(6):
        for j in range(4):
            first = ((i % 2) * 2 + j % 2) * 3
            np.testing.assert_array_equal(y[:, i, j], x[:, i // 2, j // 2, first : first + 3])


def box_mean(x, mask, radius):
    """Mean over the masked pixels of the box around each pixel, as loops; x [H, W]."""
    result = np.zeros(x.shape)
    for i, j in np.ndindex(x.shape):
        box = np.s_[max(i - radius, 0) : i + radius + 1, max(j - radius, 0) : j + radius + 1]
        result[i, j] = x[box][mask[box]].sum() / max(mask[box].sum(), 1)
    return result


@pytest.mark.parametrize("valid", [(9, 11), (6, 8)])
def test_guided_filter_equals_its_formula(valid):
    """He et al., 2013, eq. 5, 6 and 8; pixels outside the mask enter no box."""
    rng, size, radius, epsilon = np.random.default_rng(0), (9, 11), 2, 0.1
    guide, x = rng.normal(size=(2, *size))
    mask = np.zeros(size, bool)
    mask[: valid[0], : valid[1]] = True
    mean = functools.partial(box_mean, mask=mask, radius=radius)
    variance = mean(guide**2) - mean(guide) ** 2
    a = (mean(guide * x) - mean(guide) * mean(x)) / (variance + epsilon)
    expected = mean(a) * guide + mean(mean(x) - a * mean(guide))
    with jax.enable_x64(True):
        full = [jnp.asarray(v)[None, :, :, None] for v in (guide, x, mask)]
        filtered = jit(gf.guided_filter, static_argnums=(3, 4))(*full, radius, epsilon)
        ours = np.asarray(filtered)[0, ..., 0]
    np.testing.assert_allclose(ours[mask.nonzero()], expected[mask.nonzero()], rtol=0, atol=1e-12)


def test_guided_filter_keeps_scores_that_are_linear_in_the_guide():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        guide, mask = jnp.asarray(rng.normal(size=(1, 12, 12, 2))), jnp.ones((1, 12, 12, 1), bool)
        scores = 3 * guide - 1
        ours = jit(gf.guided_filter, static_argnums=(3, 4))(guide, scores, mask, 4, 1e-12)
    np.testing.assert_allclose(ours, scores, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("module", "first", "expected"),
    [
        (lambda *parts: CCL(1, 1, (3, 6, 12, 18), *parts), 1, (7, 15, 29, 43)),
        (lambda *parts: DenseASPP(1, 1, (3, 6, 12), *parts, no_dropout), 1, (7, 19, 43)),
    ],
    ids=["ccl", "dense_aspp"],
)
def test_receptive_fields(module, first, expected):
    """Of each branch, from the non-zero gradient of one cell; all weights are positive."""
    module, reach = module(*modules()), 30
    x = jnp.ones((1, 1, 2 * reach + 1, 1)) + jnp.zeros((1, 2 * reach + 1, 1, 1))
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes_of(module, x))
    # Contexts are weighed down: ReLU(local - context) then stays linear.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 1e-3 * leaf if "context" in str(path) else leaf, variables["params"]
    )
    apply = jit(
        jax.jacrev(lambda x: module.apply(variables | {"params": params}, x)[0, reach, reach])
    )
    seen = np.asarray(apply(x))[first:, 0, :, :, 0] != 0
    for support, field in zip(seen, expected, strict=True):
        cells = [np.flatnonzero(support.any(axis)) for axis in (0, 1)]
        assert [int(c[-1] - c[0]) + 1 for c in cells] == [field, field]


@pytest.mark.parametrize(
    ("output_stride", "upsampling", "rates"),
    [
        (8, "none", (12, 24, 36)),
        (16, "none", (6, 12, 18)),
        (32, "none", (3, 6, 9)),
        (32, "duc", (12, 24, 36)),
    ],
)
def test_rates_of_aspp_follow_the_grid(output_stride, upsampling, rates):
    net = model(5, depth=14, context="aspp", upsampling=upsampling, output_stride=output_stride)
    module = registry.context(net, None, None, None, None)
    assert isinstance(module, ASPP)
    assert module.rates == rates


@pytest.mark.parametrize(
    ("context", "rates"), [("dense_aspp", (3, 6, 12, 18, 24)), ("ccl", (3, 6, 12, 18))]
)
def test_rates_are_the_published_ones(context, rates):
    module = registry.context(model(5, depth=14, context=context), None, None, None, None)
    assert module.rates == rates


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ("aspp", [(0.5, ())]),
        ("dense_aspp", [(0.1, (1, 2))] * 4),  # of each branch and before the classifier
        ("dlc", [(0.1, (1, 2))]),
    ],
)
def test_dropouts_are_the_published_ones(context, expected):
    """Rate and axes that share a draw, of single values or of whole channels."""
    found = []

    def note(call, args, kwargs, at):
        if isinstance(at.module, nn.Dropout):
            found.append((at.module.rate, tuple(at.module.broadcast_dims)))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes_of(model(5, **SMALL, context=context))
    assert found == expected


# In the network

COMBINATIONS = [  # every module once
    ("none", "none"),
    ("bilinear", "fcn"),
    ("pixel_shuffle", "ccl"),
    ("jpu", "aspp"),
    ("guided_filter", "psp"),
    ("dupsampling", "dense_aspp"),
]
assert {u for u, _ in COMBINATIONS} | {"duc"} == set(UPSAMPLINGS)
assert {c for _, c in COMBINATIONS} | {"dlc"} == set(CONTEXTS)


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_pair_has_its_grids(context):
    """Traced at an output stride of 16; the logits' grid without and with the last resize."""
    upsamplings = UPSAMPLINGS if context == "dlc" else ("duc", "none")
    for upsampling in upsamplings:
        net = model(5, upsampling=upsampling, context=context, **SMALL, output_stride=16)
        image = jax.ShapeDtypeStruct((1, 50, 67, 3), jnp.uint8)
        logits, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), image)
        assert logits.shape == (1, 50, 67, 5)
        coarse = jax.eval_shape(functools.partial(net.apply, coarse=True), variables, image)
        assert coarse.shape[1:3] == tuple(-(-n // net.logit_stride) for n in (50, 67))


@pytest.mark.parametrize(
    ("upsampling", "context", "grid"),
    [(*pair, ("corners", "stride")[i % 2]) for i, pair in enumerate(COMBINATIONS)]
    + [("none", "none", "stride"), ("jpu", "none", "corners")],
)
def test_padding_changes_nothing_on_the_way_to_the_label(upsampling, context, grid):
    """Logits of the padded image read as the protocol reads them: those of the image alone."""
    size, padded = (39, 61), (64, 72)
    (image,) = images_of(size)
    with jax.enable_x64(True):
        fields = {"upsampling": upsampling, "context": context, "resize_grid": grid}
        net = model(3, **SMALL, **fields, dtype="float64")
        variables = random_variables(net)
        expected = jit(net.apply)(variables, image[None])[0]
        coarse = jit(functools.partial(net.apply, coarse=True))
        logits = coarse(variables, on_canvas([image], padded), valid=np.array([size], np.int32))
    protocol = protocols.Protocol(grid=grid, pad_sides=(64, 72), logit_stride=net.logit_stride)
    for axis, (n, m) in enumerate(zip(size, padded, strict=True), 1):
        position, _ = protocols.Axis(protocol, n, n).reads(1, m)
        low = np.floor(position[:, 0, 0]).astype(np.int32)
        with jax.enable_x64(True):
            logits = resizing.interpolate(logits, low, position[:, 0, 0] - low, axis)
    np.testing.assert_allclose(logits[0, : size[0], : size[1]], expected, rtol=0, atol=1e-10)


@pytest.mark.parity
@pytest.mark.parametrize(("upsampling", "context"), COMBINATIONS)
def test_a_training_step_moves_every_parameter(upsampling, context):
    changes = {f"model__{k}": v for k, v in SMALL.items()}
    config = tiny_config(
        "", **changes, model__upsampling=upsampling, model__context=context, model__dropout=0.0
    )
    net = segmenter.create(config.model, 3)
    rule = optimizer.create(config.optimizer, 10)
    before = train_step.create_state(net, rule, config, random_variables(net))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 64, 64, 3), np.uint8),
        "label": rng.integers(0, 3, (4, 64, 64)).astype(np.uint8),
    }
    after, metrics = jit(train_step.make_train_step(net, rule, config))(before, batch, 0)
    assert np.isfinite(metrics["loss"])
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before.params),
        jax.tree.leaves(after.params),
        strict=True,
    ):
        assert np.isfinite(new).all(), path
        assert np.abs(np.asarray(new) - np.asarray(old)).max() > 0, path


def test_evaluation_at_the_pixels_grid_equals_the_argmax_of_the_logits():
    """None has logits at 1/32, dupsampling at the pixels."""
    (image,) = images_of((45, 70))
    example = {"image": image, "label": np.zeros(image.shape[:2], np.uint8), "name": ""}
    for upsampling in ("none", "dupsampling"):
        net = model(11, **SMALL, upsampling=upsampling, context="none")
        variables = random_variables(net)
        evaluator = evaluate.Evaluator(net, label_spec("camvid"))
        (seen,) = evaluator.predictions(variables, [example])
        expected = np.asarray(jit(net.apply)(variables, image[None])[0].argmax(-1))
        assert (seen["prediction"] == expected).mean() > 0.999


@pytest.mark.parametrize("upsampling", registry.CLASSIFYING)
def test_weights_that_mix_classes_are_taken_for_the_same_classes_alone(upsampling):
    specs = [label_spec(name) for name in ("camvid", "scenes")]
    fields = SMALL | {"upsampling": upsampling, "context": "none", "output_stride": 8}
    trained, fresh = (random_variables(model(spec.num_classes, **fields)) for spec in specs)
    drawn = grafting.graft(fresh, trained, *specs).drawn
    assert {path.split("/")[1] for path in drawn} == {upsampling}
    assert not grafting.graft(trained, trained, specs[0], specs[0]).drawn
