"""Per-pixel cross-entropy (eq. 6), averaged over the pixels that are not ignored; its options.

The logits of a pixel enter through a few numbers, `pixel_scores`, of which every option is made. Of
the pixels' losses and weights only sums over the global batch are taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.pixel_scores import Scores, pixel_scores


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


def table_of(chosen: Options, classes: int) -> tuple[float, ...]:
    """Of `Scores.weighted`: what label smoothing gives each class."""
    return chosen.class_weights or (1.0,) * classes if chosen.label_smoothing else ()


def sums(
    scores: Scores, labels: jax.Array, chosen: Options = Options(), classes: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Summed losses and summed weights of the pixels that count, of the global batch.

    Their quotient is the mean loss, as PyTorch's `CrossEntropyLoss` has it: with smoothing e the
    target is (1 - e) of the label's class and e / K of each class; losses are weighted by their
    class, each share by its own, and the divisor holds the weights of the labels. Without class
    weights it is the number of valid pixels. scores: with the table of `table_of`.
    """
    counts = labels != IGNORE
    nll = scores.normalizer - scores.target
    weight = pixel_weights(labels, chosen, nll.dtype)
    loss = weight * nll if chosen.class_weights else nll
    if chosen.label_smoothing:
        total = sum(table_of(chosen, classes))
        others = total * scores.normalizer - scores.weighted
        loss = (1 - chosen.label_smoothing) * loss + chosen.label_smoothing / classes * others
    if chosen.ohem_threshold:
        nll = jnp.where(counts, nll, 0)
        counts &= nll.astype(jnp.float32) >= hard_bound(nll, labels, chosen)
    return jnp.where(counts, loss, 0).sum(), jnp.where(counts, weight, 0).sum()


def pixel_weights(labels: jax.Array, chosen: Options, dtype: Any) -> jax.Array:
    """What each pixel's loss is multiplied by, [B, H, W], without regard to what is ignored."""
    if not chosen.class_weights:
        return jnp.ones(labels.shape, dtype)
    table = jnp.asarray(chosen.class_weights, dtype)
    return table[jnp.where(labels != IGNORE, labels, 0)]


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


def loss_and_accuracy(
    logits: jax.Array,
    labels: jax.Array,
    chosen: Options = Options(),
    grid: str = "corners",
    stride: int = 1,
    rounded: Any = None,
    shards: int = 1,
    of: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mean loss, and the share of the labelled pixels that are right; see `pixel_scores`, `sums`.

    0 (with zero gradient) where every pixel is ignored. of: labels of the batch that this is a part
    of, uint8 [B, H, W]: its pixels divide, so that the results of its parts add up to its own. Not
    with `ohem_threshold`, by which the pixels that count are those of the whole batch.
    """
    classes = logits.shape[-1]
    scores: Any = pixel_scores(
        logits,
        labels,
        table=table_of(chosen, classes),
        grid=grid,
        stride=stride,
        rounded=rounded,
        shards=shards,
    )
    total, divisor = sums(scores, labels, chosen, classes)
    if of is not None:
        divisor = jnp.where(of != IGNORE, pixel_weights(of, chosen, total.dtype), 0).sum()
    labelled = ((labels if of is None else of) != IGNORE).sum()
    return mean(total, divisor), scores.right.sum() / jnp.maximum(labelled, 1)


def cross_entropy(logits: jax.Array, labels: jax.Array, chosen: Options = Options()) -> jax.Array:
    """The loss of `loss_and_accuracy`, of logits [B, H, W, K] at the pixels."""
    return loss_and_accuracy(logits, labels, chosen)[0]


def mean(total: jax.Array, count: jax.Array) -> jax.Array:
    """total / count; 0 where nothing counts."""
    return total / jnp.where(count > 0, count, 1)
