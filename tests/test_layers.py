"""Convolution, pooling, normalisation and resizing against plain formulas."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duc_dlc_jax.models import layers, resizing, valid_cells

# Initial weights


def test_initial_weights_have_their_published_variances():
    """He et al. by the outputs; and 1 / (3 fan), of PyTorch's uniform in +-1 / sqrt(fan)."""
    shape, rng = (3, 3, 64, 128), np.random.default_rng(0)
    fans = ((layers.backbone_init, 9 * 128 / 2), (layers.head_init, 9 * 64 * 3))
    for init, inverse in fans:
        drawn = init.draw(rng, shape)
        assert drawn.mean() == pytest.approx(0, abs=1e-3)
        assert drawn.var() == pytest.approx(1 / inverse, rel=0.02)


# Resizing


def sampled(x, size, position):
    """x [h, w] at (position(0, i), position(1, j)), bilinear, written as loops."""
    result = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            y, z = position(0, i), position(1, j)
            top, left = min(int(y), x.shape[0] - 1), min(int(z), x.shape[1] - 1)
            for row, weight_row in ((top, 1 - (y - top)), (top + 1, y - top)):
                for column, weight in ((left, 1 - (z - left)), (left + 1, z - left)):
                    if weight_row * weight > 0:
                        result[i, j] += weight_row * weight * x[row, column]
    return result


@pytest.mark.parametrize(
    ("source", "size", "step"), [((2, 3), (7, 9), 0.25), ((8, 7), (4, 4), 2), ((5, 1), (9, 3), 0.5)]
)
@pytest.mark.parametrize("grid", ["corners", "stride", "half_pixel"])
def test_resize_equals_its_formula(grid, source, size, step):
    x = np.random.default_rng(0).normal(size=source)

    def position(axis, index):
        if grid == "corners":  # ends on ends
            return index * (source[axis] - 1) / (size[axis] - 1)
        if grid == "half_pixel":  # outer edges on outer edges
            middle = (index + 0.5) * source[axis] / size[axis] - 0.5
            return min(max(middle, 0), source[axis] - 1)
        return min(index * step, source[axis] - 1)

    with jax.enable_x64(True):
        both = jnp.stack([jnp.asarray(x), 2 * jnp.asarray(x)], -1)[None]
        ours = np.asarray(resizing.resize_bilinear(both, size, grid, step))
    expected = sampled(x, size, position)
    np.testing.assert_allclose(ours[0, ..., 0], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours[0, ..., 1], 2 * expected, rtol=0, atol=1e-12)


def test_stride_grid_clamps_to_the_last_cell():
    matrix = resizing.interpolation_matrix(3, 6, "stride", 0.5)
    np.testing.assert_array_equal(matrix @ [0, 10, 20], [0, 5, 10, 15, 20, 20])
    np.testing.assert_array_equal(resizing.interpolation_matrix(6, 3, "stride", 2), np.eye(6)[::2])


