"""Dense upsampling convolution (section III.B, figure 3): a guided filter made of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from duc_dlc_jax.models.layers import resize_bilinear, zero_beyond

SLAB_BYTES = 2**26  # of g(I) at a time, where it runs in slabs


class DUC(nn.Module):
    """Brings I_l to the grid of I_m, guided by the image; eq. 3: O = a * G~ + b.

    The coefficients a and b come from one linear 1x1 convolution of [G~, I~]. It is kept as its two
    halves: a linear 1x1 commutes with bilinear interpolation, so the I~ half runs on the low
    resolution and its product is upsampled (`commute=False` upsamples first: the same numbers).

    `slabs` runs g(I), as large as the image, and the stride-4 convolution in slabs of rows: the
    same numbers, in bounded memory. `valid_sizes`: as in `layers.resize_bilinear`.
    """

    width: int  # channels of G~, I~, a, b, O
    dilation: int
    guidance_width: int
    guidance_kernel: int
    guidance_stride: int  # 1: g(I) on the image; 2: on the image at half its resolution
    commute: bool
    feature_stride: int  # of I_l against the image
    grid: str
    conv: Any
    norm: Any
    slabs: bool = False
    valid_sizes: Callable[[Sequence[int]], jax.Array] | None = None

    @nn.compact
    def __call__(self, image: jax.Array, middle: jax.Array, low: jax.Array) -> jax.Array:
        """image I: [B, H, W, 3]; I_m: [B, H/8, W/8, C]; I_l: [B, H/OS, W/OS, D].

        Returns [O, I_m]: [B, H/8, W/8, width + C].
        """
        size = middle.shape[1:3]
        if self.slabs:  # adds 0, so that g(I) waits for the backbone and not both are in memory
            image = image + jnp.minimum(jnp.abs(low).max(), 0)
        guidance = self._guidance(image, size)
        low = self.conv(self.width, 3, 1, self.dilation, name="low_conv")(low)
        low = nn.relu(self.norm(name="low_bn")(low))

        step = 8 / self.feature_stride
        low_half = self.conv(2 * self.width, name="coefficients_low")
        if self.commute:
            from_low = self._resize(low_half(low), size, step)
        else:
            from_low = low_half(self._resize(low, size, step))
        from_guidance = self.conv(2 * self.width, bias=True, name="coefficients_guidance")(guidance)
        a, b = jnp.split(from_guidance + from_low, 2, axis=-1)
        return jnp.concatenate([a * guidance + b, middle], axis=-1)

    def _resize(self, x, size: Sequence[int], step: float, axes: Sequence[int] = (0, 1)):
        return resize_bilinear(x, size, self.grid, step, self.valid_sizes, axes)

    def _guidance(self, image: jax.Array, size: Sequence[int]) -> jax.Array:
        """G~ [B, *size, width]: g(I), a stride-4 convolution, and a resize to I_m's grid."""
        if self.guidance_stride > 1:
            half = tuple(-(-n // self.guidance_stride) for n in image.shape[1:3])
            image = self._resize(image, half, self.guidance_stride)
        step = 8 / (4 * self.guidance_stride)
        batch, height, width, _ = image.shape
        row_bytes = batch * width * self.guidance_width * image.dtype.itemsize
        rows = max(SLAB_BYTES // (4 * row_bytes), 4)  # of the stride-4 grid, per slab
        if self.slabs and 4 * rows < height:
            g = self._strided_slabs(image, rows, size[1], step)
            return self._resize(g, size, step, axes=(0,))
        return self._resize(self._strided(self._g(image), self.conv), size, step)

    def _g(self, image: jax.Array) -> jax.Array:
        g = self.conv(self.guidance_width, name="g_conv1")(image)
        g = nn.relu(self.norm(name="g_bn")(g))
        return self.conv(self.guidance_width, bias=True, name="g_conv2")(g)

    def _strided(self, g: jax.Array, conv: Any) -> jax.Array:
        g = conv(self.width, self.guidance_kernel, 4, name="guidance_conv")(g)
        return self.norm(name="guidance_bn")(g)

    def _strided_slabs(self, image: jax.Array, rows: int, width: int, step: float) -> jax.Array:
        """`_strided(_g(image))` resized to `width`, `rows` output rows at a time.

        A slab has an output row more on either side, whose wrong values, next to the convolution's
        padding, are dropped. Beyond the image g is 0, as padding is.
        """
        size = image.shape[1:3]
        sizes = jnp.asarray([size]) if self.valid_sizes is None else self.valid_sizes(size)
        total = -(-size[0] // 4)
        count = -(-total // rows)
        rows = -(-total // count)
        below = 4 * (count * rows + 1) - size[0]
        padded = jnp.pad(image, ((0, 0), (4, below), (0, 0), (0, 0)))
        conv = partial(self.conv, valid_sizes=None)  # its grid is the image's: masked here

        def slab(module, carry, first):
            top = 4 * (first - 1)  # the slab's first row in the image
            g = module._g(jax.lax.dynamic_slice_in_dim(padded, top + 4, 4 * (rows + 2), 1))
            above = (top + jnp.arange(g.shape[1]) < 0)[None, :, None, None]
            g = zero_beyond(jnp.where(above, 0, g), sizes - jnp.stack([top, 0 * top])[None])
            g = module._strided(g, conv)[:, 1:-1]
            return carry, module._resize(g, (rows, width), step, axes=(1,))

        scan = nn.scan(slab, variable_broadcast=["params", "batch_stats"], split_rngs={})
        _, slabs = scan(self, None, rows * jnp.arange(count))
        slabs = jnp.moveaxis(slabs, 0, 1)  # [B, count, rows, width, channels]
        return slabs.reshape(len(image), count * rows, *slabs.shape[3:])[:, :total]
