"""Sizes, costs and receptive field of the network: the numbers of docs/network.md."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duc_dlc_jax import config as config_lib
from duc_dlc_jax.models import counts, layers, segmenter
from duc_dlc_jax.models.dlc import DLC
from networks import PARAMETERS, jit, shapes_of

# Parameters and multiply-adds

BACKBONE = {50: 23_508_032, 101: 42_500_160, 152: 58_143_808, 269: 100_024_384}
DEEP = {50: 23_631_808, 101: 42_623_936, 152: 58_267_584, 269: 100_148_160}
WITH_FC = {50: 25_557_032, 101: 44_549_160, 152: 60_192_808, 269: 102_073_384}
GMACS = {50: 18.77, 101: 35.81, 152: 52.86, 269: 91.96}
DEPTHS = pytest.mark.parametrize("depth", list(BACKBONE))


@functools.cache
def network(classes=150, **changes):
    c = config_lib.default()
    c.model.update(changes)
    return segmenter.create(c.model, classes)


@functools.cache
def parameters(classes=150, **changes):
    return counts.parameters(network(classes, **changes))


@functools.cache
def gmacs(**changes):
    """Part -> 1e9 multiply-adds at 480 x 480, to two decimals."""
    macs = counts.macs(network(**changes), 480, 480)
    return {part: round(count / 1e9, 2) for part, count in macs.items()}


@DEPTHS
def test_parameters_of_the_backbone(depth):
    count = parameters(depth=depth)["backbone"]
    assert count == BACKBONE[depth]
    assert count + 2048 * 1000 + 1000 == WITH_FC[depth]


@DEPTHS
def test_parameters_of_the_whole_network(depth):
    parts = parameters(depth=depth)
    assert sum(parts.values()) == PARAMETERS[depth][0]
    for classes, total in zip((59, 19), PARAMETERS[depth][1:], strict=True):
        others = parameters(classes, depth=14)  # the heads do not know the depth
        assert sum(others.values()) - others["backbone"] + parts["backbone"] == total


@DEPTHS
def test_parameters_of_the_deep_stem(depth):
    """Traced at the smallest depth: the stem does not know the depth."""
    more = parameters(depth=14, stem="deep")["backbone"] - parameters(depth=14)["backbone"]
    assert parameters(depth=depth)["backbone"] + more == DEEP[depth]


def test_parameters_of_duc():
    assert parameters(depth=50)["duc"] == 10_788_224
    duc = shapes_of(network(depth=14))["params"]["duc"]
    groups = {
        "g": (4_480, ["g_conv1", "g_bn", "g_conv2"]),
        "stride-4": (295_936, ["guidance_conv", "guidance_bn"]),
        "dilated": (9_438_208, ["low_conv", "low_bn"]),
        "coefficients": (1_049_600, ["coefficients_low", "coefficients_guidance"]),
    }
    assert sorted(duc) == sorted(name for _, names in groups.values() for name in names)
    for group, (expected, names) in groups.items():
        leaves = jax.tree.leaves([duc[name] for name in names])
        assert sum(math.prod(leaf.shape) for leaf in leaves) == expected, group


def test_parameters_of_dlc_with_its_classifier():
    parts = parameters(19, depth=14)
    assert parts["dlc"] + parts["classifier"] == 1_497_107
    dlc = shapes_of(network(depth=14))["params"]["dlc"]
    convolutions = [v for name, v in dlc.items() if "conv" in name]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(convolutions)) == 1_474_560
    assert parts["dlc"] - 1_474_560 == 3_072
    assert parts["classifier"] == 19_475


def test_parameters_of_the_auxiliary_head():
    parts = parameters(depth=14, aux_head=True)
    assert sum(n for part, n in parts.items() if part.startswith("aux_")) == 2_398_358
    assert {name: n for name, n in parts.items() if not name.startswith("aux_")} == parameters(
        depth=14
    )


@DEPTHS
def test_multiply_adds_of_the_backbone(depth):
    assert gmacs(depth=depth)["backbone"] == GMACS[depth]


@pytest.mark.parametrize(("output_stride", "expected"), [(16, 28.50), (8, 87.60)])
def test_multiply_adds_of_the_backbone_at_finer_strides(output_stride, expected):
    assert gmacs(depth=50, output_stride=output_stride)["backbone"] == expected


def test_multiply_adds_of_the_heads():
    heads = {"duc": 9.36, "dlc": 5.31, "classifier": 0.55}
    assert gmacs(depth=50) == {"backbone": 18.77, **heads}
    assert gmacs(depth=14, commute_coefficients=False)["duc"] == 11.13


@pytest.mark.parametrize("upsampled", ["coefficients", "output"])
def test_multiply_adds_of_coefficients_on_the_grid_of_layer4(upsampled):
    """G~'s half runs on 15 x 15 cells in place of 60 x 60; no parameter comes or goes."""
    fields = {"depth": 14, "duc_upsampled": upsampled}
    saved = counts.macs(network(depth=14), 480, 480)["duc"]
    saved -= counts.macs(network(**fields), 480, 480)["duc"]
    assert saved == (60**2 - 15**2) * 512 * 1024
    assert gmacs(**fields)["duc"] == 7.59
    assert parameters(**fields) == parameters(depth=14)


# Receptive field


def measured_fields(rates) -> list[tuple[int, int]]:
    """(height, width) of the input that each stage of DLC's cascade sees from one cell.

    Weights, input and statistics are positive and BN is an affine map, so that every ReLU is
    linear and no contribution cancels: the gradient is non-zero just where a cell is seen.
    """
    reach = sum(rates) + 2
    model = DLC(
        1, 1, rates, layers.Conv, functools.partial(layers.BatchNorm, use_running_average=True)
    )
    x = jnp.ones((1, 2 * reach + 1, 2 * reach + 1, 1))
    variables = shapes_of(model, x)
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables)
    stages = jit(jax.jacrev(lambda x: model.apply(variables, x)[0, reach, reach]))(x)[:, 0, :, :, 0]
    fields = []
    for seen in np.asarray(stages) > 0:
        extent = [np.flatnonzero(seen.any(axis)) for axis in (1, 0)]
        assert all(cells[0] + cells[-1] == 2 * reach for cells in extent)  # centred
        fields.append(tuple(int(cells[-1] - cells[0]) + 1 for cells in extent))
    return fields


def test_receptive_field_formula():
    assert [counts.receptive_field([rate])[0] for rate in (3, 6, 12, 18)] == [7, 13, 25, 37]
    assert counts.receptive_field((3, 6, 12, 18)) == [7, 19, 43, 79]


@pytest.mark.parametrize("rates", [(3, 6, 12, 18), (3, 6, 12, 17)])
def test_receptive_field_measured(rates):
    """Channels of DLC's output: the reduced input, which sees one cell, then each branch."""
    expected = [1, *counts.receptive_field(rates)]
    assert measured_fields(rates) == [(field, field) for field in expected]
