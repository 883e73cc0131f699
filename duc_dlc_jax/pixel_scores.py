"""What the loss needs to know of each pixel's logits, without logits as large as the image."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.models.resizing import along_axis, interpolation_matrix

SLAB_BYTES = 2**24  # of one image's logits that are there at a time


class Scores(NamedTuple):
    """What the loss needs to know of a pixel's logits x, [B, H, W] each, in their dtype."""

    normalizer: jax.Array  # log sum_k exp(x_k)
    target: jax.Array  # x of the label's class; 0 where ignored
    weighted: jax.Array  # sum_k w_k x_k, for a table w
    right: jax.Array  # whether no class has more than the label's; gives no gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def pixel_scores(
    logits: jax.Array,
    labels: jax.Array,
    table: tuple[float, ...] = (),
    grid: str = "corners",
    stride: int = 1,
    rounded: Any = None,
    shards: int = 1,
) -> Scores:
    """Scores of the logits resized to the labels' size, without ever having all of these.

    logits: [B, ceil(H / stride), ceil(W / stride), K], on `grid`; labels: uint8 [B, H, W]. Rows are
    resized and reduced slab by slab, and once more for the gradient. table: of `Scores.weighted`,
    one number per class; () = 0 each. rounded: dtype that the gradient of the resized logits is
    rounded to before it is summed up in the logits' own; None = not at all. shards: in how many
    parts the rows lie on devices; a slab has rows of each.
    """
    slabs = _Slabs(logits, labels, grid, stride, shards)

    def scores(resized, labels):
        is_target = _is_target(resized, labels)
        most = resized.max(-1)
        total = jnp.exp(resized - most[..., None]).sum(-1)
        target = jnp.where(is_target, resized, 0).sum(-1)
        weighted = jnp.zeros_like(target)
        if table:
            weighted = (resized * _as_row(table, resized)).sum(-1)
        return Scores(most + jnp.log(total), target, weighted, (target >= most) & is_target.any(-1))

    return slabs.each(lambda matrix, labels: scores(slabs.resized(matrix), labels))


def _pixel_scores_forward(logits, labels, *how):
    scores: Any = pixel_scores(logits, labels, *how)
    return scores, (logits, labels, scores.normalizer)


def _pixel_scores_backward(table, grid, stride, rounded, shards, saved, gradients):
    logits, labels, normalizer = saved
    slabs = _Slabs(logits, labels, grid, stride, shards)

    def gradient(matrix, labels, normalizer, of_normalizer, of_target, of_weighted):
        resized = slabs.resized(matrix)
        found = of_normalizer[..., None] * jnp.exp(resized - normalizer[..., None])
        found += jnp.where(_is_target(resized, labels), of_target[..., None], 0)
        if table:
            found += of_weighted[..., None] * _as_row(table, resized)
        return slabs.back(found.astype(rounded or found.dtype), matrix)

    return slabs.sum(gradient, normalizer, *gradients[:3]), None


pixel_scores.defvjp(_pixel_scores_forward, _pixel_scores_backward)


def _is_target(logits, labels):
    """Whether a class is the label's, bool [B, h, W, K]; of no class where ignored."""
    ids = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, None, None]
    return labels[..., None] == ids


def _as_row(table, like):
    return jnp.asarray(table, like.dtype)[None, None, None]


class _Slabs:
    """The rows of resized logits in parts that fit `SLAB_BYTES` an image."""

    def __init__(self, logits, labels, grid: str, stride: int, shards: int):
        self._logits, self._labels, self._shards = logits, labels, shards
        height, width = labels.shape[1:]
        bytes_per_image = height * width * logits.shape[-1] * logits.dtype.itemsize // shards
        each = -(-height // shards)
        self._count = min(-(-bytes_per_image // SLAB_BYTES), each) if stride > 1 else 1
        self._rows = -(-each // self._count)  # of one shard in a slab
        self._matrices = [
            interpolation_matrix(cells, pixels, grid, 1 / stride)
            for cells, pixels in zip(logits.shape[1:3], (height, width), strict=True)
        ]
        self._same = stride == 1

    def _parts(self, rows: jax.Array, fill: int = 0) -> jax.Array:
        """[..., H, W] -> [count, ..., shards * rows, W]."""
        *lead, height, width = rows.shape
        missing = self._shards * self._count * self._rows - height
        rows = jnp.pad(rows, [(0, 0)] * len(lead) + [(0, missing), (0, 0)], constant_values=fill)
        rows = rows.reshape(*lead, self._shards, self._count, self._rows, width)
        rows = jnp.moveaxis(rows, -3, 0)
        return rows.reshape(self._count, *lead, self._shards * self._rows, width)

    def _whole(self, parts: jax.Array) -> jax.Array:
        """The reverse of `_parts`, for [count, B, shards * rows, W]."""
        count, batch, _, width = parts.shape
        rows = parts.reshape(count, batch, self._shards, self._rows, width)
        rows = jnp.moveaxis(rows, 0, 2).reshape(batch, -1, width)
        return rows[:, : self._labels.shape[1]]

    def _row_matrices(self) -> jax.Array:
        """[count, shards * rows, h]."""
        return self._parts(jnp.asarray(self._matrices[0], self._logits.dtype))

    def each(self, function) -> Any:
        """function(matrix, labels) of each part -> its results, [B, H, W] each."""
        parts = self._row_matrices(), self._parts(self._labels, IGNORE)
        if self._count == 1:
            found = function(*(part[0] for part in parts))
            return jax.tree.map(lambda x: self._whole(x[None]), found)
        return jax.tree.map(self._whole, jax.lax.map(lambda part: function(*part), parts))

    def sum(self, function, *pixels: jax.Array) -> jax.Array:
        """Sum over the parts of function(matrix, labels, *pixels)."""
        parts = [self._row_matrices(), self._parts(self._labels, IGNORE)]
        parts += [self._parts(p) for p in pixels]
        if self._count == 1:
            return function(*(part[0] for part in parts))

        def add(total, part):
            return total + function(*part), None

        return jax.lax.scan(add, jnp.zeros_like(self._logits), tuple(parts))[0]

    def resized(self, matrix: jax.Array) -> jax.Array:
        """Some rows of the logits at the pixels, [B, rows, W, K]; matrix: [rows, h]."""
        if self._same:
            return self._logits
        columns = jnp.asarray(self._matrices[1], self._logits.dtype)
        return along_axis(columns, along_axis(matrix, self._logits, 1), 2)

    def back(self, gradient: jax.Array, matrix: jax.Array) -> jax.Array:
        """What a gradient of `resized` is for the logits."""
        if self._same:
            return gradient.astype(self._logits.dtype)
        columns, wide = jnp.asarray(self._matrices[1].T, gradient.dtype), self._logits.dtype
        return along_axis(matrix.T, along_axis(columns, gradient, 2, wide), 1)
