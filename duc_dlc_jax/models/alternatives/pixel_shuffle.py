"""Dense upsampling convolution of Wang et al. (2018): the other "DUC", without guidance."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from duc_dlc_jax.models.layers import parameter_dtype


@functools.partial(jax.jit, static_argnames="ratio")  # keeps its name, as `layers.max_pool` does
def pixel_shuffle(x: jax.Array, ratio: int) -> jax.Array:
    """[B, h, w, r * r * C] -> [B, r h, r w, C]: channel (i r + j) C + c goes to cell (i, j)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, ratio, ratio, channels // ratio**2)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, ratio * height, ratio * width, channels // ratio**2)


class PixelShuffle(nn.Module):
    """Features of a cell -> the class scores of all pixels of the cell: one 3x3 with bias.

    Published for cells of 8 x 8 pixels. Their code sums four such 3x3, dilated by 6, 12, 18 and 24;
    here it is one, without dilation, and what looks further is the context's part [I].
    """

    classes: int
    ratio: int  # pixels on a side of a cell
    conv: Any

    @nn.compact
    def __call__(self, x: jax.Array, size: Sequence[int]) -> jax.Array:
        """[B, H/ratio, W/ratio, C], (H, W) -> logits [B, H, W, classes]; float32 or wider."""
        x = self.conv(self.classes * self.ratio**2, 3, bias=True, name="scores")(x)
        pixels = pixel_shuffle(x, self.ratio)[:, : size[0], : size[1]]
        return jnp.asarray(pixels, parameter_dtype(x.dtype))
