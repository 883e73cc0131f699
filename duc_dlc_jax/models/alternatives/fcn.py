"""The head of FCNs on dilated networks: one 3x3 convolution (torchvision's `FCNHead`)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax


class FCNHead(nn.Module):
    """3x3 -> width, BN, ReLU: [B, h, w, C] -> [B, h, w, width]. Published: width = C / 4."""

    width: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(self.norm(name="bn")(self.conv(self.width, 3, name="conv")(x)))
