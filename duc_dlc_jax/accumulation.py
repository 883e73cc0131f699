"""A batch in parts, one after the other: what a step takes from all of it, in the memory of a part.

Loss, accuracy and gradients are sums over the parts of what the whole batch's pixels divide, so
that they are the whole batch's whatever the parts' shares of ignored pixels. Batch normalisation
sees one part at a time: `train.accumulate=N` normalises as N groups of a batch do
(`layers.BatchNorm`), and equals the batch in one where the statistics are frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]


def split(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B / parts, ...] of each entry; part k has the images k, k + parts, ...

    So each device splits what it holds, and nothing is sent.
    """

    def of(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(of, batch)


def summed(function: Callable[..., Any], batch: Batch, key: jax.Array, parts: int) -> Any:
    """function(part, key) -> (what is summed, what is kept): sums, and [parts, ...] of the kept.

    Each part has its own key.
    """
    each = split(batch, parts), jax.random.split(key, parts)
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), each)
    like = jax.eval_shape(function, *first)[0]

    def add(total, part):
        found, kept = function(*part)
        return jax.tree.map(jnp.add, total, found), kept

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, like), each)


def merged_statistics(running: Any, parts: Any, momentum: float) -> Any:
    """The running statistics after a batch: one update, by the statistics of all its parts.

    running: nested dicts of {mean, var}, [C] each; parts: those of each part, [parts, C]. As for
    groups of a batch the variance is the mean of the parts' variances plus the variance of their
    means. Each part counts alike, with `bn_padding="masked"` too.
    """
    if "mean" not in running:
        return {name: merged_statistics(running[name], parts[name], momentum) for name in running}
    spread = parts["var"].mean(0) + parts["mean"].var(0)
    new = {"mean": parts["mean"].mean(0), "var": spread}
    return {name: momentum * running[name] + (1 - momentum) * new[name] for name in new}
