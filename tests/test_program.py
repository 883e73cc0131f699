"""The compiled training step: what it computes, keeps and moves, counted. No clock is read.

Bounds are what the step has, with a margin for another version of the compiler; a regression of the
kind that each names is far beyond it.
"""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from duc_dlc_jax import describe, optimizer, pixel_scores, sharding, train_step
from duc_dlc_jax.models import segmenter
from networks import NARROW, random_variables
from runs import tiny_config

BATCH, SIDE, CLASSES = 2, 128, 150


@pytest.fixture(scope="module")
def program():
    """The step of the narrow network, 150 classes: compiled, text, model, bytes of the state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixel_scores, "SLAB_BYTES", 2**20)  # ten slabs of rows
        changes = {f"model__{name}": value for name, value in NARROW.items()}
        config = tiny_config("", data__crop_size=SIDE, train__batch_size=BATCH, **changes)
        model = segmenter.create(config.model, CLASSES)
        rule = optimizer.create(config.optimizer, 10)
        state = train_step.create_state(model, rule, config, random_variables(model))
        image = np.zeros((BATCH, SIDE, SIDE, 3), np.uint8)
        batch = {"image": image, "label": image[..., 0]}
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        step = train_step.make_train_step(model, rule, config)
        compiled = sharding.jit_train_step(step, mesh).lower(state, batch).compile()
    size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(state))
    return compiled, compiled.as_text(), model, size


def shapes(text: str) -> set[tuple[int, ...]]:
    found = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    return {tuple(int(n) for n in shape.split(",")) for shape in found}


def test_no_logits_and_no_guidance_as_large_as_the_images(program):
    largest = BATCH * SIDE * SIDE
    features = NARROW["guidance_width"]
    for shape in shapes(program[1]):
        assert np.prod(shape) < largest * CLASSES, f"logits of all pixels: {shape}"
        whole = (
            SIDE in shape[1:-1] and shape[-1] == features and np.prod(shape) >= largest * features
        )
        assert not whole, f"g(I) of all pixels: {shape}"


def test_the_state_is_updated_in_place(program):
    """Aliased, and no array of parameters or momentum is copied before it is overwritten."""
    compiled, text, _, size = program
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size - 4096
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(\S*state\S*\)", text)
    assert all(np.prod([int(n) for n in shape.split(",") if n]) < 1024 for shape in copied), copied


def test_temporaries_are_bounded(program):
    """8.9 MiB as measured (JAX 0.10); one copy of the logits of all pixels would be 18.8."""
    compiled, _, _, _ = program
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    print(f"{temporaries / 2**20:.1f} MiB")
    assert temporaries < 13 * 2**20


def test_flops_are_those_of_three_passes_and_of_the_loss(program):
    """1.8 times the three passes: beside so small a network the resize of logits counts."""
    compiled, _, model, _ = program
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    convolutions = 6 * BATCH * sum(describe.macs(model, SIDE, SIDE).values())
    print(f"{analysis['flops'] / 1e6:.0f} MFLOP, convolutions {convolutions / 1e6:.0f}")
    assert analysis["flops"] < 2.2 * convolutions


def test_few_transposes_and_copies(program):
    """91 and 151 as measured (JAX 0.10)."""
    text = program[1]
    transposes = len(re.findall(r"= \S+ transpose\(", text))
    copies = len(re.findall(r"= \S+ copy\(", text))
    print(f"{transposes} transposes, {copies} copies")
    assert transposes < 140
    assert copies < 230
