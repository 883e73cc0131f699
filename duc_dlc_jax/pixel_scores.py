"""What the loss needs to know of each pixel's logits, without logits as large as the image."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.models.resizing import along_axis, interpolation_matrix

WAYS = ("bands", "taps", "grid")  # of CPUs, GPUs and TPUs: `_Slabs`
SLAB_BYTES = 2**24  # of one image's logits that are there at a time
COLUMNS = 128  # of the image, at least, in one product of the gradient: `_columns_back`


class Scores(NamedTuple):
    """What the loss needs to know of a pixel's logits x, [B, H, W] each, in their dtype."""

    normalizer: jax.Array  # log sum_k exp(x_k)
    target: jax.Array  # x of the label's class; 0 where ignored
    weighted: jax.Array  # sum_k w_k x_k, for a table w
    right: jax.Array  # whether no class has more than the label's; gives no gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6, 7))
def pixel_scores(
    logits: jax.Array,
    labels: jax.Array,
    table: tuple[float, ...] = (),
    grid: str = "corners",
    stride: int = 1,
    rounded: Any = None,
    shards: int = 1,
    way: str = "",
) -> Scores:
    """Scores of the logits resized to the labels' size, without ever having all of these.

    logits: [B, ceil(H / stride), ceil(W / stride), K], on `grid`; labels: uint8 [B, H, W]. Rows are
    resized and reduced slab by slab, and once more for the gradient. table: of `Scores.weighted`,
    one number per class; () = 0 each. rounded: dtype that the gradient of the resized logits is
    rounded to before it is summed up in the logits' own; None = not at all. shards: in how many
    parts the rows lie on devices; a slab has rows of each. way: of `_Slabs`; "" = the platform's.
    """

    def scores(way, resized, labels):
        is_target = _is_target(resized, labels)
        targets = jnp.where(is_target, resized, 0)
        most, total, target = (_in_one_pass if way == "taps" else _reduced)(resized, targets)
        weighted = jnp.zeros_like(target)
        if table:
            weighted = (resized * _as_row(table, resized)).sum(-1)
        return Scores(most + jnp.log(total), target, weighted, (target >= most) & is_target.any(-1))

    def of_all(way, logits, labels):
        slabs = _Slabs(logits, labels, grid, stride, shards, way)
        return slabs.each(lambda rows, labels: scores(way, slabs.resized(rows), labels))

    return _by_platform(of_all, shards, way, logits, labels)


def _pixel_scores_forward(logits, labels, *how):
    scores: Any = pixel_scores(logits, labels, *how)
    return scores, (logits, labels, scores.normalizer)


def _pixel_scores_backward(table, grid, stride, rounded, shards, way, saved, gradients):
    def gradient(slabs, rows, labels, normalizer, of_normalizer, of_target, of_weighted):
        resized = slabs.resized(rows)
        found = of_normalizer[..., None] * jnp.exp(resized - normalizer[..., None])
        found += jnp.where(_is_target(resized, labels), of_target[..., None], 0)
        if table:
            found += of_weighted[..., None] * _as_row(table, resized)
        return slabs.back(found.astype(rounded or found.dtype), rows)

    def of_all(way, logits, labels, *pixels):
        slabs = _Slabs(logits, labels, grid, stride, shards, way)
        return slabs.sum(functools.partial(gradient, slabs), *pixels)

    return _by_platform(of_all, shards, way, *saved, *gradients[:3]), None


pixel_scores.defvjp(_pixel_scores_forward, _pixel_scores_backward)


def _by_platform(function, shards, way, *arrays):
    """function(way, *arrays); without a way that of the platform: see `_Slabs`."""
    if way:
        return function(way, *arrays)
    bands, taps, of_grid = (functools.partial(function, way) for way in WAYS)
    if shards > 1:
        return of_grid(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=bands, cuda=taps, rocm=taps, default=of_grid)


def _reduced(x, targets):
    """Over the last axis: the maximum m, the sum of exp(x - m), and the sum of the targets."""
    most = x.max(-1)
    return most, jnp.exp(x - most[..., None]).sum(-1), targets.sum(-1)


