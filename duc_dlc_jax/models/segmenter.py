"""The whole network: ResNet -> DUC -> DLC -> classifier (figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.models import layers
from duc_dlc_jax.models.dlc import DLC
from duc_dlc_jax.models.duc import DUC
from duc_dlc_jax.models.resnet import ResNet


class Segmenter(nn.Module):
    """Images -> per-pixel class logits. The fields are those of `config.model`, explained there."""

    num_classes: int
    depth: int
    width: int
    stem: str
    stride_on: str
    output_stride: int
    resize_grid: str
    duc_width: int
    duc_dilation: int
    guidance_width: int
    guidance_kernel: int
    guidance_stride: int
    commute_coefficients: bool
    dlc_width: int
    dlc_growth: int
    dlc_rates: Sequence[int]
    dropout: float
    aux_head: bool
    dtype: Any
    bn_momentum: float
    bn_epsilon: float
    bn_groups: int
    bn_frozen: bool
    bn_running_variance: str
    bn_padding: str

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        train: bool = False,
        valid: jax.Array | None = None,
        coarse: bool = False,
    ) -> jax.Array:
        """images: uint8 RGB [B, H, W, 3] (or normalised floats) -> logits [B, H, W, classes].

        Logits are float32 (float64 for float64 compute). In training the auxiliary head's logits
        are sown as `aux_logits` in the collection `intermediates`; needs the random stream
        `dropout`.

        valid: int32 [B, 2], height and width in pixels of the unpadded part of each image, which
        lies at its top left. In inference the logits of this part then equal those of the image
        without padding. Training reads it with `bn_padding="masked"` alone, and raises ConfigError
        where it is missing then.

        coarse (inference): logits on the 1/8 grid, [B, ceil(H / 8), ceil(W / 8), classes], and
        nothing as large as the image is kept whole but the image itself.
        """
        masked = self.bn_padding == "masked" and train and not self.bn_frozen
        if masked and valid is None:
            raise ConfigError(
                'model.bn_padding="masked" needs batches with an entry "valid", int32 [B, 2]: '
                "height and width of the unpadded part of each crop; this batch has none. "
                'model.bn_padding="counted" does without'
            )
        every = None if valid is None else partial(layers.valid_sizes, valid, images.shape[1:3])
        sizes = None if train else every
        conv = partial(layers.Conv, dtype=self.dtype, valid_sizes=sizes)
        norm = partial(
            layers.BatchNorm,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            groups=self.bn_groups,
            running_variance=self.bn_running_variance,
            use_running_average=self.bn_frozen or not train,
            valid_sizes=every if masked else None,
            dtype=self.dtype,
        )
        resize = partial(layers.resize_bilinear, valid_sizes=sizes)
        image = layers.normalize(images, self.dtype)
        backbone = ResNet(
            self.depth,
            self.width,
            self.stem,
            self.stride_on,
            self.output_stride,
            conv=partial(conv, init=layers.backbone_init),
            norm=norm,
            valid_sizes=sizes,
            name="backbone",
        )
        _, middle, layer3, low = backbone(image)
        x = DUC(
            self.duc_width,
            self.duc_dilation,
            self.guidance_width,
            self.guidance_kernel,
            self.guidance_stride,
            self.commute_coefficients,
            self.output_stride,
            self.resize_grid,
            conv=conv,
            norm=norm,
            slabs=coarse,
            valid_sizes=sizes,
            name="duc",
        )(image, middle, low)
        x = DLC(self.dlc_width, self.dlc_growth, self.dlc_rates, conv, norm, name="dlc")(x)
        if self.aux_head and (train or self.is_initializing()):
            aux = conv(layer3.shape[-1] // 4, 3, name="aux_conv")(layer3)
            aux = nn.relu(norm(name="aux_bn")(aux))
            stride = min(self.output_stride, 16)
            aux = self._classify(aux, conv, train, "aux_classifier")
            aux = resize(aux, images.shape[1:3], self.resize_grid, 1 / stride)
            self.sow("intermediates", "aux_logits", aux)
        logits = self._classify(x, conv, train, "classifier")
        if coarse:
            return logits
        return resize(logits, images.shape[1:3], self.resize_grid, 1 / 8)

    def _classify(self, x, conv, train, name):
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        logits = conv(self.num_classes, bias=True, name=name)(x)
        return logits.astype(layers.parameter_dtype(self.dtype))


def create(model: ml_collections.ConfigDict, num_classes: int, bn_groups: int = 1) -> Segmenter:
    """The network of `config.model`; `bn_groups`: in how many parts, see `sharding.bn_groups`.

    Raises ConfigError for dtype "float64" while JAX's 64-bit numbers are off (`enable_dtype`).
    """
    if model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError('model.dtype="float64" needs jax.config.update("jax_enable_x64", True)')
    fields = dict(model)
    fields["bn_groups"] = bn_groups
    fields["dtype"] = jnp.dtype(model.dtype)
    fields["dlc_rates"] = tuple(model.dlc_rates)
    return Segmenter(num_classes=num_classes, **fields)


def enable_dtype(model: ml_collections.ConfigDict) -> None:
    """Switches JAX to 64-bit numbers where `config.model` computes in float64: before any array."""
    if model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
