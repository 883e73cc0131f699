"""ResNet with bottleneck blocks at output stride 32, 16 or 8 (He et al., 2016; FastFCN)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from duc_dlc_jax.models.layers import max_pool
from duc_dlc_jax.models.valid_cells import zero_beyond

# Blocks per stage; 14 and 26 are this project's small variants for tests and the demo.
BLOCKS = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    269: (3, 30, 48, 8),
}


def stage_strides(output_stride: int) -> tuple[tuple[int, int, int], ...]:
    """(stride, dilation of the first block, dilation of the others) of layer1..layer4."""
    return {
        32: ((1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)),
        16: ((1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2)),
        8: ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)),
    }[output_stride]


class Bottleneck(nn.Module):
    """1x1 -> width, 3x3 -> width, 1x1 -> 4 width, added to the (projected) input."""

    width: int
    stride: int
    dilation: int
    stride_on: str
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = (self.stride, 1) if self.stride_on == "1x1" else (1, self.stride)
        y = self.conv(self.width, 1, first, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.width, 3, second, self.dilation, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        y = self.norm(name="bn3")(self.conv(4 * self.width, 1, name="conv3")(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.width, 1, self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """[B, H, W, 3] -> the outputs of layer1..layer4, 4w, 8w, 16w, 32w channels (w = width).

    Grids: 1/4, 1/8, then up to 1/output_stride. Names of parameters follow torchvision's
    (`layer3.5.conv2` is `layer3_5/conv2`). `valid_sizes`: as in `layers.Conv`; `block`:
    `Bottleneck`, or `nn.remat` of it.
    """

    depth: int
    width: int
    stem: str
    stride_on: str
    output_stride: int
    conv: Any
    norm: Any
    valid_sizes: Any = None
    block: Any = Bottleneck

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        if self.stem == "plain":
            x = self.conv(self.width, 7, 2, name="conv1")(x)
        else:
            width = self.width if self.stem == "deep" else -(-self.width // 2)
            x = self.conv(width, 3, 2, name="stem_conv1")(x)
            x = nn.relu(self.norm(name="stem_bn1")(x))
            x = self.conv(width, 3, name="stem_conv2")(x)
            x = nn.relu(self.norm(name="stem_bn2")(x))
            x = self.conv(2 * width, 3, name="conv1")(x)
        x = nn.relu(self.norm(name="bn1")(x))
        if self.valid_sizes is not None:  # 0 after a ReLU is as good as max_pool's own -inf
            x = zero_beyond(x, self.valid_sizes(x.shape[1:3]))
        x = max_pool(x)
        outputs = []
        stages = zip(BLOCKS[self.depth], stage_strides(self.output_stride), strict=True)
        for stage, (blocks, (stride, first_dilation, dilation)) in enumerate(stages):
            for block in range(blocks):
                x = self.block(
                    self.width * 2**stage,
                    stride if block == 0 else 1,
                    first_dilation if block == 0 else dilation,
                    self.stride_on,
                    self.conv,
                    self.norm,
                    name=f"layer{stage + 1}_{block}",
                )(x)
            outputs.append(x)
        return tuple(outputs)
