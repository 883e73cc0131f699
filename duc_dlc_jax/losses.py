"""Per-pixel cross-entropy (eq. 6), averaged over the pixels that are not ignored; its options.

Every option works on two numbers per pixel, its loss and its weight, of which only sums over the
global batch are taken: parts of a batch, or slabs of rows, can be summed one after the other. Hard
pixels are chosen by a bound that needs the losses of all pixels, [B, H, W], but no logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.models.layers import interpolation_matrix, resize_columns

SLAB_BYTES = 2**24  # of one image's logits that are there at a time


@dataclasses.dataclass(frozen=True)
class Options:
    """`config.loss` with the weights of its classes; the defaults are the paper's loss."""

    class_weights: tuple[float, ...] = ()  # one per class; () = 1 each
    label_smoothing: float = 0.0
    ohem_threshold: float = 0.0
    ohem_min_kept: int = 0


def options(settings: Any, classes: int, pixels: Sequence[int] | None = None) -> Options:
    """settings: `config.loss`; pixels: of each class in the training split, [classes].

    Raises ConfigError for weights that are not one per class, and for `class_balance` without
    pixels.
    """
    weights = tuple(settings.class_weights)
    if settings.class_balance != "none":
        if weights:
            raise ConfigError(
                f"loss.class_weights and loss.class_balance={settings.class_balance!r} are both "
                "set: keep one of them"
            )
        if pixels is None:
            raise ConfigError(
                f"loss.class_balance={settings.class_balance!r} needs the training split's pixels"
            )
        weights = balanced(settings.class_balance, pixels)
    if weights and len(weights) != classes:
        raise ConfigError(
            f"loss.class_weights has {len(weights)} numbers; the data set has {classes} classes"
        )
    return Options(
        weights, settings.label_smoothing, settings.ohem_threshold, settings.ohem_min_kept
    )


def balanced(rule: str, pixels: Sequence[int]) -> tuple[float, ...]:
    """Weights of the classes from their shares p of all labelled pixels.

    inverse_log: 1 / ln(1.02 + p) (ENet). median_frequency: median(p) / p (SegNet; there p is the
    share in those images that have the class). A class without pixels has 1 and no say.
    """
    share = np.asarray(pixels, np.float64) / max(np.sum(pixels), 1)
    seen = share > 0
    if rule == "inverse_log":
        weights = 1 / np.log(1.02 + share)
    else:
        weights = np.median(share[seen]) / np.where(seen, share, 1)
    return tuple(float(w) for w in np.where(seen, weights, 1))


