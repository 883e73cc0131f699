"""Names of `config.model.upsampling` and `config.model.context` -> modules.

An image goes through backbone, upsampling, context and classifier to the resize to its own size.
An upsampling fixes the grid that the context and the classifier run on, and that of the logits:

name           grid of the context   grid of the logits   what it reads
none           1/OS                  1/OS                 layer4
bilinear       1/8                   1/8                  layer2, layer4
duc            1/8                   1/8                  the image, layer2, layer4
jpu            1/8                   1/8                  layer2, layer3, layer4
dupsampling    1/OS                  the pixels           layer4, and acts on the scores
guided_filter  1/OS                  the pixels           layer4, and acts on the scores
pixel_shuffle  1/OS                  the pixels           layer4, and makes the scores
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from duc_dlc_jax.models.alternatives.aspp import ASPP
from duc_dlc_jax.models.alternatives.bilinear import Bilinear
from duc_dlc_jax.models.alternatives.ccl import CCL
from duc_dlc_jax.models.alternatives.dense_aspp import DenseASPP
from duc_dlc_jax.models.alternatives.dupsampling import DUpsampling
from duc_dlc_jax.models.alternatives.fcn import FCNHead
from duc_dlc_jax.models.alternatives.guided_filter import GuidedFilter
from duc_dlc_jax.models.alternatives.jpu import JPU
from duc_dlc_jax.models.alternatives.pixel_shuffle import PixelShuffle
from duc_dlc_jax.models.alternatives.psp import PSP
from duc_dlc_jax.models.dlc import DLC
from duc_dlc_jax.models.duc import DUC

WIDTHS = {"fcn": 512, "aspp": 256, "dense_aspp": 512, "ccl": 512, "psp": 512}  # published, or [I]
CLASSIFYING = ("dupsampling", "pixel_shuffle")  # upsamplings in the classifier's place
ON_SCORES = (*CLASSIFYING, "guided_filter")  # after the context
RATES = {"dense_aspp": (3, 6, 12, 18, 24), "ccl": (3, 6, 12, 18)}


def context_stride(upsampling: str, output_stride: int) -> int:
    """Stride, against the image, of the grid that the context module runs on."""
    return output_stride if upsampling in ("none", *ON_SCORES) else 8


def logit_stride(upsampling: str, output_stride: int) -> int:
    """Stride, against the image, of the network's last grid; 1: the logits are the pixels'."""
    if upsampling in ON_SCORES:
        return 1
    return context_stride(upsampling, output_stride)


def upsampled(
    net: Any, image: jax.Array, features: Sequence[jax.Array], conv: Any, norm: Any, **options: Any
) -> jax.Array:
    """What the context module reads: [B, H/s, W/s, C], s being `context_stride`.

    net: the `Segmenter`, inside whose call this is; image [B, H, W, 3]; features: of layer1 to
    layer4; options: slabs of `DUC`, and valid_sizes.
    """
    _, middle, layer3, low = features
    sizes, grid = options["valid_sizes"], net.resize_grid
    if net.upsampling == "duc":
        module = DUC(
            net.duc_width,
            net.duc_dilation,
            net.guidance_width,
            net.guidance_kernel,
            net.guidance_stride,
            net.duc_upsampled,
            net.commute_coefficients,
            net.output_stride,
            grid,
            conv=conv,
            norm=norm,
            **options,
            name="duc",
        )
        return module(image, middle, low)
    if net.upsampling == "bilinear":
        control = net.duc_width, net.duc_dilation, net.output_stride, grid
        return Bilinear(*control, conv, norm, sizes, name="bilinear")(middle, low)
    if net.upsampling == "jpu":
        strides = 8, min(16, net.output_stride), net.output_stride
        jpu = JPU(net.duc_width, strides, grid, conv, norm, sizes, name="jpu")
        return jpu((middle, layer3, low))
    return low


def context(net: Any, conv: Any, norm: Any, dropout: Any, valid_sizes: Any) -> Callable:
    """The context module, [B, h, w, C] -> [B, h, w, D]; net: as for `upsampled`."""
    name = net.context
    if name == "dlc":
        return DLC(net.dlc_width, net.dlc_growth, net.dlc_rates, conv, norm, name="dlc")
    if name == "none":
        return lambda x: x
    width = net.context_width or WIDTHS[name]
    rates = tuple(net.context_rates) or RATES.get(name, ())
    if name == "fcn":
        return FCNHead(width, conv, norm, name=name)
    if name == "aspp":  # published for 1/8 and 1/16: the same reach in pixels at any stride
        stride = context_stride(net.upsampling, net.output_stride)
        rates = rates or tuple(i * 96 // stride for i in (1, 2, 3))
        return ASPP(width, rates, conv, norm, dropout, valid_sizes, name=name)
    if name == "dense_aspp":
        return DenseASPP(width, width // 4, rates, conv, norm, dropout, name=name)
    if name == "ccl":
        return CCL(width, width // 4, rates, conv, norm, name=name)
    return PSP(width, conv, norm, valid_sizes, name=name)


def classified(net: Any, x: jax.Array, size: Sequence[int], conv: Any) -> jax.Array:
    """The pixels' logits by one of `CLASSIFYING`: x [B, h, w, D] -> [B, *size, classes]."""
    sides = net.num_classes, net.output_stride
    if net.upsampling == "dupsampling":
        return DUpsampling(*sides, net.dupsampling_width, conv, name="dupsampling")(x, size)
    return PixelShuffle(*sides, conv, name="pixel_shuffle")(x, size)


def refined(
    net: Any, image: jax.Array, logits: jax.Array, conv: Any, valid_sizes: Any
) -> jax.Array:
    """The pixels' logits [B, H, W, classes], filtered by the image where the upsampling does so."""
    if net.upsampling == "guided_filter":
        module = GuidedFilter(net.guidance_width, conv, valid_sizes, name="guided_filter")
        return module(image, logits)
    return logits
