"""Per-pixel cross-entropy (eq. 6), averaged over the pixels that are not ignored."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from duc_dlc_jax.data.labels import IGNORE


def cross_entropy_sum(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """logits [B, H, W, K], labels uint8 [B, H, W] -> (summed cross-entropy, valid pixels).

    Both are sums over the global batch, so that dividing them averages over pixels and not over
    devices. The target's logit is selected by comparison: its gradient needs no scatter.
    """
    valid = labels != IGNORE
    classes = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, None, None]
    target = jnp.where(labels[..., None] == classes, logits, 0).sum(-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - target
    return jnp.where(valid, losses, 0).sum(), valid.sum()


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over non-ignored pixels; 0 (with zero gradient) where every pixel is ignored."""
    total, count = cross_entropy_sum(logits, labels)
    return total / jnp.maximum(count, 1)