def pixel_losses(
    logits: jax.Array, labels: jax.Array, chosen: Options
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits [B, H, W, K], labels uint8 [B, H, W] -> loss, weight and -log p(label), [B, H, W].

    All are 0 where the label is ignored; the mean loss is sum(loss) / sum(weight), as PyTorch's
    `CrossEntropyLoss` has it: with smoothing e the target is (1 - e) of the label's class and e / K
    of each class; losses are weighted by their class, each share by its own, and the divisor holds
    the weights of the labels. The target's logit is selected by comparison: its gradient needs no
    scatter.
    """
    valid = labels != IGNORE
    classes = logits.shape[-1]
    ids = jnp.arange(classes, dtype=labels.dtype)[None, None, None]
    is_target = labels[..., None] == ids
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    nll = normalizer - jnp.where(is_target, logits, 0).sum(-1)
    loss, weight = nll, valid
    if chosen.class_weights:
        table = jnp.asarray(chosen.class_weights, logits.dtype)
        weight = jnp.where(is_target, table[None, None, None], 0).sum(-1)  # 0 where ignored
        loss = weight * nll
    if chosen.label_smoothing:
        table = jnp.asarray(chosen.class_weights or (1.0,) * classes, logits.dtype)
        others = table.sum() * normalizer - (logits * table[None, None, None]).sum(-1)
        loss = (1 - chosen.label_smoothing) * loss + chosen.label_smoothing / classes * others
    return jnp.where(valid, loss, 0), weight, jnp.where(valid, nll, 0)


def hard_bound(nll: jax.Array, labels: jax.Array, chosen: Options) -> jax.Array:
    """Online hard example mining: the -log p(label) from which on a pixel counts; float32 scalar.

    Pixels count whose label has a probability below `ohem_threshold`, and always the hardest: the
    `ohem_min_kept` per image, over the batch as a whole, with all pixels that tie with the last of
    them. nll: float [B, H, W], 0 where ignored.
    """
    nll = jax.lax.stop_gradient(nll).astype(jnp.float32)
    least = jnp.minimum(chosen.ohem_min_kept * len(nll), (labels != IGNORE).sum())
    hardest = jnp.where(least > 0, _kth_largest(nll, least), jnp.inf)
    above = jnp.nextafter(-jnp.log(jnp.float32(chosen.ohem_threshold)), jnp.float32(jnp.inf))
    return jnp.minimum(hardest, above)


def _kth_largest(values: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest of values >= 0, float32 of any shape, exactly: by bisection.

    31 counts over the array and no sort: sums over devices, the same in any order. Floats that are
    not negative are ordered as their bits are.
    """
    bits = jax.lax.bitcast_convert_type(jnp.maximum(values, 0), jnp.int32)

    def narrow(i, found):
        candidate = found | (1 << (30 - i))
        return jnp.where((bits >= candidate).sum() >= k, candidate, found)

    found = jax.lax.fori_loop(0, 31, narrow, jnp.zeros((), jnp.int32))
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def cross_entropy_sum(
    logits: jax.Array,
    labels: jax.Array,
    chosen: Options = Options(),
    bound: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """logits [B, H, W, K], labels uint8 [B, H, W] -> (summed losses, summed weights).

    Both are sums over the global batch, so that dividing them averages over pixels and not over
    devices. Without class weights the second is the number of valid pixels. bound: of `hard_bound`;
    pixels below it do not count.
    """
    loss, weight, nll = pixel_losses(logits, labels, chosen)
    if bound is not None:
        kept = nll.astype(jnp.float32) >= bound
        loss, weight = jnp.where(kept, loss, 0), jnp.where(kept, weight, 0)
    return loss.sum(), weight.sum()


def cross_entropy(logits: jax.Array, labels: jax.Array, chosen: Options = Options()) -> jax.Array:
    """Mean over non-ignored pixels; 0 (with zero gradient) where every pixel is ignored."""
    bound = None
    if chosen.ohem_threshold:
        bound = hard_bound(pixel_losses(logits, labels, chosen)[2], labels, chosen)
    return mean(*cross_entropy_sum(logits, labels, chosen, bound))


def mean(total: jax.Array, count: jax.Array) -> jax.Array:
    """total / count; 0 where nothing counts."""
    return total / jnp.where(count > 0, count, 1)


def over_slabs(
    sums: Callable[[jax.Array, jax.Array], Any],
    logits: jax.Array,
    labels: jax.Array,
    grid: str,
    stride: int,
    columns: str = "",
) -> Any:
    """sums(logits resized to the labels' size, labels), without ever having all of these logits.

    logits: [B, ceil(H / stride), ceil(W / stride), K]; labels: uint8 [B, H, W]. `sums` takes some
    rows of both and returns sums over their pixels (a tree), in which ignored pixels count nothing.
    The rows are resized, reduced, and in the backward pass resized once more, slab by slab. Logits
    that are the pixels' own (stride 1) are there already: taken at once.
    columns: how `layers.resize_columns` does its part.
    """
    if stride == 1:
        return sums(logits, labels)
    matrix, parts = _slabs(logits, labels, grid, stride)

    @jax.checkpoint
    def slab(logits, matrix, labels):
        return sums(_resized(logits, matrix, labels.shape[2], grid, stride, columns), labels)

    if len(parts) == 1:
        return slab(logits, matrix[0], parts[0])
    empty = jax.eval_shape(slab, logits, matrix[0], parts[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)

    def add(total, part):
        return jax.tree.map(jnp.add, total, slab(logits, *part)), None

    return jax.lax.scan(add, zeros, (matrix, parts))[0]


def pixels_over_slabs(
    pixels: Callable[[jax.Array, jax.Array], jax.Array],
    logits: jax.Array,
    labels: jax.Array,
    grid: str,
    stride: int,
) -> jax.Array:
    """pixels(logits resized to the labels' size, labels), [B, H, W], as `over_slabs` goes.

    For what needs no gradient: none is kept ready.
    """
    logits = jax.lax.stop_gradient(logits)
    if stride == 1:
        return pixels(logits, labels)
    matrix, parts = _slabs(logits, labels, grid, stride)

    def slab(part):
        matrix, labels = part
        return pixels(_resized(logits, matrix, labels.shape[2], grid, stride, ""), labels)

    rows = jnp.moveaxis(jax.lax.map(slab, (matrix, parts)), 0, 1)  # [B, count, rows, W]
    return rows.reshape(len(labels), -1, labels.shape[2])[:, : labels.shape[1]]


def _slabs(logits, labels, grid: str, stride: int) -> tuple[jax.Array, jax.Array]:
    """Row matrices [count, rows, h] and labels [count, B, rows, W]; beyond H they are ignored."""
    batch, height, width = labels.shape
    bytes_per_image = height * width * logits.shape[-1] * logits.dtype.itemsize
    count = min(-(-bytes_per_image // SLAB_BYTES), height)
    rows = -(-height // count)
    matrix = interpolation_matrix(logits.shape[1], height, grid, 1 / stride)
    matrix = jnp.pad(matrix, ((0, rows * count - height), (0, 0))).astype(logits.dtype)
    padding = ((0, 0), (0, rows * count - height), (0, 0))
    labels = jnp.pad(labels, padding, constant_values=IGNORE)
    labels = jnp.moveaxis(labels.reshape(batch, count, rows, width), 1, 0)
    return matrix.reshape(count, rows, -1), labels


def _resized(logits, matrix, width: int, grid: str, stride: int, columns: str) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST
    some = jnp.einsum("rh,bhwk->brwk", matrix, logits, precision=exact)
    return resize_columns(some, width, grid, 1 / stride, columns)
