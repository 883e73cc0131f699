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

    A slab needs a band of the grid's rows. How it is made, which is a matter of speed alone
    (docs/performance.md, "The loss, alone" and "Growth"):
      bands: the columns of the band are resized first, its rows last, so that on a CPU work and
        memory grow with the pixels.
      taps: rows first, of the whole grid; then each pixel reads its two columns.
      grid: rows first, then columns by a product: where rows lie on several devices less is sent,
        and a TPU's program moves and holds less.
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
        self._bands = self._bands_of(rows) if way == "bands" else _Rows(
            self._parts(jnp.asarray(rows, logits.dtype)), jnp.zeros(self._count, jnp.int32)
        )  # fmt: skip

    def _bands_of(self, rows: np.ndarray) -> _Rows:
        """The rows of each slab, with the narrowest band that holds what any of them needs."""
        height = self._height
        slabs = [rows[i * height : (i + 1) * height] for i in range(self._count)]
        used = [np.flatnonzero(slab.any(0)) for slab in slabs]
        band = max((u[-1] - u[0] + 1 for u in used if u.size), default=1)
        starts = [min(u[0], rows.shape[1] - band) if u.size else 0 for u in used]
        matrix = np.zeros((self._count, height, band))
        for part, slab, start in zip(matrix, slabs, starts, strict=True):
            part[: len(slab)] = slab[:, start : start + band]
        return _Rows(jnp.asarray(matrix, self._logits.dtype), jnp.asarray(starts, jnp.int32))

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
        columns = jnp.asarray(self._columns, self._logits.dtype)
        if self._way == "bands":
            band = rows.matrix.shape[1]
            x = jax.lax.dynamic_slice_in_dim(self._logits, rows.start, band, 1)
            return along_axis(rows.matrix, _along_columns(columns, x), 1)
        x = along_axis(rows.matrix, self._logits, 1)
        return _taps_of(self._columns, x) if self._way == "taps" else along_axis(columns, x, 2)

    def back(self, gradient: jax.Array, rows: _Rows) -> jax.Array:
        """What a gradient of `resized` is for the logits, or for the band of them: [B, n, w, K]."""
        wide = self._logits.dtype
        if self._same:
            return gradient.astype(wide)
        columns = self._columns.T
        if self._way != "bands":
            columns = jnp.asarray(columns, gradient.dtype)
            return along_axis(rows.matrix.T, along_axis(columns, gradient, 2, wide), 1)
        matrix = rows.matrix.T.astype(gradient.dtype)
        return _along_columns(jnp.asarray(columns, wide), along_axis(matrix, gradient, 1, wide))


def _along_columns(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """matrix [o, i] applied to axis 2 of x [B, n, i, K], in full precision, as one product."""
    return jnp.einsum("oi,bnik->bnok", matrix, x, precision=jax.lax.Precision.HIGHEST)


def _taps_of(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """As `_along_columns`, of a matrix with one or two neighbours in each row."""
    pixels, cells = np.arange(len(matrix)), matrix.shape[1]
    low = np.minimum((matrix > 0).argmax(1), max(cells - 2, 0))
    high = np.minimum(low + 1, cells - 1)
    first, second = matrix[pixels, low], np.where(high > low, matrix[pixels, high], 0)
    first, second = (
        jnp.asarray(weight, x.dtype)[None, None, :, None] for weight in (first, second)
    )
    return first * jnp.take(x, low, 2, mode="clip") + second * jnp.take(x, high, 2, mode="clip")