def _in_one_pass(x, targets):
    """As `_reduced`, in a single reduction, into which a GPU's compiler takes what makes x."""

    def merge(first, second):
        (most, total, target), (other_most, other_total, other_target) = first, second
        factor = jnp.exp(-jnp.abs(most - other_most))
        total, other_total = (
            jnp.where(most >= other_most, total, total * factor),
            jnp.where(most >= other_most, other_total * factor, other_total),
        )
        return jnp.maximum(most, other_most), total + other_total, target + other_target

    zero, least = jnp.zeros((), x.dtype), jnp.array(jnp.finfo(x.dtype).min, x.dtype)
    parts = x, jnp.ones_like(x), targets
    return jax.lax.reduce(parts, (least, zero, zero), merge, (x.ndim - 1,))


def _is_target(logits, labels):
    """Whether a class is the label's, bool [B, h, W, K]; of no class where ignored."""
    ids = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, None, None]
    return labels[..., None] == ids


def _as_row(table, like):
    return jnp.asarray(table, like.dtype)[None, None, None]


class _Rows(NamedTuple):
    """Rows of the image in a slab, as sums of rows of the logits' grid."""

    matrix: jax.Array  # [rows, band]
    start: jax.Array  # int32 scalar: row of the grid that the band begins at


class _Slabs:
    """The rows of resized logits in parts that fit `SLAB_BYTES` an image.

    A slab needs a band of the grid's rows: by products with all of them work would grow faster than
    the pixels. How it is made is a matter of speed alone (docs/performance.md, "The loss, alone"
    and "Growth"):
      bands: each pixel of the band's rows reads its two columns; rows last.
      taps: rows first; then each pixel reads its two columns.
      grid: rows first, then columns by a product with all: where rows lie on several devices less
        is sent, and a TPU's program moves and holds less.
    """

    def __init__(self, logits, labels, grid: str, stride: int, shards: int, way: str):
        self._way = way
        self._logits, self._labels, self._shards = logits, labels, shards
        height, width = labels.shape[1:]
        bytes_per_image = height * width * logits.shape[-1] * logits.dtype.itemsize // shards
        each = -(-height // shards)
        self._count = min(-(-bytes_per_image // SLAB_BYTES), each) if stride > 1 else 1
        self._height = -(-each // self._count)  # of one shard in a slab
        rows, self._columns = (
            interpolation_matrix(cells, pixels, grid, 1 / stride)
            for cells, pixels in zip(logits.shape[1:3], (height, width), strict=True)
        )
        self._same = stride == 1
        if shards > 1:  # a slab has rows of each
            matrix = self._parts(jnp.asarray(rows, logits.dtype))
            self._bands = _Rows(matrix, jnp.zeros(self._count, jnp.int32))
        else:
            matrix, starts = _banded(rows, self._count)
            self._bands = _Rows(jnp.asarray(matrix, logits.dtype), jnp.asarray(starts, jnp.int32))

    def _parts(self, rows: jax.Array, fill: int = 0) -> jax.Array:
        """[..., H, W] -> [count, ..., shards * rows, W]."""
        *lead, height, width = rows.shape
        missing = self._shards * self._count * self._height - height
        rows = jnp.pad(rows, [(0, 0)] * len(lead) + [(0, missing), (0, 0)], constant_values=fill)
        rows = rows.reshape(*lead, self._shards, self._count, self._height, width)
        rows = jnp.moveaxis(rows, -3, 0)
        return rows.reshape(self._count, *lead, self._shards * self._height, width)

    def _whole(self, parts: jax.Array) -> jax.Array:
        """The reverse of `_parts`, for [count, B, shards * rows, W]."""
        count, batch, _, width = parts.shape
        rows = parts.reshape(count, batch, self._shards, self._height, width)
        rows = jnp.moveaxis(rows, 0, 2).reshape(batch, -1, width)
        return rows[:, : self._labels.shape[1]]

    def each(self, function) -> Any:
        """function(rows, labels) of each part -> its results, [B, H, W] each."""
        parts = self._bands, self._parts(self._labels, IGNORE)
        if self._count == 1:
            found = function(*jax.tree.map(lambda part: part[0], parts))
            return jax.tree.map(lambda x: self._whole(x[None]), found)
        return jax.tree.map(self._whole, jax.lax.map(lambda part: function(*part), parts))

    def sum(self, function, *pixels: jax.Array) -> jax.Array:
        """Sum over the parts of function(rows, labels, *pixels), each as `back` returns it."""
        parts = self._bands, self._parts(self._labels, IGNORE), *(self._parts(p) for p in pixels)
        if self._count == 1 and self._bands.matrix.shape[-1] == self._logits.shape[1]:
            return function(*jax.tree.map(lambda part: part[0], parts))

        def add(total, part):
            start = part[0].start
            found = function(*part)
            found += jax.lax.dynamic_slice_in_dim(total, start, found.shape[1], 1)
            return jax.lax.dynamic_update_slice_in_dim(total, found, start, 1), None

        return jax.lax.scan(add, jnp.zeros_like(self._logits), parts)[0]

    def resized(self, rows: _Rows) -> jax.Array:
        """Some rows of the logits at the pixels, [B, rows, W, K]."""
        if self._same:
            return self._logits
        x, band = self._logits, rows.matrix.shape[1]
        if band < x.shape[1]:
            x = jax.lax.dynamic_slice_in_dim(x, rows.start, band, 1)
        if self._way == "bands":
            return along_axis(rows.matrix, _taps_of(self._columns, x), 1)
        x = along_axis(rows.matrix, x, 1)
        if self._way == "taps":
            return _taps_of(self._columns, x)
        return along_axis(jnp.asarray(self._columns, x.dtype), x, 2)

    def back(self, gradient: jax.Array, rows: _Rows) -> jax.Array:
        """What a gradient of `resized` is for the band of the logits: [B, band, w, K]."""
        wide = self._logits.dtype
        if self._same:
            return gradient.astype(wide)
        if self._way == "bands":
            matrix = rows.matrix.T.astype(gradient.dtype)
            return _columns_back(self._columns, along_axis(matrix, gradient, 1, wide), wide)
        if self._way == "taps":
            found = _columns_back(self._columns, gradient, wide)
        else:
            columns = jnp.asarray(self._columns.T, gradient.dtype)
            found = along_axis(columns, gradient, 2, wide)
        return along_axis(rows.matrix.T, found, 1)


def _banded(matrix: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """matrix [pixels, cells] as parts [parts, pixels of one, band] and the first cell of each.

    The band is the narrowest that holds the cells that any part reads.
    """
    pixels, cells = matrix.shape
    if parts == 1:
        return matrix[None], np.zeros(1, int)
    size = -(-pixels // parts)
    matrix = np.pad(matrix, ((0, parts * size - pixels), (0, 0))).reshape(parts, size, cells)
    used = np.any(matrix, axis=1)
    first, last = used.argmax(1), cells - used[:, ::-1].argmax(1)
    band = np.where(np.any(used, axis=1), last - first, 1).max()
    starts = np.minimum(first, cells - band)
    return np.stack([part[:, i : i + band] for part, i in zip(matrix, starts, strict=True)]), starts


def _taps_of(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """matrix [o, i], with at most two numbers in a row, applied to axis 2 of x [B, n, i, K]."""
    pixels, cells = np.arange(len(matrix)), matrix.shape[1]
    low, high = (matrix > 0).argmax(1), cells - 1 - (matrix[:, ::-1] > 0).argmax(1)
    first, second = matrix[pixels, low], np.where(high > low, matrix[pixels, high], 0)
    first, second = (
        jnp.asarray(weight, x.dtype)[None, None, :, None] for weight in (first, second)
    )
    return first * jnp.take(x, low, 2, mode="clip") + second * jnp.take(x, high, 2, mode="clip")


def _columns_back(matrix: np.ndarray, x: jax.Array, dtype: Any) -> jax.Array:
    """The transpose of matrix [W, w] applied to axis 2 of x [B, n, W, K]: a product per block.

    Blocks are no narrower than what reads one cell, so that a cell has its sum from two at most.
    """
    width = x.shape[2]
    blocks = max(width // max(COLUMNS, (matrix > 0).sum(0).max()), 1)
    parts, starts = _banded(matrix, blocks)
    missing = blocks * parts.shape[1] - width
    x = jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0)))
    x = x.reshape(*x.shape[:2], blocks, -1, x.shape[-1])
    found = along_axis(jnp.asarray(parts.swapaxes(1, 2), x.dtype), x, 3, dtype)
    found = found.reshape(*x.shape[:2], -1, x.shape[-1])
    if blocks == 1:
        return found
    cells = starts[:, None] + np.arange(parts.shape[2])[None]
    sums = (np.arange(matrix.shape[1])[:, None, None] == cells[None]) & np.any(parts, axis=1)[None]
    return _taps_of(sums.reshape(len(sums), -1), found)