def shifts(size, grid) -> dict[str, np.ndarray]:
    """Pixels by which each resize of the network moves its input along one axis.

    Cell i of a strided convolution lies on pixel stride * i: resizing these positions and comparing
    them with the target's own positions gives the shift.
    """
    cells = {stride: -(-size // stride) for stride in (1, 4, 8, 32)}
    resizes = {"low": (32, 8), "guidance": (4, 8), "logits": (8, 1)}
    result = {}
    for name, (source, target) in resizes.items():
        positions = source * np.arange(cells[source])
        args = cells[source], cells[target], grid, target / source
        moved = resizing.interpolation_matrix(*args) @ positions
        result[name] = np.abs(target * np.arange(cells[target]) - moved)
    return result


@pytest.mark.parametrize("size", [33, 65, 481])
def test_grids_agree_at_multiples_of_32_plus_1(size):
    for grid in ("corners", "stride"):
        for name, shift in shifts(size, grid).items():
            assert shift.max() < 1e-9, (grid, name)


def test_corners_moves_features_at_480():
    moved = shifts(480, "corners")
    assert moved["low"][0] == 0
    assert moved["low"][-1] == 24
    assert moved["low"][29:31].mean() == pytest.approx(12)
    assert moved["guidance"].max() == pytest.approx(4)
    assert moved["logits"].max() == pytest.approx(7)
    assert all(np.all(np.diff(shift) > 0) for shift in moved.values())


def test_stride_grid_moves_nothing_but_the_clamped_border_at_480():
    moved = shifts(480, "stride")
    assert moved["low"][: 14 * 4 + 1].max() == 0  # the last cell of I_l lies on pixel 448
    assert moved["low"][57:].tolist() == [8, 16, 24]
    assert moved["guidance"].max() == 0
    assert moved["logits"][: 59 * 8 + 1].max() == 0
    assert moved["logits"].max() == 7


# Convolution and pooling


def convolution(x, kernel, stride, dilation):
    """x [B, H, W, C], kernel [k, k, C, F] -> as PyTorch's Conv2d with padding d (k - 1) / 2."""
    k = len(kernel)
    pad = dilation * (k - 1) // 2
    rows, columns = ((n - 1) // stride + 1 for n in x.shape[1:3])
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for r in range(rows):
        for c in range(columns):
            top, left = r * stride, c * stride
            for i in range(k):
                for j in range(k):
                    y[:, r, c] += x[:, top + i * dilation, left + j * dilation] @ kernel[i, j]
    return y


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [(1, 2, 1), (3, 2, 1), (7, 2, 1), (3, 1, 2), (5, 4, 1), (3, 4, 1)],
)
def test_convolution_pads_symmetrically(kernel, stride, dilation):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 6, 3))
    weight = rng.normal(size=(kernel, kernel, 3, 4))
    with jax.enable_x64(True):
        model = layers.Conv(4, kernel, stride, dilation, dtype=jnp.float64)
        ours = np.asarray(model.apply({"params": {"kernel": weight}}, x))
        same = jax.lax.conv_general_dilated(
            x, weight, (stride, stride), "SAME", rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
    expected = convolution(x, weight, stride, dilation)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
    differs = np.abs(np.asarray(same) - expected).max() > 0.1
    assert differs == (stride > 1 and kernel > 1)  # even sizes: SAME pads the end alone


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 6)])
def test_max_pool_equals_flax(size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32))

    def flax_pool(x):
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    results = []
    for pool in (layers.max_pool, flax_pool):
        y, back = jax.vjp(pool, x)
        weights = np.arange(1, y.size + 1, dtype=np.float32).reshape(y.shape)
        results.append((y, back(jnp.asarray(weights))[0]))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_max_pool_gives_the_gradient_of_ties_to_the_first():
    """After a ReLU most windows tie at 0: PyTorch takes the first in row order."""
    x = np.random.default_rng(0).integers(0, 2, (1, 8, 7, 1)).astype(np.float32)
    expected = np.zeros_like(x)
    for r in range(0, 8, 2):
        for c in range(0, 7, 2):
            cells = [(i, j) for i in (r - 1, r, r + 1) for j in (c - 1, c, c + 1)]
            cells = [(i, j) for i, j in cells if 0 <= i < 8 and 0 <= j < 7]
            first = max(cells, key=lambda cell: x[0, *cell, 0])  # the first of equals
            expected[0, *first, 0] += 1
    gradient = jax.grad(lambda x: layers.max_pool(x).sum())(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, expected)


# Batch normalisation


def batch_norm(x, **fields):
    """(output, running mean, running variance) of one training call from scale, bias, 0 and 1."""
    wide = layers.parameter_dtype(fields.get("dtype", jnp.float32))
    channels = x.shape[-1]
    params = {"scale": np.linspace(0.5, 2, channels), "bias": np.linspace(-1, 1, channels)}
    params = {name: jnp.asarray(value, wide) for name, value in params.items()}
    stats = {"mean": jnp.zeros(channels, wide), "var": jnp.ones(channels, wide)}
    variables = {"params": params, "batch_stats": stats}
    y, updated = layers.BatchNorm(**fields).apply(variables, x, mutable=["batch_stats"])
    stats = updated["batch_stats"]
    return y, stats["mean"], stats["var"]


