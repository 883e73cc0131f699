"""Data-dependent upsampling of the prediction (DUpsampling; Tian et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from duc_dlc_jax.models.alternatives.pixel_shuffle import pixel_shuffle
from duc_dlc_jax.models.layers import parameter_dtype


class DUpsampling(nn.Module):
    """Features of a cell -> `width` numbers -> the class scores of all pixels of the cell, over T.

    Linear: 1x1 (bias) -> width, 1x1 W -> ratio^2 classes, rearranged to pixels; T is the softmax's
    learned temperature, kept as `scale` = 1 / T from 1 on. The paper starts W from the principal
    components of label blocks; here it is learned from a random start, as the rest is [I].
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
