"""Context contrasted local features (Ding et al., 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class CCL(nn.Module):
    """Chained 3x3 convolutions, each less a dilated one of the same input: local minus context.

    [B, h, w, C] -> [B, h, w, width + len(rates) * growth]: 1x1 -> width, then per rate d local =
    3x3 and context = 3x3 dilation d, both -> growth with BN, and ReLU(local - context); the next
    rate reads ReLU(local). What they contrast is the paper's; the rates are those that Sediqi and
    Lee give for it; widths, and joining by concatenation instead of gated sums, are ours [I].
    """

    width: int
    growth: int
    rates: Sequence[int]
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(self.norm(name="reduce_bn")(self.conv(self.width, name="reduce_conv")(x)))
        parts = [x]
        for rate in self.rates:
            local = self.conv(self.growth, 3, name=f"d{rate}_local_conv")(x)
            local = self.norm(name=f"d{rate}_local_bn")(local)
            context = self.conv(self.growth, 3, 1, rate, name=f"d{rate}_context_conv")(x)
            context = self.norm(name=f"d{rate}_context_bn")(context)
            parts.append(nn.relu(local - context))
            x = nn.relu(local)
        return jnp.concatenate(parts, axis=-1)
