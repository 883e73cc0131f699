"""Densely connected dilated convolutions of DenseASPP (Yang et al., 2018), the origin of DLC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

DROPOUT = 0.1  # of whole channels, of each branch


class DenseASPP(nn.Module):
    """Per rate d: BN, ReLU, 1x1 -> width, BN, ReLU, 3x3 dilation d -> growth, joined to its input.

    [B, h, w, C] -> [B, h, w, C + len(rates) * growth]. Convolutions have biases; the first branch
    begins without BN, as its input comes from one. Published: width 512, growth 128, rates 3, 6,
    12, 18, 24, on the 1,104 channels of DenseNet-161.
    """

    width: int
    growth: int
    rates: Sequence[int]
    conv: Any
    norm: Any
    dropout: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, rate in enumerate(self.rates):
            y = x if i == 0 else self.norm(name=f"d{rate}_bn1")(x)
            y = self.conv(self.width, bias=True, name=f"d{rate}_conv1")(nn.relu(y))
            y = nn.relu(self.norm(name=f"d{rate}_bn2")(y))
            y = self.conv(self.growth, 3, 1, rate, bias=True, name=f"d{rate}_conv2")(y)
            y = self.dropout(DROPOUT, broadcast_dims=(1, 2), name=f"d{rate}_dropout")(y)
            x = jnp.concatenate([x, y], axis=-1)
        return x