@pytest.mark.parametrize("running_variance", ["biased", "unbiased"])
@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_equals_its_formula(groups, running_variance):
    """Each group is normalised by its own statistics; the running ones are the whole batch's."""
    x = np.random.default_rng(0).normal(2, 3, size=(4, 3, 5, 3))
    x[:2] += 5  # the groups' means differ
    with jax.enable_x64(True):
        y, mean, var = batch_norm(
            jnp.asarray(x), groups=groups, running_variance=running_variance, dtype=jnp.float64
        )
    parts = np.split(x, groups)
    centred = [part - part.mean((0, 1, 2)) for part in parts]
    normal = np.concatenate([c / np.sqrt(c.var((0, 1, 2)) + 1e-5) for c in centred])
    np.testing.assert_allclose(
        y, normal * np.linspace(0.5, 2, 3) + np.linspace(-1, 1, 3), atol=1e-12
    )
    np.testing.assert_allclose(mean, 0.1 * x.mean((0, 1, 2)), atol=1e-12)
    expected = x.var((0, 1, 2))
    if running_variance == "unbiased":
        n = parts[0][..., 0].size
        within = np.mean([part.var((0, 1, 2)) for part in parts], axis=0)
        expected = expected + within / (n - 1)
    np.testing.assert_allclose(var, 0.9 + 0.1 * expected, rtol=1e-12)
    if groups == 2:  # the groups' variances alone would miss the distance of their means
        within = np.mean([part.var((0, 1, 2)) for part in parts], axis=0)
        assert np.abs(0.9 + 0.1 * within - np.asarray(var)).min() > 0.1


def test_frozen_batch_norm_uses_and_keeps_the_running_statistics():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (2, 3, 3, 4)).astype(np.float32))
    y, mean, var = batch_norm(x, use_running_average=True)
    expected = np.asarray(x) / np.sqrt(1 + 1e-5) * np.linspace(0.5, 2, 4) + np.linspace(-1, 1, 4)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(mean, np.zeros(4))
    np.testing.assert_array_equal(var, np.ones(4))


