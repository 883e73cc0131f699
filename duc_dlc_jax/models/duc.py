"""Dense upsampling convolution (section III.B, figure 3): a guided filter made of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from duc_dlc_jax.models.resizing import resize_bilinear

SLAB_BYTES = 2**26  # of g(I), in float32, at a time where it runs in slabs


class DUC(nn.Module):
    """Brings I_l to the grid of I_m, guided by the image; eq. 3: O = a * G~ + b.

    The coefficients a and b come from one linear 1x1 convolution of [G~, I~]. It is kept as its two
    halves: a linear 1x1 commutes with bilinear interpolation, so the I~ half runs on the low
    resolution and its product is upsampled (`commute=False` upsamples first: the same numbers).

    `upsampled`: what comes from the grid of I_l to that of I_m. "features": I~, and a, b and O are
    on I_m's grid. "coefficients": a and b, made of I~ and of G~ on I_l's grid, as in the fast
    guided filter; G~ itself keeps I_m's grid. "output": O, with all before it on I_l's grid.

    `slabs` (inference) runs g(I) and the stride-4 convolution in slabs of rows: the same numbers in
    bounded memory. `valid_sizes`: as in `resizing.resize_bilinear`.
    """

    width: int  # channels of G~, I~, a, b, O
    dilation: int
    guidance_width: int
    guidance_kernel: int
    guidance_stride: int  # 1: g(I) on the image; 2: on the image at half its resolution
    upsampled: str
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

        step, here = 8 / self.feature_stride, guidance  # G~ where a and b are made
        low_half = self.conv(2 * self.width, name="coefficients_low")
        if self.upsampled != "features":
            here, from_low = self._resize(guidance, low.shape[1:3], 1 / step), low_half(low)
        elif self.commute:
            from_low = self._resize(low_half(low), size, step)
        else:
            from_low = low_half(self._resize(low, size, step))
        from_guidance = self.conv(2 * self.width, bias=True, name="coefficients_guidance")(here)
        coefficients = from_guidance + from_low
        if self.upsampled == "coefficients":
            coefficients, here = self._resize(coefficients, size, step), guidance
        a, b = jnp.split(coefficients, 2, axis=-1)
        output = a * here + b
        if self.upsampled == "output":
            output = self._resize(output, size, step)
        return jnp.concatenate([output, middle], axis=-1)

    def guidance_convolutions(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Numbers read, numbers written, weights of one, weights of G~'s convolutions, one image.

        As the paper has them, on the whole image; `_strided` computes less.
        """
        height, width = (-(-n // self.guidance_stride) for n in (height, width))
        pixels, cells = height * width, -(-height // 4) * -(-width // 4)
        channels, taps = self.guidance_width, self.guidance_kernel**2
        values, fan_in = pixels * channels, taps * channels
        return {
            "g_conv1": (pixels * 3, values, 3, 3 * channels),
            "g_conv2": (values, values, channels, channels**2),
            "guidance_conv": (values, cells * self.width, fan_in, fan_in * self.width),
        }

    def _resize(self, x, size: Sequence[int], step: float, axes: Sequence[int] = (0, 1)):
        return resize_bilinear(x, size, self.grid, step, self.valid_sizes, axes)

    def _guidance(self, image: jax.Array, size: Sequence[int]) -> jax.Array:
        """G~ [B, *size, width]: g(I), a stride-4 convolution, and a resize to I_m's grid."""
        if self.guidance_stride > 1:
            half = tuple(-(-n // self.guidance_stride) for n in image.shape[1:3])
            image = self._resize(image, half, self.guidance_stride)
        step = 8 / (4 * self.guidance_stride)
        batch, (rows, columns) = image.shape[0], (-(-n // 4) for n in image.shape[1:3])
        norm = self.norm(name="guidance_bn")
        row_bytes = 4 * batch * columns * self.guidance_kernel**2 * self.guidance_width
        known = not any(map(jax.export.is_symbolic_dim, (batch, rows, columns)))
        count = min(-(-rows * row_bytes // SLAB_BYTES), rows) if self.slabs and known else 1
        slab = -(-rows // count)
        strided = self._strided(image, slab * count)
        if count == 1:
            return self._resize(norm(strided(0, rows)), size, step)
        factor, shift = norm.scale_and_shift(jax.eval_shape(lambda: strided(0, slab)))

        def one(_, first):
            g = strided(first, slab) * factor[:, None, None] + shift[:, None, None]
            return None, self._resize(g.astype(image.dtype), (slab, size[1]), step, axes=(1,))

        _, slabs = jax.lax.scan(one, None, slab * jnp.arange(count))
        g = jnp.moveaxis(slabs, 0, 1).reshape(batch, slab * count, size[1], self.width)
        return self._resize(g[:, :rows], size, step, axes=(0,))

    def _strided(self, image: jax.Array, rows: int) -> Callable[[Any, int], jax.Array]:
        """Returns (first, n) -> n rows of the stride-4 convolution of G_h = g(I), of `rows` in all.

        G_h, as large as the image, is never there: it is computed at the pixels that a kernel
        reads. The 1x1 after its ReLU is multiplied into the kernel, and the statistics of its BN
        are taken from the moments of the image. Beyond the image G_h is 0, and not what g makes of
        0, so the bias of that 1x1 counts for the pixels inside alone.
        """
        k, width, exact = self.guidance_kernel, self.guidance_width, jax.lax.Precision.HIGHEST
        conv1, _ = self.conv(width, name="g_conv1").weights(image.shape[-1])
        conv2, bias = self.conv(width, bias=True, name="g_conv2").weights(width)
        kernel, _ = self.conv(self.width, k, 4, name="guidance_conv").weights(width)
        factor, shift = self.norm(name="g_bn").scale_and_shift(
            image, conv1[0, 0].astype(image.dtype)
        )
        conv1 = conv1[0] * factor[:, None]  # [groups, 3, width]
        kernel = kernel.reshape(k * k, width, self.width)
        composed = jnp.einsum("cd,tdf->tcf", conv2[0, 0], kernel, precision=exact)
        composed = composed.reshape(k * k * width, self.width).astype(image.dtype)
        bias = jnp.einsum("d,tdf->tf", bias, kernel, precision=exact)
        height, columns = image.shape[1:3]
        sizes = jnp.asarray([[height, columns]])
        if self.valid_sizes is not None:
            sizes = self.valid_sizes((height, columns))
        pad, columns = (k - 1) // 2, -(-columns // 4)
        padded = _padded(image, pad, (4 * rows - 4 + k, 4 * columns - 4 + k))

        def strided(first, count: int) -> jax.Array:
            part = jax.lax.dynamic_slice_in_dim(padded, 4 * first, 4 * count - 4 + k, 1)
            x = jnp.stack(_taps(part, k, count, columns), 3)  # [B, count, columns, k * k, 3]
            g = x.reshape(len(conv1), -1, *x.shape[1:]).astype(conv1.dtype)
            g = sum(
                g[..., c, None] * conv1[:, None, None, None, None, c] for c in range(x.shape[-1])
            )
            g = nn.relu(g + shift[:, None, None, None, None])
            g = g.reshape(*x.shape[:-1], width)
            inside = _inside(4 * first + jnp.arange(count) * 4 - pad, columns, k, sizes)
            g = jnp.where(inside[..., None], g, 0).astype(image.dtype)
            g = g.reshape(*x.shape[:3], k * k * width)
            # In inference wide up to its BN, so that slabs and their shapes round nothing.
            dtype = bias.dtype if self.slabs else image.dtype
            y = jax.lax.dot_general(
                g, composed, (((3,), (0,)), ((), ())), preferred_element_type=dtype
            )
            border = jnp.dot(inside.astype(bias.dtype), bias, precision=exact)
            return y + border.astype(dtype)

        return strided


def _padded(image: jax.Array, before: int, size: Sequence[int]) -> jax.Array:
    """[B, H, W, C] with `before` zeros above and left, cut or filled up to `size`."""
    ends = [n - before - now for n, now in zip(size, image.shape[1:3], strict=True)]
    edges = ((0, 0, 0), (before, ends[0], 0), (before, ends[1], 0), (0, 0, 0))
    return jax.lax.pad(image, jnp.zeros((), image.dtype), edges)


def _taps(image: jax.Array, kernel: int, rows: int, columns: int) -> list[jax.Array]:
    """What each position of a kernel with stride 4 reads: kernel**2 of [B, rows, columns, C]."""
    ends = 4 * rows - 3, 4 * columns - 3
    at = [(i, j) for i in range(kernel) for j in range(kernel)]
    return [image[:, i : i + ends[0] : 4, j : j + ends[1] : 4] for i, j in at]


def _inside(tops: jax.Array, columns: int, kernel: int, sizes: jax.Array) -> jax.Array:
    """Which of these reads lie in images of sizes [B, 2]: bool [B, rows, columns, kernel**2].

    tops: the first image row that each row of windows reads, int [rows].
    """
    lefts = 4 * jnp.arange(columns) - (kernel - 1) // 2
    inside = []
    for axis, starts in enumerate((tops, lefts)):
        at = (starts[:, None] + jnp.arange(kernel)[None])[None]
        inside.append((at >= 0) & (at < sizes[:, axis, None, None]))
    rows, lefts = inside[0][:, :, None, :, None], inside[1][:, None, :, None, :]
    both = rows & lefts
    return both.reshape(*both.shape[:3], kernel * kernel)
