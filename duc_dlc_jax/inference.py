"""Labels of images by a protocol, on this process's devices, in few programs and bounded memory.

Per batch of images of one padded size: windows are sampled from the images, the network says its
logits on its last grid, and at the end all of them are read at every label pixel, tile by tile, so
that neither logits nor probabilities of a whole image exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duc_dlc_jax import metrics, sharding
from duc_dlc_jax.models import layers, resizing
from duc_dlc_jax.models.segmenter import Segmenter
from duc_dlc_jax.protocols import Axis, Protocol, Size

TILE = (128, 512)  # pixels of the label that are averaged at once, at most
Reads = tuple[jax.Array, jax.Array]
LARGEST_EXPONENT = 80.0  # exp() of more leaves float32


class Labeller:
    """A network under a protocol; batches are split over the devices of `mesh`."""

    def __init__(self, model: Segmenter, protocol: Protocol, mesh: jax.sharding.Mesh):
        self.protocol = protocol
        everywhere, split = sharding.replicated(mesh), sharding.batched(mesh)

        def network(variables, images, valid):
            return model.apply(variables, images, valid=valid, coarse=True)

        def sample(images, rows, columns):
            return sampled(images, rows, columns)

        def counted(ids, labels):
            return metrics.confusion_matrix(labels, ids, model.num_classes), ids

        def best(groups, labels):
            ids = over_tiles(groups, labels.shape, protocol, lambda x: x.argmax(-1))
            return ids.astype(jnp.uint8)

        def finish(groups, labels):
            return counted(best(groups, labels), labels)

        def direct(variables, images, valid, reads, labels):
            logits, padded = network(variables, images, valid), labels.shape[1:]
            ids = jax.lax.platform_dependent(
                logits,
                reads,
                cpu=lambda logits, reads: class_by_class(
                    logits, *(_one_view(x, n) for x, n in zip(reads, padded, strict=True))
                ),
                default=lambda logits, reads: best([(logits[:, None, None], *reads)], labels),
            )
            return counted(ids, labels)

        def jit(function: Callable, *batched: Any, out: Any = split) -> Any:
            return jax.jit(function, in_shardings=batched, out_shardings=out)

        self._split = split
        self._network = jit(network, everywhere, split, split)
        self._sample = jit(sample, split, split, split)
        self._stack = jit(lambda views: jnp.stack(views, 1), split)
        self._finish = jit(finish, split, split, out=(everywhere, split))
        self._direct = jit(direct, everywhere, split, split, split, split, out=(everywhere, split))

    def programs(self) -> dict[str, int]:
        """Programs compiled so far: those that hold the network, and the small ones."""
        network, small = (self._network, self._direct), (self._sample, self._stack, self._finish)
        return {
            "network": sum(f._cache_size() for f in network),
            "other": sum(f._cache_size() for f in small),
        }

    def __call__(
        self, variables: Any, images: np.ndarray, labels: np.ndarray, sizes: Sequence[Size]
    ) -> tuple[jax.Array, jax.Array]:
        """images: uint8 [B, H, W, 3], padded; labels: uint8 [B, H, W]; sizes: B unpadded sizes.

        Returns the confusion matrix of the batch, int32 [K, K], and train ids uint8 [B, H, W], of
        which those beyond an image's size mean nothing.
        """
        if self.protocol.direct:
            return self._direct(variables, *self._direct_arguments(images, labels, sizes))
        groups = self.groups(variables, images, sizes)
        return self._finish(groups, self._put(labels))

    def compiled(self, variables: Any, images, labels, sizes: Sequence[Size]) -> Any:
        """The program of a call that needs no windows, to be looked at; arguments as of a call."""
        return self._direct.lower(
            variables, *self._direct_arguments(images, labels, sizes)
        ).compile()

    def _direct_arguments(self, images, labels, sizes):
        valid = np.asarray(sizes, np.int32) if self.protocol.pads else None
        reads = self._reads(sizes, 1.0, images.shape[1:3])
        return self._put((images, valid, reads, labels))

    def _put(self, arrays: Any) -> Any:
        """This process's arrays on its devices; with several processes jit does not do it."""
        return jax.device_put(arrays, self._split)

    def groups(self, variables: Any, images: np.ndarray, sizes: Sequence[Size]) -> list[tuple]:
        """Logits of N windows and F flips, [B, N, F, h, w, K], and their reads, for each scale."""
        padded = images.shape[1], images.shape[2]
        images = self._put(images)
        groups = []
        for scale in sorted(self.protocol.scales, reverse=True):  # most memory while least is kept
            logits = self._windows(variables, images, sizes, scale)
            groups.append((logits, *self._put(self._reads(sizes, scale, padded))))
        return groups

    def _axes(self, sizes, scale) -> list[tuple[Axis, Axis]]:
        """(height, width) of each image."""
        return [
            (Axis(self.protocol, size[0], scaled[0]), Axis(self.protocol, size[1], scaled[1]))
            for size in sizes
            for scaled in [self.protocol.scaled_size(size, scale)]
        ]

    def _windows(self, variables, images, sizes, scale) -> jax.Array:
        """Logits of one scale: [B, N, F, h, w, K]."""
        counts = self.protocol.window_counts(images.shape[1:3], scale)
        axes = self._axes(sizes, scale)
        flips = (False, True) if self.protocol.flip else (False,)
        views = []
        for window in np.ndindex(*counts):
            if any(pair[0].has(window[0]) and pair[1].has(window[1]) for pair in axes):
                view = [self._view(variables, images, axes, scale, window, x) for x in flips]
                views.append(self._stack(view))
            else:
                views.append(views[0])  # its weight is 0: no image of the batch reaches here
        return self._stack(views)

    def _view(self, variables, images, axes, scale, window, flip) -> jax.Array:
        """Logits of one window of each image, on its grid: [B, h, w, K]."""
        protocol = self.protocol
        tables = []
        for axis, length in enumerate(protocol.window_size(images.shape[1:3], scale)):
            mirrored = flip and axis == 1
            sources = [pair[axis].sources(window[axis], length, mirrored) for pair in axes]
            position, inside = (np.stack(part) for part in zip(*sources, strict=True))
            tables.append((*_split(position), inside))
        valid = None
        if protocol.pads and protocol.mode != "source_code":  # its network sees the black
            extents = [[protocol.extent(axis.scaled) for axis in pair] for pair in axes]
            valid = np.asarray(extents, np.int32)
        tables, valid = self._put((tables, valid))
        logits = self._network(variables, self._sample(images, *tables), valid)
        return jax.block_until_ready(logits)  # else several networks run, each in its memory

    def _reads(self, sizes, scale, padded):
        """Tables of `Axis.reads` for rows and columns, batched and in tiles' multiples."""
        counts = self.protocol.window_counts(padded, scale)
        tables = []
        for axis, tile in enumerate(_tile(padded)):
            length = -(-padded[axis] // tile) * tile
            reads = [pair[axis].reads(counts[axis], length) for pair in self._axes(sizes, scale)]
            position, weight = (np.stack(part) for part in zip(*reads, strict=True))
            tables.append((*_split(position), weight.astype(_float())))
        return tables


def over_tiles(groups, shape, protocol: Protocol, finish: Callable) -> jax.Array:
    """Scores of every label pixel, averaged over all views, given to `finish` tile by tile.

    groups: as from `Labeller.groups`; shape: of the labels (B, H, W); finish: from scores
    [B, h, w, K] to [B, h, w, ...]. Returns [B, H, W, ...].
    """
    batch, height, width = shape
    tile = _tile((height, width))
    tiles = -(-height // tile[0]), -(-width // tile[1])
    score = _score(groups, protocol)

    def one(index):
        first = index // tiles[1] * tile[0], index % tiles[1] * tile[1]
        total = jnp.zeros((batch, *tile, groups[0][0].shape[-1]), groups[0][0].dtype)
        for logits, rows, columns in groups:
            reads = [
                [jax.lax.dynamic_slice_in_dim(x, start, length, x.ndim - 1) for x in table]
                for table, start, length in zip((rows, columns), first, tile, strict=True)
            ]
            total = _add_views(total, logits, reads, score)
        return finish(total)

    if tiles == (1, 1):
        return one(0)[:, :height, :width]
    done = jax.lax.map(one, jnp.arange(tiles[0] * tiles[1]))  # [tiles, B, h, w, ...]
    done = done.reshape(*tiles, *done.shape[1:])
    done = jnp.moveaxis(done, (2, 0, 3, 1, 4), (0, 1, 2, 3, 4))
    done = done.reshape(batch, tiles[0] * tile[0], tiles[1] * tile[1], *done.shape[5:])
    return done[:, :height, :width]


def class_by_class(logits: jax.Array, rows: Reads, columns: Reads) -> jax.Array:
    """The class of the largest logit at every pixel, uint8 [B, H, W].

    For CPUs, whose vectors then run along the pixels: an arg-max over a pixel's classes takes them
    four times as long. logits: [B, h, w, K]; rows, columns: for each pixel the cell before it, int
    [B, H] and [B, W], and the share of the next one, float.
    """
    (above, share_below), (left, share_right) = rows, columns
    across = resizing.weights_of_positions(left, share_right, logits.shape[2])
    across = jnp.swapaxes(across, 1, 2).astype(logits.dtype)  # [B, w, W]

    def more(k, found):
        largest, ids = found
        x = jax.lax.dynamic_index_in_dim(logits, k, 3, keepdims=False)
        x = jnp.matmul(x, across, precision=jax.lax.Precision.HIGHEST)
        x = resizing.interpolate(x[..., None], above, share_below, 1)[..., 0]
        return jnp.maximum(x, largest), jnp.where(x > largest, k.astype(jnp.uint8), ids)

    shape = logits.shape[0], above.shape[1], left.shape[1]
    nothing = jnp.full(shape, -jnp.inf, logits.dtype), jnp.zeros(shape, jnp.uint8)
    return jax.lax.fori_loop(0, logits.shape[3], more, nothing)[1]


def _one_view(reads, length: int) -> Reads:
    """Of `Labeller._reads` the first view's positions, of `length` pixels."""
    low, part = (table.reshape(len(table), -1)[:, :length] for table in reads[:2])
    return low, part


def _add_views(total, logits, reads, score):
    """Adds the weighted scores of one scale's windows to `total` [B, h, w, K]."""
    (row_low, row_part, row_weight), (column_low, column_part, column_weight) = reads
    across = column_low.shape[1]

    def add(total, window):
        r, c = window // across, window % across
        for q in range(row_weight.shape[2]):
            for p in range(column_weight.shape[2]):
                flips = []
                for flip in range(logits.shape[2]):
                    x = resizing.interpolate(
                        logits[:, window, flip], row_low[:, r, 0, q], row_part[:, r, 0, q], 1
                    )
                    x = resizing.interpolate(
                        x, column_low[:, c, flip, p], column_part[:, c, flip, p], 2
                    )
                    flips.append(x)
                weight = row_weight[:, r, q, :, None] * column_weight[:, c, p, None]
                total = total + weight[..., None] * score(flips)
        return total

    def add_if_read(window, total):
        r, c = window // across, window % across
        read = row_weight[:, r].any() & column_weight[:, c].any()
        return jax.lax.cond(read, add, lambda total, _: total, total, window)

    if logits.shape[1] == 1:
        return add(total, 0)
    return jax.lax.fori_loop(0, logits.shape[1], add_if_read, total)


def _score(groups, protocol: Protocol) -> Callable[[list[jax.Array]], Any]:
    """From a window's logits of each flip, [B, h, w, K], to what is averaged."""
    if protocol.average == "exp_sum":
        # One shift for all of an image's windows and scales scales every score alike.
        highest = [sum(x.max((1, 3, 4, 5)).T) for x, _, _ in groups]
        shift = jnp.maximum(jnp.stack(highest).max(0) - LARGEST_EXPONENT, 0)[:, None, None, None]
        return lambda flips: jnp.exp(sum(flips) - shift)
    if protocol.direct:
        return lambda flips: flips[0]
    return lambda flips: sum(jax.nn.softmax(x) for x in flips) / len(flips)


def sampled(images, rows, columns) -> jax.Array:
    """Windows of the images brought to their scale: uint8 [B, H, W, 3] -> normalised floats.

    rows, columns: tables of `Axis.sources`; what is not the image's is black, as padded pixels are
    in training.
    """
    (row_low, row_part, row_inside), (column_low, column_part, column_inside) = rows, columns
    x = layers.normalize(images, row_part.dtype)
    x = resizing.interpolate(x, row_low, row_part, 1)
    x = resizing.interpolate(x, column_low, column_part, 2)
    black = layers.normalize(jnp.zeros((1, 1, 1, 3), jnp.uint8), x.dtype)
    inside = row_inside[:, :, None] & column_inside[:, None]
    return jnp.where(inside[..., None], x, black)


def _split(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions -> the cell below, int32, and the share of the next one."""
    low = np.floor(position)
    return low.astype(np.int32), (position - low).astype(_float())


def _float():
    return jax.dtypes.canonicalize_dtype(np.float64)  # float32 unless JAX's 64 bits are on


def _tile(padded: Size) -> Size:
    """Sizes of equal tiles, TILE at most, that cover a padded label with the least beyond it."""
    height, width = (-(-n // -(-n // most)) for n, most in zip(padded, TILE, strict=True))
    return height, width
