"""DUpsampling: the rearrangement, and the start from the principal components of the labels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duc_dlc_jax import initial
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.models import layers, segmenter
from duc_dlc_jax.models.alternatives.dupsampling import DUpsampling, label_components
from runs import tiny_config

CONV = functools.partial(layers.Conv, dtype=jnp.float64)


def test_dupsampling_reconstructs_what_it_compresses():
    """With the identity for both matrices: pixel blocks of the scores, in their places, over T."""
    rng, (h, w) = np.random.default_rng(0), (7, 9)
    scores = rng.normal(size=(2, 8, 12, 3))  # 2 x 3 cells of 4 x 4 pixels, 3 classes
    blocks = scores.reshape(2, 2, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 2, 3, 48)
    eye = {"kernel": np.eye(48)[None, None]}
    params = {"compress": eye | {"bias": np.zeros(48)}, "w": eye, "scale": np.array(0.5)}
    with jax.enable_x64(True):
        module = DUpsampling(3, 4, 48, CONV)
        logits = module.apply({"params": params}, jnp.asarray(blocks), (h, w))
    np.testing.assert_allclose(logits, scores[:, :h, :w] / 2, rtol=0, atol=1e-12)


class FakeRecords:
    """Labels of four images, some smaller than a block, with ignored pixels."""

    def __init__(self, sizes=((20, 30), (8, 40), (33, 17), (5, 6))):
        rng = np.random.default_rng(0)
        self.labels = [np.sort(rng.integers(0, 3, size), 0).astype(np.uint8) for size in sizes]
        for label in self.labels:
            label[rng.random(label.shape) < 0.1] = IGNORE

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"label": self.labels[index]}


def test_label_components_lose_the_least():
    """Against a dense SVD; and all of them, as W, give the labels back at their own pixels."""
    blocks = initial.label_blocks(FakeRecords(), 40, 8, 0)
    one_hot = (blocks[..., None] == np.arange(3)).reshape(40, -1).astype(float)
    singular = np.linalg.svd(one_hot, compute_uv=False)
    for width in (1, 5, 100):
        found = label_components(blocks, 3, width)
        np.testing.assert_allclose(found @ found.T, np.eye(len(found)), rtol=0, atol=1e-9)
        lost = ((one_hot - one_hot @ found.T @ found) ** 2).sum()
        assert lost == pytest.approx((singular[width:] ** 2).sum(), abs=1e-8)
    params = {
        "compress": {"kernel": np.eye(len(found))[None, None], "bias": np.zeros(len(found))},
        "w": {"kernel": found[None, None]},
        "scale": np.array(1.0),
    }
    with jax.enable_x64(True):
        module = DUpsampling(3, 8, len(found), CONV)
        cells = jnp.asarray((one_hot @ found.T)[:, None, None])
        logits = module.apply({"params": params}, cells, (8, 8))
    np.testing.assert_allclose(logits, blocks[..., None] == np.arange(3), rtol=0, atol=1e-9)


def test_label_blocks_lie_in_the_images():
    records, blocks = FakeRecords(), initial.label_blocks(FakeRecords(), 40, 8, 0)
    np.testing.assert_array_equal(blocks, initial.label_blocks(records, 40, 8, 0))
    assert np.any(blocks != initial.label_blocks(records, 40, 8, 1))
    small = [b for b in blocks if (b[5:] == IGNORE).all() and (b[:, 6:] == IGNORE).all()]
    assert len(small) == 10  # a quarter is from the image of 5 x 6
    for block in blocks:
        part = block[:5, :6]
        assert any(
            (label[y : y + 5, x : x + 6] == part).all()
            for label in records.labels
            for y in range(label.shape[0] - 4)
            for x in range(label.shape[1] - 5)
        )


def test_training_starts_from_the_labels_components():
    config = tiny_config("", model__upsampling="dupsampling", model__dupsampling_width=4)
    net, records = segmenter.create(config.model, 3), FakeRecords()
    starts = {}
    for blocks in (30, 0):
        config.init.dupsampling_blocks = blocks
        starts[blocks] = initial.variables(net, config, records)["params"]
    kernel = starts[30]["dupsampling"]["w"]["kernel"]
    expected = 32 * label_components(initial.label_blocks(records, 30, 32, config.seed), 3, 4)
    np.testing.assert_allclose(kernel[0, 0], expected, rtol=1e-5, atol=1e-7)
    assert kernel.dtype == np.float32
    assert np.any(starts[0]["dupsampling"]["w"]["kernel"] != kernel)
    for part in set(starts[0]) - {"dupsampling"}:
        jax.tree.map(np.testing.assert_array_equal, starts[0][part], starts[30][part])