def test_statistics_are_float32_under_bfloat16():
    """bfloat16 could not tell a variance of 1 around a mean of 16: its squares are 1 or 2 apart."""
    x = jnp.asarray(np.random.default_rng(0).normal(16, 1, (4, 16, 16, 2)), jnp.bfloat16)
    y, mean, var = batch_norm(x, dtype=jnp.bfloat16)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, 0.1 * exact.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(var, 0.9 + 0.1 * exact.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize("size", [(480, 481), (33, 97), (50, 63), (20, 7)])
@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16, 32])
def test_valid_cells_lie_on_valid_pixels(stride, size):
    """Cell (i, j) of a grid of stride s lies on the pixel (s i, s j)."""
    valid = np.array([size, (1, 1), (size[0] // 2, size[1]), (17, 5)], np.int32)
    rows, columns = (np.arange(n)[None] < valid[:, axis, None] for axis, n in enumerate(size))
    expected = (rows[:, :, None, None] & columns[:, None, :, None])[:, ::stride, ::stride]
    sizes = valid_cells.valid_sizes(jnp.asarray(valid), size, expected.shape[1:3])
    cells = valid_cells.cells_within(sizes, expected.shape[1:3])
    np.testing.assert_array_equal(cells, expected)


def padded(padding, valid=((13, 18), (24, 7))):
    """Two images [2, 6, 8, 3] at 1/4 of 24 x 32 pixels, and the fields that mask their padding.

    Of `valid` pixels are 4 x 5 and 6 x 2 cells valid; the others have the value `padding`.
    """
    x = np.random.default_rng(0).normal(2, 3, size=(2, 6, 8, 3))
    x[0] += 5
    for image, (height, width) in zip(x, valid, strict=True):
        image[-(-height // 4) :] = padding
        image[:, -(-width // 4) :] = padding
    sizes = jnp.asarray(valid, jnp.int32)
    masked = {"valid_sizes": functools.partial(valid_cells.valid_sizes, sizes, (24, 32))}
    return x, masked | {"dtype": x.dtype}


@pytest.mark.parametrize("running_variance", ["biased", "unbiased"])
@pytest.mark.parametrize("groups", [1, 2])
def test_masked_statistics_are_those_of_the_unpadded_images(groups, running_variance):
    """The running ones are those of all valid cells, of which the groups have unequal numbers."""
    with jax.enable_x64(True):
        x, masked = padded(100.0)
        fields = {"groups": groups, "running_variance": running_variance}
        y, mean, var = batch_norm(jnp.asarray(x), **fields, **masked)
    cells = [a.reshape(-1, 3) for a in (x[0, :4, :5], x[1, :6, :2])]
    parts = cells if groups == 2 else [np.concatenate(cells)]
    normal = np.concatenate([(p - p.mean(0)) / np.sqrt(p.var(0) + 1e-5) for p in parts])
    expected = normal * np.linspace(0.5, 2, 3) + np.linspace(-1, 1, 3)
    ours = np.concatenate([a.reshape(-1, 3) for a in (y[0, :4, :5], y[1, :6, :2])])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
    every = np.concatenate(cells)
    np.testing.assert_allclose(mean, 0.1 * every.mean(0), rtol=0, atol=1e-12)
    expected = every.var(0)
    if running_variance == "unbiased":
        expected += sum(len(p) / len(every) * p.var(0) / (len(p) - 1) for p in parts)
    np.testing.assert_allclose(var, 0.9 + 0.1 * expected, rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [-1e6, np.nan])
def test_padded_values_do_not_reach_masked_statistics(padding, groups):
    with jax.enable_x64(True):
        results = []
        for value in (0.0, padding):
            x, masked = padded(value)
            y, *running = batch_norm(jnp.asarray(x), groups=groups, **masked)
            results.append([y[0, :4, :5], y[1, :6, :2], *running])
        for one, other in zip(*results, strict=True):
            np.testing.assert_array_equal(one, other)
        if np.isfinite(padding):  # the padded cells are normalised too, by the same statistics
            assert np.abs(y[0, 4:]).min() > 1e4


@pytest.mark.parametrize("running_variance", ["biased", "unbiased"])
def test_masked_groups_with_one_valid_cell_or_none_are_finite(running_variance):
    with jax.enable_x64(True):
        x, masked = padded(3.0, valid=((4, 3), (0, 32)))
        x[1] += np.arange(6)[:, None, None]
        x = jnp.asarray(x)
        fields = {"groups": 2, "running_variance": running_variance}
        y, mean, var = batch_norm(x, **fields, **masked)
        plain, *_ = batch_norm(x, **fields, dtype=x.dtype)
    np.testing.assert_allclose(y[0, 0, 0], np.linspace(-1, 1, 3), atol=1e-12)  # the bias
    np.testing.assert_allclose(y[1], plain[1], rtol=0, atol=1e-12)  # counts all its cells
    assert all(np.isfinite(value).all() for value in (y, mean, var))


# Input


def test_normalisation_constants():
    pixels = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 51]], np.uint8)[None, None]
    ours = np.asarray(layers.normalize(jnp.asarray(pixels), jnp.float32))[0, 0]
    black = [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    white = [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]
    mixed = [white[0], black[1], (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(ours, [black, white, mixed], rtol=1e-6)
    floats = jnp.asarray([[[[1.5, -2.0, 0.25]]]])
    np.testing.assert_array_equal(layers.normalize(floats, jnp.float32), floats)


@pytest.mark.parametrize(
    ("k", "stride", "dilation"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 3)]
)
def test_every_way_to_the_kernels_gradient_gives_the_same(k, stride, dilation):
    """31 x 30 cells: enough for a CPU's default to be `taps` at 1x1."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel = (jnp.asarray(rng.normal(size=s)) for s in ((2, 31, 30, 5), (k, k, 5, 7)))
        dy = jnp.asarray(rng.normal(size=(2, -(-31 // stride), -(-30 // stride), 7)))

        def gradients(way):
            def loss(x, kernel):
                return (layers.convolve(x, kernel, stride, dilation, 1, way) * dy).sum()

            return jax.grad(loss, (0, 1))(x, kernel)

        plain = gradients("compiler")
        for way in ("taps", "columns", ""):
            for expected, found in zip(plain, gradients(way), strict=True):
                scale = np.abs(expected).max()
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * scale)
