"""Data-dependent upsampling of the prediction (DUpsampling; Tian et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from duc_dlc_jax.models.alternatives.pixel_shuffle import pixel_shuffle
from duc_dlc_jax.models.layers import parameter_dtype


class DUpsampling(nn.Module):
    """Features of a cell -> `width` numbers -> the class scores of all pixels of the cell, over T.

    Linear: 1x1 (bias) -> width, 1x1 W -> ratio^2 classes, rearranged to pixels; T is the softmax's
    learned temperature, kept as `scale` = 1 / T from 1 on. W starts from `label_components`.
    """

    classes: int
    ratio: int  # pixels on a side of a cell
    width: int
    conv: Any

    @nn.compact
    def __call__(self, x: jax.Array, size: Sequence[int]) -> jax.Array:
        """[B, H/ratio, W/ratio, C], (H, W) -> logits [B, H, W, classes]; float32 or wider."""
        x = self.conv(self.width, bias=True, name="compress")(x)
        x = self.conv(self.classes * self.ratio**2, name="w")(x)
        wide = parameter_dtype(x.dtype)
        scale = self.param("scale", nn.initializers.ones, (), wide)
        pixels = pixel_shuffle(x, self.ratio)[:, : size[0], : size[1]]
        return jnp.asarray(pixels, wide) * scale


def label_components(blocks: np.ndarray, classes: int, width: int) -> np.ndarray:
    """Labels of n blocks, uint8 [n, r, r] -> float64 [m, r * r * classes], m = min(width, rank).

    The directions in which one-hot labels, in the order of `w`'s channels, are compressed to m
    numbers and back with the least squared error; their principal components, uncentred.
    """
    labels = blocks.reshape(len(blocks), -1)
    one_hot = [(labels == k).astype(np.float64) for k in range(classes)]  # each [n, r * r]
    values, vectors = np.linalg.eigh(sum(x @ x.T for x in one_hot))
    chosen = [i for i in np.argsort(-values)[:width] if values[i] > 1e-9 * values[-1]]
    project = (vectors[:, chosen] / np.sqrt(values[chosen])).T
    return np.stack([project @ x for x in one_hot], -1).reshape(len(chosen), -1)
