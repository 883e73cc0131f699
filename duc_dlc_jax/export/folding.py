"""The network as it is run after training: BN inside the convolutions, no training-only parts.

`FoldedNetwork` walks through the same modules as training does, with other convolutions in their
place: those of `fold`, computed in float64 on the host. Each is a function named `conv:PATH` in the
traced network, which is how `onnx_graph` recognises it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from duc_dlc_jax.models import layers, resizing
from duc_dlc_jax.models.duc import DUC
from duc_dlc_jax.models.segmenter import Segmenter

CONV_PREFIX = "conv:"
OUTPUTS = ("ids", "logits")


@dataclasses.dataclass(frozen=True)
class Convolution:
    """k x k, padded by dilation (k - 1) / 2; kernel [k, k, C / groups, F], bias [F]: float64."""

    kernel: np.ndarray
    bias: np.ndarray
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.dilation * (len(self.kernel) - 1) // 2


def fold(model: Segmenter, variables: dict[str, Any]) -> tuple[dict[str, Convolution], set[str]]:
    """Every convolution of inference by its path ("backbone/conv1"), BN that follows it included.

    Returns them and the paths of the BNs that they include; a BN that follows something else stays.
    """
    convolutions: dict[str, Convolution] = {}
    included: set[str] = set()
    made: list[tuple[Any, str]] = []  # output of a convolution and its path

    def note(call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if isinstance(module, DUC) and context.method_name == "_guidance":
            convolutions.update(_fold_guidance(module, path, variables))
            image, size = args  # nothing of it needs recording: only its shape
            return jnp.zeros((*image.shape[:1], *size, module.width), image.dtype)
        if isinstance(module, layers.BatchNorm) and context.method_name == "__call__":
            for output, name in made:
                if output is args[0]:
                    convolutions[name] = _with_bn(convolutions[name], variables, path, module)
                    included.add(path)
            return jnp.zeros_like(args[0])  # of another identity: a BN after this one stays
        output = call(*args, **kwargs)
        if isinstance(module, layers.Conv) and context.method_name == "__call__":
            kernel, bias = _weights(variables, path)
            fields = module.stride, module.dilation, module.groups
            convolutions[path] = Convolution(kernel, bias, *fields)
            made.append((output, path))
        return output

    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    with nn.intercept_methods(note):
        jax.eval_shape(lambda image: model.apply(variables, image), image)
    return convolutions, included


def _weights(variables, path: str) -> tuple[np.ndarray, np.ndarray]:
    entry = _at(variables["params"], path)
    kernel = np.asarray(entry["kernel"], np.float64)
    return kernel, np.asarray(entry.get("bias", np.zeros(kernel.shape[-1])), np.float64)


def _at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _with_bn(conv: Convolution, variables, path: str, norm: layers.BatchNorm) -> Convolution:
    factor, shift = _scale_and_shift(variables, path, norm.epsilon)
    return dataclasses.replace(conv, kernel=conv.kernel * factor, bias=conv.bias * factor + shift)


def _scale_and_shift(variables, path: str, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """BN in inference is x * factor + shift: both float64 [C]."""
    params, stats = (_at(variables[kind], path) for kind in ("params", "batch_stats"))
    scale, bias, mean, var = (
        np.asarray(x, np.float64)
        for x in (params["scale"], params["bias"], stats["mean"], stats["var"])
    )
    factor = scale / np.sqrt(var + epsilon)
    return factor, bias - mean * factor


def _fold_guidance(duc: DUC, path: str, variables) -> dict[str, Convolution]:
    """g(I) and the stride-4 convolution as two convolutions in place of three.

    g's second 1x1 is linear and multiplied into the kernel of the stride-4 convolution. Its bias
    must not count in that one's padding: a channel of ones beside those of g, which padding
    surrounds with 0, carries it.
    """
    norm = duc.norm()
    first = Convolution(*_weights(variables, f"{path}/g_conv1"))
    first = _with_bn(first, variables, f"{path}/g_bn", norm)
    second, bias = _weights(variables, f"{path}/g_conv2")
    kernel, _ = _weights(variables, f"{path}/guidance_conv")
    composed = np.concatenate([second[0, 0], bias[None]]) @ kernel
    strided = Convolution(composed, np.zeros(duc.width), stride=4)
    strided = _with_bn(strided, variables, f"{path}/guidance_bn", norm)
    ones = Convolution(
        np.pad(first.kernel, ((0, 0), (0, 0), (0, 0), (0, 1))), np.append(first.bias, 1.0)
    )
    return {f"{path}/g_conv1": ones, f"{path}/guidance_conv": strided}


class FoldedNetwork:
    """The inference of a trained network; `convolutions` can be rounded to a narrower `dtype`."""

    def __init__(self, model: Segmenter, variables: dict[str, Any], dtype: Any = np.float32):
        """model, variables: as trained; dtype: of the convolutions' weights and activations."""
        self.model = model.clone(dtype=jnp.dtype(dtype))
        self.dtype = jnp.dtype(dtype)
        self.convolutions, self._included = fold(self.model, variables)
        self._variables = variables

    def logits(self, images: jax.Array, coarse: bool = False) -> jax.Array:
        """uint8 RGB or normalised floats [B, H, W, 3] -> logits [B, H, W, classes].

        Products in full precision: what leaves as float32 is float32 on every accelerator.
        coarse: on their own grid, and g(I) as `DUC` computes it, at the pixels that are read: no
        longer convolutions alone.
        """
        replace = functools.partial(self._replace, coarse)
        with nn.intercept_methods(replace), jax.default_matmul_precision("highest"):
            return self.model.apply(self._variables, images, coarse=coarse)  # type: ignore[return-value]

    def ids(self, images: jax.Array) -> jax.Array:
        """As `logits` -> train ids uint8 [B, H, W]."""
        return self.logits(images).argmax(-1).astype(jnp.uint8)

    def output(self, kind: str) -> Callable[[jax.Array], jax.Array]:
        return {"ids": self.ids, "logits": self.logits}[kind]

    def _replace(self, own_guidance, call, args, kwargs, context):
        module, method = context.module, context.method_name
        path = "/".join(module.path)
        if own_guidance and path.endswith("guidance_bn") and method == "__call__":
            return self._normalise(module, path, args[0])
        if isinstance(module, layers.Conv) and method == "__call__":
            return self._convolve(path, args[0])
        if isinstance(module, layers.BatchNorm) and method == "__call__":
            return args[0] if path in self._included else self._normalise(module, path, args[0])
        if isinstance(module, DUC) and method == "_guidance" and not own_guidance:
            return self._guidance(module, *args)
        return call(*args, **kwargs)

    def _convolve(self, path: str, x: jax.Array) -> jax.Array:
        c = self.convolutions[path]

        def convolve(x):
            kernel, bias = (jnp.asarray(v, self.dtype) for v in (c.kernel, c.bias))
            x = x.astype(self.dtype)
            y = jnp.asarray(layers.convolve(x, kernel, c.stride, c.dilation, c.groups))
            return y + bias[None, None, None]

        convolve.__name__ = CONV_PREFIX + path
        return jax.jit(convolve)(x)

    def _normalise(self, norm: layers.BatchNorm, path: str, x: jax.Array) -> jax.Array:
        folded = _scale_and_shift(self._variables, path, norm.epsilon)
        factor, shift = (jnp.asarray(v, self.dtype)[None, None, None] for v in folded)
        return x * factor + shift

    def _guidance(self, duc: DUC, image: jax.Array, size) -> jax.Array:
        """`DUC._guidance` by the convolutions of `_fold_guidance`."""
        path = "/".join(duc.path)
        if duc.guidance_stride > 1:
            half = tuple(-(-n // duc.guidance_stride) for n in image.shape[1:3])
            image = resizing.resize_bilinear(image, half, duc.grid, duc.guidance_stride)
        g = nn.relu(self._convolve(f"{path}/g_conv1", image))
        g = self._convolve(f"{path}/guidance_conv", g)
        return resizing.resize_bilinear(g, size, duc.grid, 8 / (4 * duc.guidance_stride))
