"""The compiled loss and its gradient, in the ways of CPUs, GPUs and TPUs: size and growth, counted.

All three are compiled for this CPU. As in `test_program.py` the margin is a tenth, and faults that
are planted show what is noticed.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duc_dlc_jax import losses, pixel_scores, programs

SIDES, CLASSES, MARGIN = (256, 512), 150, 0.1
COSTS = {  # of one image of 512x512: GFLOP, GB moved, MB of temporaries
    "bands": (2.46, 1.51, 36.6),
    "taps": (1.81, 0.415, 14.7),
    "grid": (15.7, 1.81, 36.6),
}
# Exponents of FLOPs and bytes over the pixels. `grid` multiplies with all columns of the grid, and
# a TPU's program is the better for it (docs/performance.md, "Growth").
GROWTH = {"bands": (1.05, 1.05), "taps": (1.05, 1.05), "grid": (1.5, 1.1)}


def compiled_loss(way: str, side: int) -> Any:
    """Value and gradient from logits on the 1/8 grid, its rows in slabs."""

    def loss(logits, labels):
        how = (), "corners", 8, jnp.dtype("bfloat16"), 1, way
        scores: Any = pixel_scores.pixel_scores(logits, labels, *how)
        return losses.mean(*losses.sums(scores, labels))

    logits = jax.ShapeDtypeStruct((1, side // 8, side // 8, CLASSES), jnp.float32)
    labels = jax.ShapeDtypeStruct((1, side, side), jnp.uint8)
    program = jax.jit(jax.value_and_grad(loss)).lower(logits, labels)
    return program.compile(programs.QUICK_CPU)


def costs(program: Any) -> tuple[float, float, float]:
    """GFLOP, GB moved, MB of temporaries."""
    flops, moved = programs.cost(program)
    return flops / 1e9, moved / 1e9, program.memory_analysis().temp_size_in_bytes / 1e6


def largest(program: Any) -> int:
    """Numbers in the largest array."""
    found = programs.arrays(program.as_text())
    return max(math.prod(shape) for _, shape in found)


def growth(small: Any, large: Any) -> np.ndarray:
    """Exponents of FLOPs and bytes over the pixels."""
    ratio = np.divide(costs(large), costs(small))[:2]
    return np.log(ratio) / np.log((SIDES[1] / SIDES[0]) ** 2)


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[Any]]:
    """Of each way the programs of both `SIDES`."""
    return {way: [compiled_loss(way, side) for side in SIDES] for way in pixel_scores.WAYS}


@pytest.mark.parametrize("way", pixel_scores.WAYS)
def test_the_loss_costs_what_it_did_and_holds_no_logits_of_all_pixels(way, compiled):
    program = compiled[way][1]
    print(costs(program), largest(program))
    assert costs(program) == pytest.approx(COSTS[way], rel=MARGIN)
    assert largest(program) < SIDES[1] ** 2 * CLASSES / 4


@pytest.mark.parametrize("way", pixel_scores.WAYS)
def test_the_loss_grows_as_the_pixels_do(way, compiled):
    found = growth(*compiled[way])
    print(found)
    assert all(found <= GROWTH[way])


def test_a_cpu_takes_bands(compiled):
    assert costs(compiled_loss("", SIDES[1])) == pytest.approx(costs(compiled["bands"][1]))


def test_planted_fault_another_way_on_this_cpu(compiled, monkeypatch):
    monkeypatch.setattr(pixel_scores, "_by_platform", lambda f, _, __, *x: f("grid", *x))
    assert costs(compiled_loss("", SIDES[1]))[0] > 2 * costs(compiled["bands"][1])[0]


@pytest.mark.parametrize("way", pixel_scores.WAYS)
def test_planted_fault_all_logits_at_once(way, monkeypatch):
    monkeypatch.setattr(pixel_scores, "SLAB_BYTES", 2**40)
    program = compiled_loss(way, SIDES[0])
    assert largest(program) >= SIDES[0] ** 2 * CLASSES


@pytest.mark.parametrize("way", pixel_scores.WAYS)
def test_planted_fault_slabs_multiply_all_rows_of_the_grid(way, monkeypatch):
    """Of `grid` the columns' work hides it, and the bytes tell."""

    def whole(matrix, parts):
        size = -(-len(matrix) // parts)
        matrix = np.pad(matrix, ((0, parts * size - len(matrix)), (0, 0)))
        return matrix.reshape(parts, size, -1), np.zeros(parts, int)

    monkeypatch.setattr(pixel_scores, "_banded", whole)
    found = growth(*(compiled_loss(way, side) for side in SIDES))
    print(found)
    assert any(found > GROWTH[way])
