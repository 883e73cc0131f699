"""Atrous spatial pyramid pooling of DeepLabv3 (Chen et al., 2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from duc_dlc_jax.models.layers import mean_of_valid

DROPOUT = 0.5  # of single values after the projection, as in torchvision's DeepLabHead


class ASPP(nn.Module):
    """Parallel 1x1, dilated 3x3 and image pooling, projected; then 3x3 -> width.

    [B, h, w, C] -> [B, h, w, width]; every convolution (no bias) is followed by BN and ReLU. With
    width 256 and the rates 12, 24, 36 it is torchvision's `DeepLabHead` without the classifier.
    `valid_sizes`: as in `resizing.resize_bilinear`; the image's mean is that of its valid cells.
    """

    width: int
    rates: Sequence[int]
    conv: Any
    norm: Any
    dropout: Any
    valid_sizes: Callable[[Sequence[int]], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        branches = [self._unit(x, "point")]
        branches += [self._unit(x, f"rate{i + 1}", 3, d) for i, d in enumerate(self.rates)]
        mean = mean_of_valid(x, self.valid_sizes)
        pooled = self._unit(mean, "pool", norm_fields={"valid_sizes": None})
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        x = self._unit(jnp.concatenate(branches, axis=-1), "project")
        x = self.dropout(DROPOUT, name="dropout")(x)
        return self._unit(x, "out", 3)

    def _unit(self, x, name, kernel=1, dilation=1, norm_fields=None):
        x = self.conv(self.width, kernel, 1, dilation, name=f"{name}_conv")(x)
        return nn.relu(self.norm(**norm_fields or {}, name=f"{name}_bn")(x))
