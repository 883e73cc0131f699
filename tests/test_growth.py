"""How the training step's cost grows, from compiled programs; and how their loops are counted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duc_dlc_jax import pixel_scores, programs
from duc_dlc_jax.benchmark import growth
from duc_dlc_jax.collectives import collectives, totals
from networks import NARROW
from runs import tiny_config


def test_loops_count_as_often_as_they_run():
    """Three products in a loop of five turns, beside one."""

    def several(x, y):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ y), None), x, None, length=5)
        return x @ y

    x = jnp.ones((32, 64)), jnp.ones((64, 64))
    compiled = jax.jit(several).lower(*x).compile()
    entry, found = programs.computations(compiled.as_text())
    assert 5 in programs.runs(entry, found).values()
    product = 2 * 32 * 64 * 64
    assert programs.repeated(compiled.as_text())[0] == 4 * product
    flops, moved = programs.cost(compiled)
    assert 6 * product <= flops < 6.2 * product
    assert moved >= 6 * 4 * (64 * 64 + 2 * 32 * 64)


IN_PLACE = """
%fused (total: f32[8,4], part: f32[2,4], row: s32[]) -> f32[8,4] {
  %total = f32[8,4]{1,0} parameter(0)
  %part = f32[2,4]{1,0} parameter(1)
  %row = s32[] parameter(2)
  %old = f32[2,4]{1,0} dynamic-slice(%total, %row, %row), dynamic_slice_sizes={2,4}
  %new = f32[2,4]{1,0} add(%old, %part)
  ROOT %updated = f32[8,4]{1,0} dynamic-update-slice(%total, %new, %row, %row)
}

ENTRY %main (x: f32[8,4], y: f32[2,4], i: s32[]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[2,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %sum = f32[8,4]{1,0} fusion(%x, %y, %i), kind=kLoop, calls=%fused
}
"""


def test_a_slice_that_is_added_to_in_place_moves_as_a_slice():
    """The slice read, what is added, its index, and the slice written."""
    entry, found = programs.computations(IN_PLACE)
    assert programs._moved(found[entry]["sum"], found[entry], found) == 3 * 4 * 2 * 4 + 4


TPU = """
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %a = f32[8,4]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1},{2,3}}
  %k = bf16[3,3,4,6]{3,2,1,0} parameter(1)
  %i = bf16[2,8,8,4]{3,2,1,0} parameter(2)
  %c = bf16[2,8,8,6]{3,2,1,0} convolution(%i, %k), window={size=3x3}, dim_labels=b01f_01io->b01f
  %d = bf16[2,8,8,4]{3,2,1,0} slice(%i), slice={[0:2]}
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%p, %n), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %w = (s32[], /*index=1*/f32[8,4]) while(%t), condition=%condition, body=%body
}
"""


def test_a_loop_whose_turns_only_its_condition_names():
    """As programs for TPUs are written; its collectives count three times too."""
    flops, moved = programs.repeated(TPU)
    assert flops == 2 * (2 * 2 * 8 * 8 * 6 * 3 * 3 * 4)
    convolution = 2 * (2 * 8 * 8 * 4 + 3 * 3 * 4 * 6 + 2 * 8 * 8 * 6)
    assert moved >= 2 * (convolution + 2 * 2 * (2 * 8 * 8 * 4))
    assert totals(collectives(TPU)) == {"all-reduce": {"count": 3, "bytes": 3 * 128}}


def test_exponents_by_hand():
    rows = [{"size": n, "flops": 5 * n**1.5, "bytes": 100 + n} for n in (10, 100, 1000)]
    found = growth.exponents(rows)
    assert found["flops"] == pytest.approx({"all": 1.5, "last": 1.5})
    assert found["bytes"]["last"] == pytest.approx(np.log10(1100 / 200))
    text = growth.table({"pixels": rows})
    assert "| pixels | 10, 1,000 | 1.50, 1.50 | " in text


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_growth_is_drawn_in_both_formats(tmp_path, suffix, start):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    from duc_dlc_jax.benchmark import plots

    path = tmp_path / f"growth{suffix}"
    plots.growth({"pixels": [{"size": n, "flops": 5 * n**1.5} for n in (10, 100)]}, path)
    assert path.read_bytes().startswith(start)


def slopes(axis, values, **changes):
    """Exponents of the narrow network's costs over an axis."""
    changes = {f"model__{name}": value for name, value in NARROW.items()} | changes
    found = growth.sweep(tiny_config("", train__batch_size=1, **changes), {axis: values})
    print(growth.table(found))
    return {cost: slope["last"] for cost, slope in growth.exponents(found[axis]).items()}


@pytest.mark.parity
def test_costs_grow_as_the_pixels_do(monkeypatch):
    """With the loss in slabs, as at full size.

    Before its slabs took a band of the grid's rows, temporaries grew with the power 1.27 of the
    pixels, FLOPs 1.16 and bytes 1.07.
    """
    monkeypatch.setattr(pixel_scores, "SLAB_BYTES", 2**17)
    assert max(slopes("pixels", (128, 256)).values()) < 1.06


@pytest.mark.parity
def test_a_batch_in_parts_needs_the_memory_of_a_part():
    """8 images in four parts beside 2 images; FLOPs and bytes are those of all parts."""
    changes = {f"model__{name}": value for name, value in NARROW.items()}
    found = {}
    for images, parts in ((2, 1), (8, 1), (8, 4)):
        fields = {"train__batch_size": images, "train__accumulate": parts, **changes}
        found[images, parts] = growth.measure(tiny_config("", data__crop_size=128, **fields), 8)
    whole, part, parts = found[8, 1], found[2, 1], found[8, 4]
    print(found)
    assert parts["temporaries"] < 1.2 * part["temporaries"] < 0.4 * whole["temporaries"]
    assert parts["flops"] == pytest.approx(4 * part["flops"], rel=0.2)
    assert parts["bytes"] == pytest.approx(4 * part["bytes"], rel=0.1)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("axis", "values", "most"),
    [("classes", (150, 1000), 1.0), ("batch", (2, 4), 1.0), ("blocks", (14, 26), 0.9)],
)
def test_costs_grow_no_faster_than_classes_images_and_blocks(axis, values, most):
    assert max(slopes(axis, values).values()) < most
