"""What each module computes, in float64 with random weights and statistics, against NumPy."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import module_references as references
import numpy as np
import pytest

from duc_dlc_jax.models import duc as duc_lib
from duc_dlc_jax.models import layers, valid_cells
from duc_dlc_jax.models.alternatives.aspp import ASPP
from duc_dlc_jax.models.alternatives.bilinear import Bilinear
from duc_dlc_jax.models.alternatives.ccl import CCL
from duc_dlc_jax.models.alternatives.dense_aspp import DenseASPP
from duc_dlc_jax.models.alternatives.dupsampling import DUpsampling
from duc_dlc_jax.models.alternatives.fcn import FCNHead
from duc_dlc_jax.models.alternatives.guided_filter import GuidedFilter
from duc_dlc_jax.models.alternatives.jpu import JPU
from duc_dlc_jax.models.alternatives.pixel_shuffle import PixelShuffle
from duc_dlc_jax.models.alternatives.psp import PSP
from duc_dlc_jax.models.dlc import DLC
from duc_dlc_jax.models.duc import DUC
from networks import jit, random_variables

CONV = functools.partial(layers.Conv, dtype=jnp.float64)
NORM = functools.partial(layers.BatchNorm, use_running_average=True, dtype=jnp.float64)
DROPOUT = functools.partial(nn.Dropout, deterministic=True)
GRIDS = pytest.mark.parametrize("grid", ["corners", "stride", "half_pixel"])
EXACT = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10)


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in shapes]


def compare(module, reference, *inputs, static=None, **fields):
    """The module's output on the inputs against that of `references`, given its fields."""
    static = static or {}
    with jax.enable_x64(True):
        variables = random_variables(module, *inputs, **static)
        ours = jit(functools.partial(module.apply, **static))(variables, *inputs)
    expected = reference(references.Layers(variables), *inputs, **static, **fields)
    assert ours.dtype == np.float64
    assert expected.std() > 0.05
    EXACT(ours, expected)


# Contexts


@pytest.mark.parametrize(
    ("module", "reference", "fields"),
    [
        (DLC(4, 3, (2, 3), CONV, NORM), references.dlc, {"rates": (2, 3)}),
        (FCNHead(4, CONV, NORM), references.fcn, {}),
        (ASPP(4, (2, 3), CONV, NORM, DROPOUT), references.aspp, {"rates": (2, 3)}),
        (DenseASPP(4, 3, (2, 3), CONV, NORM, DROPOUT), references.dense_aspp, {"rates": (2, 3)}),
        (CCL(4, 3, (2, 3), CONV, NORM), references.ccl, {"rates": (2, 3)}),
        (PSP(4, CONV, NORM), references.psp, {}),
    ],
    ids=["dlc", "fcn", "aspp", "dense_aspp", "ccl", "psp"],
)
def test_contexts(module, reference, fields):
    compare(module, reference, *drawn((2, 7, 8, 8)), **fields)


# Upsamplings


@GRIDS
def test_bilinear(grid):
    module = Bilinear(3, 2, 32, grid, CONV, NORM)
    inputs = drawn((2, 7, 8, 2), (2, 2, 2, 4))
    compare(module, references.bilinear, *inputs, dilation=2, stride=32, grid=grid)


@GRIDS
def test_bilinear_is_duc_with_a_0_and_b_its_features(grid):
    """The control of the ablation: with O = b = I~ DUC's output is the control's."""
    image, middle, low = drawn((2, 50, 63, 3), (2, 7, 8, 2), (2, 2, 2, 4))
    duc, control = duc_of(grid), Bilinear(3, 2, 32, grid, CONV, NORM)
    with jax.enable_x64(True):
        variables = random_variables(duc, image, middle, low)
        shared = {k: {n: tree[n] for n in tree if "low_" in n} for k, tree in variables.items()}
        params, eye = variables["params"], np.eye(3)[None, None]
        params["coefficients_low"] = {"kernel": np.concatenate([0 * eye, eye], -1)}
        params["coefficients_guidance"] = {"kernel": np.zeros((1, 1, 3, 6)), "bias": np.zeros(6)}
        ours = jit(duc.apply)(variables, image, middle, low)
        EXACT(ours, jit(control.apply)(shared, middle, low))


def test_jpu():
    module, strides = JPU(3, (8, 16, 32), "stride", CONV, NORM), (8, 16, 32)
    inputs = drawn((2, 10, 9, 3), (2, 5, 5, 4), (2, 3, 3, 5))
    compare(module, references.jpu, inputs, strides=strides, grid="stride")


def test_guided_filter():
    """With the published radius and epsilon."""
    module, inputs = GuidedFilter(4, CONV), drawn((1, 11, 13, 3), (1, 11, 13, 2))
    compare(module, references.guided_filter, *inputs, radius=4, epsilon=1e-2)


@pytest.mark.parametrize(
    ("module", "reference"),
    [
        (DUpsampling(3, 4, 5, CONV), references.dupsampling),
        (PixelShuffle(3, 4, CONV), references.pixel_shuffle),
    ],
    ids=["dupsampling", "pixel_shuffle"],
)
def test_scores_of_pixels(module, reference):
    compare(module, reference, *drawn((2, 3, 4, 6)), static={"size": (10, 15)})


# DUC


def duc_of(grid, upsampled="features", commute=True, guidance_stride=1, **options):
    return DUC(
        3, 2, 4, 3, guidance_stride, upsampled, commute, 32, grid, conv=CONV, norm=NORM, **options
    )


@pytest.mark.parametrize(
    ("upsampled", "grid", "commute", "guidance_stride"),
    [
        ("features", "corners", True, 2),
        ("features", "stride", False, 1),
        ("features", "half_pixel", True, 1),
        ("coefficients", "corners", True, 1),
        ("coefficients", "stride", True, 2),
        ("output", "stride", True, 1),
        ("output", "half_pixel", True, 2),
    ],
)
def test_duc(upsampled, grid, commute, guidance_stride):
    fields = {"dilation": 2, "stride": 32, "grid": grid, "upsampled": upsampled}
    fields["guidance_stride"] = guidance_stride
    inputs = drawn((2, 50, 63, 3), (2, 7, 8, 2), (2, 2, 2, 4))
    module = duc_of(grid, upsampled, commute, guidance_stride)
    compare(module, references.duc, *inputs, **fields)


@pytest.mark.parametrize(
    ("upsampled", "grid"),
    [("coefficients", "half_pixel"), ("coefficients", "stride"), ("output", "corners")],
)
def test_duc_in_slabs_of_padded_images(upsampled, grid, monkeypatch):
    """As on the image alone, whose valid cells are at the top left; the other numbers are noise."""
    monkeypatch.setattr(duc_lib, "SLAB_BYTES", 2**12)
    padded = drawn((1, 96, 96, 3), (1, 12, 12, 2), (1, 3, 3, 4))
    alone = [x[:, :h, :w] for x, (h, w) in zip(padded, ((50, 63), (7, 8), (2, 2)), strict=True)]
    with jax.enable_x64(True):
        sizes = functools.partial(valid_cells.valid_sizes, jnp.asarray([[50, 63]]), (96, 96))
        conv = functools.partial(CONV, valid_sizes=sizes)
        module = duc_of(grid, upsampled)
        in_slabs = module.clone(slabs=True, valid_sizes=sizes, conv=conv)
        variables = random_variables(module, *alone)
        ours = jit(in_slabs.apply)(variables, *padded)
        EXACT(ours[:, :7, :8], jit(module.apply)(variables, *alone))
