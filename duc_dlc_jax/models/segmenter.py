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
        self, images: jax.Array, train: bool = False, valid: jax.Array | None = None
    ) -> jax.Array:
        """images: uint8 RGB [B, H, W, 3] (or normalised floats) -> logits [B, H, W, classes].

        Logits are float32 (float64 for float64 compute). In training the auxiliary head's logits
        are sown as `aux_logits` in the collection `intermediates`; needs the random stream
        `dropout`.

        valid: int32 [B, 2], height and width in pixels of the unpadded part of each image, which
        lies at its top left. Read in training with `bn_padding="masked"` alone; raises ConfigError
        where it is missing then.
        """
        valid_cells = None
        if self.bn_padding == "masked" and train and not self.bn_frozen:
            if valid is None:
                raise ConfigError(
                    'model.bn_padding="masked" needs batches with an entry "valid", int32 [B, 2]: '
                    "height and width of the unpadded part of each crop; this batch has none. "
                    'model.bn_padding="counted" does without'
                )
            valid_cells = partial(layers.valid_cells, valid, images.shape[1:3])
        conv = partial(layers.Conv, dtype=self.dtype)
        norm = partial(
            layers.BatchNorm,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            groups=self.bn_groups,
            running_variance=self.bn_running_variance,
            use_running_average=self.bn_frozen or not train,
            valid_cells=valid_cells,
            dtype=self.dtype,
        )
        image = layers.normalize(images, self.dtype)
        backbone = ResNet(
            self.depth,
            self.width,
            self.stem,
            self.stride_on,
            self.output_stride,
            conv=partial(conv, init=layers.backbone_init),
            norm=norm,
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
            name="duc",
        )(image, middle, low)
        x = DLC(self.dlc_width, self.dlc_growth, self.dlc_rates, conv, norm, name="dlc")(x)
        if self.aux_head and (train or self.is_initializing()):
            aux = conv(layer3.shape[-1] // 4, 3, name="aux_conv")(layer3)
            aux = nn.relu(norm(name="aux_bn")(aux))
            stride = min(self.output_stride, 16)
            aux = self._classify(aux, images, conv, train, "aux_classifier", stride)
            self.sow("intermediates", "aux_logits", aux)
        return self._classify(x, images, conv, train, "classifier", 8)

    def _classify(self, x, images, conv, train, name, stride):
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        logits = conv(self.num_classes, bias=True, name=name)(x)
        logits = logits.astype(layers.parameter_dtype(self.dtype))
        return layers.resize_bilinear(logits, images.shape[1:3], self.resize_grid, 1 / stride)


def create(model: ml_collections.ConfigDict, num_classes: int, data_devices: int = 1) -> Segmenter:
    """The network of `config.model`; `data_devices` sets the BN groups of `bn_groups="device"`.

    Raises ConfigError for dtype "float64" while JAX's 64-bit numbers are off (`enable_dtype`).
    """
    if model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError('model.dtype="float64" needs jax.config.update("jax_enable_x64", True)')
    fields = dict(model)
    fields["bn_groups"] = data_devices if model.bn_groups == "device" else 1
    fields["dtype"] = jnp.dtype(model.dtype)
    fields["dlc_rates"] = tuple(model.dlc_rates)
    return Segmenter(num_classes=num_classes, **fields)


def enable_dtype(model: ml_collections.ConfigDict) -> None:
    """Switches JAX to 64-bit numbers where `config.model` computes in float64: before any array."""
    if model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
