"""The whole network: ResNet -> DUC -> DLC -> classifier (figure 2), or others in their places."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.models import layers, registry, resizing, valid_cells
from duc_dlc_jax.models.resnet import Bottleneck, ResNet


class Segmenter(nn.Module):
    """Images -> per-pixel class logits. The fields are those of `config.model`, explained there."""

    num_classes: int
    depth: int
    width: int
    stem: str
    stride_on: str
    output_stride: int
    resize_grid: str
    upsampling: str
    context: str
    duc_width: int
    duc_dilation: int
    guidance_width: int
    guidance_kernel: int
    guidance_stride: int
    duc_upsampled: str
    commute_coefficients: bool
    dlc_width: int
    dlc_growth: int
    dlc_rates: Sequence[int]
    context_width: int
    context_rates: Sequence[int]
    dupsampling_width: int
    dropout: float
    aux_head: bool
    dtype: Any
    bn_momentum: float
    bn_epsilon: float
    bn_groups: int
    backbone_frozen: bool
    bn_frozen: bool
    bn_running_variance: str
    bn_padding: str
    remat: str

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
        are sown as `aux_logits` in the collection `intermediates`, on their own grid of
        `aux_stride`; needs the random stream `dropout`.

        valid: int32 [B, 2], height and width in pixels of the unpadded part of each image, which
        lies at its top left. In inference the logits of this part then equal those of the image
        without padding. Training reads it with `bn_padding="masked"` alone, and raises ConfigError
        where it is missing then.

        coarse: logits on their own grid, [B, ceil(H / s), ceil(W / s), classes] with s =
        `logit_stride`, by default 8. Where it is not 1, nothing as large as the image is then kept
        whole in inference but the image itself.
        """
        masked = self.bn_padding == "masked" and train and not self.bn_frozen
        if masked and valid is None:
            raise ConfigError(
                'model.bn_padding="masked" needs batches with an entry "valid", int32 [B, 2]: '
                "height and width of the unpadded part of each crop; this batch has none. "
                'model.bn_padding="counted" does without'
            )
        every = (
            None if valid is None else partial(valid_cells.valid_sizes, valid, images.shape[1:3])
        )
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
        image = layers.normalize(images, self.dtype)
        backbone = ResNet(
            self.depth,
            self.width,
            self.stem,
            self.stride_on,
            self.output_stride,
            conv=partial(conv, init=layers.backbone_init),
            norm=partial(norm, use_running_average=True) if self.backbone_frozen else norm,
            valid_sizes=sizes,
            block=nn.remat(Bottleneck) if train and self.remat != "none" else Bottleneck,
            name="backbone",
        )
        features = backbone(image)
        if self.backbone_frozen:
            features = jax.lax.stop_gradient(features)
        drop = partial(nn.Dropout, deterministic=not train)

        def upsampled(net, image, features):
            slabs = coarse and not train
            return registry.upsampled(
                net, image, features, conv, norm, slabs=slabs, valid_sizes=sizes
            )

        def context(net, x):
            return registry.context(net, conv, norm, drop, sizes)(x)

        if train and self.remat == "all":
            upsampled, context = nn.remat(upsampled), nn.remat(context)
        x = context(self, upsampled(self, image, features))

        def drop_channels(x):
            return drop(self.dropout, broadcast_dims=(1, 2))(x)

        if self.aux_head and (train or self.is_initializing()):
            aux = conv(features[2].shape[-1] // 4, 3, name="aux_conv")(features[2])
            aux = nn.relu(norm(name="aux_bn")(aux))
            aux = self._classify(drop_channels(aux), conv, "aux_classifier")
            self.sow("intermediates", "aux_logits", aux)
        if self.context != "aspp":  # which has its own, further up
            x = drop_channels(x)
        if self.upsampling in registry.CLASSIFYING:
            return registry.classified(self, x, images.shape[1:3], conv)
        logits = self._classify(x, conv, "classifier")
        if coarse and self.logit_stride > 1:
            return logits
        stride = registry.context_stride(self.upsampling, self.output_stride)
        logits = resizing.resize_bilinear(
            logits, images.shape[1:3], self.resize_grid, 1 / stride, valid_sizes=sizes
        )
        return registry.refined(self, image, logits, conv, sizes)

    def _classify(self, x, conv, name):
        logits = conv(self.num_classes, bias=True, name=name)(x)
        return logits.astype(layers.parameter_dtype(self.dtype))

    @property
    def aux_stride(self) -> int:
        """Stride of the auxiliary logits' grid, that of layer3, against the image."""
        return min(self.output_stride, 16)

    @property
    def logit_stride(self) -> int:
        """Stride of the last grid against the image; see `registry.logit_stride`."""
        return registry.logit_stride(self.upsampling, self.output_stride)


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
    fields["context_rates"] = tuple(model.context_rates)
    return Segmenter(num_classes=num_classes, **fields)


def variable_shapes(model: Segmenter) -> dict[str, Any]:
    """{params, batch_stats} as ShapeDtypeStructs; no array is made."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    shapes: Any = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    return {name: shapes[name] for name in ("params", "batch_stats")}


def enable_dtype(model: ml_collections.ConfigDict) -> None:
    """Switches JAX to 64-bit numbers where `config.model` computes in float64: before any array."""
    if model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
